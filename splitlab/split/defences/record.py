"""What every defence says of itself: one record in its own file, and the settings that all records together make."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.seeds import Key, Source
from splitlab.data.image_set import ImageSet
from splitlab.split.messages import Observation

FEATURES = ("noisy_latents", "smashed")
"""The fields that depend on the private image and that the label does not cover."""

FLOATS = (*FEATURES, "noise", "encoder_hidden_states")

NAMED = (
    *("timestep_floor", "latent_norm", "feature_noise", "independent_draws", "matched", "hint_noise", "coarse_hints"),
    *("per_image_noise", "borrowed_colours", "hint_layout_noise", "random_symmetry", "symsigmoid", "fixed_noise"),
    *("key_mixing", "patch_shuffle", "fresh_keys", "half", "hide_prompts"),
)
"""The defences that every recorded header of version 1 names, on or off, in this order; others are named where on."""

Value = bool | int | float


class Defences:
    """What a client does to a message before it leaves: one value per defence, all off by default.

    A frozen dataclass, one field per record in this folder (`declared`): `Defences(half=True).fixed_noise` is 0.0.
    What no client could apply is an `InputError` of the defence's own.
    """

    records: ClassVar[Mapping[str, "Defence"]]
    """By name, in the order in which a client applies them."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, **values: Value) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        """Refuse values that no client could apply."""
        for defence in self.records.values():
            if reason := defence.refuses(self):
                raise InputError(reason)

    def __str__(self) -> str:
        """Name the defences that are on, as tables show them; "none" where there are none."""
        values = {name: value for name, value in vars(self).items() if value}
        return " ".join(name if value is True else f"{name}={value:g}" for name, value in values.items()) or "none"

    @property
    def active(self) -> tuple["Defence", ...]:
        """The defences that are on, in the order in which a client applies them."""
        return tuple(defence for name, defence in self.records.items() if getattr(self, name))

    @property
    def label(self) -> str:
        """The defences that are on, in words."""
        words = [self.records[name].label.format(value) for name, value in vars(self).items() if value]
        return ", ".join(words) or "none"

    @property
    def of_one_sample(self) -> "Defences":
        """The same without those that act on several samples together."""
        return replace(self, **{name: d.off for name, d in self.records.items() if d.needs_several})

    def recorded(self) -> dict[str, Value]:
        """Return what a recorded header says of them: `NAMED`, and any other that is on."""
        return {name: value for name, value in vars(self).items() if name in NAMED or value}


Transform = Callable[[Observation, Defences, Key, Source], Observation]
"""`(message, defences, client_key, draw)`: `client_key` is of what a client draws once, `draw` of this message."""


@dataclass(frozen=True)
class Noise:
    """What a defence adds that the label does not reveal.

    Attributes:
        std: its standard deviation on what is sent, from the client's defences.
        gaussian: whether it is Gaussian.
    """

    std: Callable[[Defences], float]
    gaussian: bool = True


Rule = tuple[tuple[str, ...], str]
"""Names of other defences, and the words to refuse with."""


@dataclass(frozen=True)
class Defence:
    """A defence of a split client. A defence is public; what it draws and the client's key are not.

    Attributes:
        name: its parameter.
        off: the value at which it does nothing, False, 0 or 0.0; its type is the parameter's.
        label: how it is called wherever people read of it; `{:g}` is its value.
        says: what it does, with the value's unit.
        place: where it stands among the defences, in the order in which a client applies them.
        touches: the message's fields that it may change.
        transform: what it does to a message; None for what is decided before there is one.
        replaces: what it does to the images and hints themselves, once, before they are encoded: `(data, defences, one
            source of draws per image)`; None: nothing.
        adds: the noise it adds; None: none.
        in_latent_view: whether `splitlab.split.attacks.latent_view` takes it into account, where it changes the noisy
            latents. Of noise that it does not know, it knows the size (`unseen_variance`).
        needs_several: whether it acts on several samples of a message together.
        least, must: the least value above 0, and how a bad one is refused: `<name> <must>, got <value>`.
        needs, excludes: defences of which one must be on beside it, and that must be off.
        refuses_run: `(defences, scheme, batch_size)`: why a run of that scheme cannot have it; "": it can.
        usual: values worth trying, mildest first; the explorer's playground offers them.
    """

    name: str
    off: Value
    label: str
    says: str
    place: int
    touches: tuple[str, ...]
    transform: Transform | None = None
    replaces: Callable[[ImageSet, Defences, Sequence[Source]], ImageSet] | None = None
    adds: Noise | None = None
    in_latent_view: bool = True
    needs_several: bool = False
    least: int = 0
    must: str = "must be 0 or more"
    needs: Rule = ((), "")
    excludes: Rule = ((), "")
    refuses_run: Callable[[Defences, str, int], str] = lambda defences, scheme, batch_size: ""
    usual: tuple[Value, ...] = (True,)

    @property
    def rank(self) -> int:
        """Its place, as catalogues are ordered by."""
        return self.place

    def refuses(self, defences: Defences) -> str:
        """Say why no client can apply these values; "": clients can."""
        value, (needed, lacking), (excluded, clashing) = getattr(defences, self.name), self.needs, self.excludes
        if not 0 <= value < math.inf or 0 < value < self.least:
            return f"{self.name} {self.must}, got {value}"
        if value and needed and not any(getattr(defences, name) for name in needed):
            return lacking
        return clashing if value and any(getattr(defences, name) for name in excluded) else ""


STD = "is a standard deviation and must be 0 or more"


def declared(records: Mapping[str, Defence]) -> type[Defences]:
    """Complete `Defences` with one field per record, `NAMED` first, and make it the frozen dataclass that it is."""
    names = (*(name for name in NAMED if name in records), *(name for name in records if name not in NAMED))
    Defences.__annotations__ = {name: type(records[name].off) for name in names}
    for name in names:
        setattr(Defences, name, records[name].off)
    Defences.records = records
    attributes = "\n".join(f"        {name}: {records[name].says}" for name in names)
    Defences.__doc__ = f"{Defences.__doc__}\n    Attributes:\n{attributes}\n    "
    return dataclass(frozen=True)(Defences)


def read_defences(text: str) -> Defences:
    """Read defences as tables name them, the inverse of `str(Defences(...))`.

    Raises:
        InputError: the text names no defences.
    """
    values: dict[str, object] = {}
    for word in text.split() if text != "none" else ():
        name, _, value = word.partition("=")
        try:
            number = float(value or 1)
        except ValueError:
            raise InputError(f"defences {text!r}: {value!r} is no number; write them as tables do") from None
        whole = name in Defences.records and type(Defences.records[name].off) is int
        values[name] = int(number) if whole else number if value else True
    return parse(Defences, values, where=f"defences {text!r}")


def recorded(settings: Any) -> dict[str, Any]:
    """Return a dataclass that holds `defences`, as JSON says it: a defence that is off and new is not named."""
    return asdict(settings) | {"defences": settings.defences.recorded()}


def latent_hints_only(words: str) -> Callable[[Defences, str, int], str]:
    """Return a `Defence.refuses_run` with these words: not for split_gradients, whose client trains a hint encoder."""
    return lambda defences, scheme, batch_size: words if scheme == "split_gradients" else ""
