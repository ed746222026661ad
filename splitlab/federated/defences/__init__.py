"""What a federated client can do to its update before it leaves: one file per defence, which says all there is to say.

Every module here with `DEFENCES`, a tuple of `Defence` records, joins the catalogue: parameter files, tables, report
and attacks follow. Defences are public, with their levels, and named in the update; what they draw is not. Sharing
fewer parameters (attention or LoRA only) is `trainable` of `splitlab.federated.client.share`.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from splitlab.core.catalogue import catalogue
from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.federated.defences.record import Client, Defence, UpdateDefence, protected
from splitlab.federated.update import Update, UpdateTruth

DEFENCES: dict[str, Defence] = catalogue(__name__, __path__, "DEFENCES")
"""By the name that a parameter file gives them."""

BY_LEVELS = {record.levels: record for record in DEFENCES.values()}


def read_level(words: str) -> tuple[str, float]:
    """Read `name=level`, as parameter files write a defence; the level of one without is NaN.

    Raises:
        InputError: no such defence, or a level that is no number.
    """
    name, _, level = words.partition("=")
    if words != "none" and name not in DEFENCES:
        raise InputError(f"defence {words!r} is unknown; choose 'none' or <name>=<level>: {', '.join(DEFENCES)}")
    try:
        value = float(level or 0.0)
        if not math.isfinite(value):
            raise ValueError
        return name, value if level else math.nan
    except ValueError:
        raise InputError(f"defence {words!r}: {level!r} is no number; write {name}=<level>") from None


def make_defence(words: str) -> UpdateDefence | None:
    """Return the defence that `name=level` means; None for "none".

    Raises:
        InputError: see `read_level`; or the level is out of range.
    """
    name, level = read_level(words)
    if name == "none":
        return None
    record = DEFENCES[name]
    try:
        return (record.level or record.levels)(0.0 if math.isnan(level) else level)
    except InputError as error:
        raise InputError(f"defence {words!r}: {error}") from None


def effects(words: str) -> frozenset[str]:
    """Return what the defences that an update names leave in it; "unknown" of those that are not in the catalogue."""
    known = {levels.__name__: record.effects for levels, record in BY_LEVELS.items()}
    named = [] if words == "none" else [part.split(" ")[0] for part in words.split(", ")]
    return frozenset(effect for name in named for effect in known.get(name, ("unknown",)))


def defence_label(name: str, level: float) -> str:
    """Say in words which defence a table's row is about."""
    return DEFENCES[name].label.format(level) if name in DEFENCES else name.replace("_", " ")


def protect(update: Update, defence: UpdateDefence, *, generator: Source) -> Update:
    """Apply a defence that needs only the update; the result has the same names, shapes and types.

    Raises:
        InputError: the defence needs the client's batch or other clients.
    """
    change = BY_LEVELS[type(defence)].protect
    if change is None:
        raise InputError(f"{type(defence).__name__} needs more than the finished update; use share_protected")
    values = {name: value.float() for name, value in update.gradients.items()}
    return protected(update, change(values, defence, generator), defence)


def share_protected(
    model: nn.Module,
    truth: UpdateTruth,
    defence: UpdateDefence,
    *,
    generator: Source,
    others: Sequence[UpdateTruth] = (),
    **arguments: Any,
) -> Update:
    """Be a client with a defence: what `share` would send, protected.

    Args:
        model: the model as the server sent it.
        truth: the client's batch.
        defence: any of `DEFENCES`.
        generator: of the defence's draws, from a key that the server does not know.
        others: the batches of the other clients, for secure aggregation.
        arguments: as for `share`.

    Raises:
        InputError: as `share`; per-example clipping of anything but a gradient; not n_clients - 1 others.
    """
    client, record = Client(model, truth, others, arguments), BY_LEVELS[type(defence)]
    if record.share:
        return record.share(client, defence, generator)
    return protect(client.update(), defence, generator=generator)
