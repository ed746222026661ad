"""What every defence of federated clients says of itself: one record in its own file, read by clients and attackers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from splitlab.core.config import Settings
from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.federated.client import share
from splitlab.federated.update import Update, UpdateTruth

Gradients = dict[str, Tensor]

EFFECTS = {
    "noised": "Gaussian noise on every entry: timesteps are read off all layers that see them, which averages it out",
    "rescaled": "another length: gradients are compared up to scale, and the scale is read off the noise's variance",
    "sparse": "entries of any layer zeroed: zeroes do not count, and timesteps are tested entry by entry",
    "withheld": "entries of one layer zeroed: zeroes do not count",
    "rounded": "few levels per tensor: no attack models them, and attacks stop where rounding hides the rest",
    "summed": "several clients' updates in one: to an attack, a larger batch",
}
"""What a defence leaves in an update, and what the attacks, to whom defences are public, make of it."""


class UpdateDefence(Settings):
    """Base of the defences' levels, frozen dataclasses whose names and values are public: they stand in the update."""

    def __post_init__(self) -> None:
        """Refuse levels that mean nothing."""
        try:
            super().__post_init__()
        except InputError as error:
            raise InputError(f"{type(self).__name__}: {error}") from None

    def __str__(self) -> str:
        """Name the defence and its levels, as tables and updates show them."""
        given = [field for field in fields(self) if getattr(self, field.name) != field.default]  # type: ignore[arg-type]
        return " ".join([type(self).__name__, *(f"{field.name}={getattr(self, field.name)}" for field in given)])


@dataclass(frozen=True)
class Client:
    """What a defence uses that needs more than the finished update.

    Attributes:
        model: the model as the server sent it.
        truth: the client's batch.
        others: the batches of the other clients, for secure aggregation.
        arguments: of `splitlab.federated.client.share`.
    """

    model: nn.Module
    truth: UpdateTruth
    others: Sequence[UpdateTruth]
    arguments: dict[str, Any]

    def update(self) -> Update:
        """Return what the client would send without a defence."""
        return share(self.model, self.truth, **self.arguments)


@dataclass(frozen=True)
class Defence:
    """A defence of federated clients. Exactly one of `protect` and `share` is given; neither modifies its input.

    Attributes:
        name: how parameter files call it: `name=level`.
        levels: its config; the name of the class stands in updates.
        label: how it is called wherever people read of it; `{:g}` stands for the number.
        rank: its place among the defences.
        effects: what it leaves in the update, keys of `EFFECTS`, for attacks to adapt to.
        level: from the number in a parameter file to the config; None: `levels` itself takes it.
        protect: `(gradients, levels, generator) -> gradients` in float32, of what needs only the finished update.
        share: `(client, levels, generator) -> update`, of what needs the batch or other clients.
    """

    name: str
    levels: type[Any]
    label: str
    rank: int
    effects: tuple[str, ...]
    level: Callable[[float], UpdateDefence] | None = None
    protect: Callable[[Gradients, Any, Source], Gradients] | None = None
    share: Callable[[Client, Any, Source], Update] | None = None

    def __post_init__(self) -> None:
        """Hold records to what they say."""
        assert (self.protect is None) != (self.share is None), "give one of protect and share"
        assert set(self.effects) <= set(EFFECTS), "an effect that no attack has heard of"


def protected(update: Update, values: Gradients, levels: UpdateDefence) -> Update:
    """Return the update with new values, of the types it had, and the defence named behind those before it."""
    named = str(levels) if update.defence == "none" else f"{update.defence}, {levels}"
    cast = {name: value.to(update.gradients[name].dtype) for name, value in values.items()}
    return replace(update, gradients=cast, defence=named)


def length(values: Gradients) -> Tensor:
    """Return the L2 norm over all tensors, float64."""
    return torch.stack([value.double().square().sum() for value in values.values()]).sum().sqrt()
