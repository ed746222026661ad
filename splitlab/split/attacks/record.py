"""What every attack says of itself: one record in its own file, read wherever attacks are listed, drawn or judged."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.split.messages import Knowledge, Observation, Reconstruction


@dataclass(frozen=True)
class Option:
    """What an option of an attack is, in words, and what it may be: in `Annotated`, beside its type and default.

    Attributes:
        words: a phrase, with its unit.
        least, most: bounds of a number, inclusive.
        above: its lower bound, exclusive.
        choices: the texts it may be; none: it is no text.
    """

    words: str
    least: int | float = -math.inf
    most: int | float = math.inf
    above: int | float = -math.inf
    choices: tuple[str, ...] = ()

    def holds(self, value: int | float) -> bool:
        """Say whether a number is finite and within the bounds."""
        return math.isfinite(value) and self.least <= value <= self.most and value > self.above

    @property
    def range(self) -> str:
        """Its bounds in words; "" if it has none."""
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"from {self.least:g} to {self.most:g}"
        if math.isfinite(self.least):
            return f"{self.least:g} or more"
        return f"above {self.above:g}" if math.isfinite(self.above) else ""


@dataclass(frozen=True)
class Parameter:
    """An option as an attack's signature has it: its `Option`, the types that its values may have, and the default."""

    option: Option
    types: tuple[type, ...]
    default: Any

    def check(self, attack: str, name: str, value: Any) -> None:
        """Refuse a value of another type or outside the range.

        Raises:
            InputError: which option of which attack it is, what it is, and what it may be.
        """
        option, what = self.option, f"{attack}: {name}"
        if option.choices:
            if value not in option.choices:
                raise InputError(f"{what} {value!r} is unknown; choose one of {', '.join(option.choices)}")
            return
        accepted = (*self.types, int) if float in self.types else self.types
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            kinds = " or ".join("none" if kind is type(None) else kind.__name__ for kind in self.types)
            raise InputError(f"{what} must be {kinds}, got {value!r} ({option.words})")
        if isinstance(value, int | float) and not option.holds(value):
            raise InputError(f"{what} must be {option.range or 'finite'}, got {value!r} ({option.words})")


@dataclass(frozen=True)
class Family:
    """An idea that attacks share.

    Attributes:
        title: what the idea is called.
        says: what it does, what it needs, and where it is from.
    """

    title: str
    says: str


@dataclass(frozen=True)
class Attack:
    """An attack on what split clients send.

    Attributes:
        function: `(observations, knowledge, *, generator, callback=None, <options>) -> Reconstruction`; `run` documents
            the arguments. Its name is the attack's, and every option is `Annotated` by an `Option`.
        label: how it is called wherever people read of it.
        rank: its place among the attacks, simplest first; of attacks that get equally far, the simpler one is named.
        family: the idea behind it; None for what is no attack on images or hints.
        reason: why a defence does not stop it, to follow "identifies 98 %: "; "" if that has no one reason.
        moral: what is learnt where it is the strongest of all, for the report's findings; "" if nothing more.
        informed: False for a guess, which looks at no message: what all others are measured against.
        schemes: the training schemes whose messages it is for; none: any.
        takes_surrogates: whether it is given public data as the client would replace them before sending
            (`splitlab.split.defences.disguised`); False for an attack that replaces them itself.
        colour: of its line in pictures; "": one that is free.
        shows_hints: whether its hints are drawn beside its images.
    """

    function: Callable[..., Reconstruction]
    label: str
    rank: int
    family: Family | None = None
    reason: str = ""
    moral: str = ""
    informed: bool = True
    schemes: tuple[str, ...] = ()
    takes_surrogates: bool = True
    colour: str = ""
    shows_hints: bool = False

    @property
    def name(self) -> str:
        """Its name in parameters, files and tables."""
        return self.function.__name__

    @cached_property
    def options(self) -> Mapping[str, Parameter]:
        """Its options by name, read off the function's signature."""
        parameters = inspect.signature(self.function).parameters.values()
        annotated = [p for p in parameters if getattr(p.annotation, "__metadata__", None)]
        return {p.name: _parameter(p) for p in annotated}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that it does not take, or not with such values.

        Raises:
            InputError: which, and what it takes.
        """
        for name, value in options.items():
            if name not in self.options:
                takes = f"it takes {', '.join(self.options)}" if self.options else "it takes none"
                raise InputError(f"attack {self.name} has no option {name!r}; {takes}")
            self.options[name].check(self.name, name, value)

    def run(
        self,
        observations: Sequence[Observation],
        knowledge: Knowledge,
        options: Mapping[str, Any],
        *,
        generator: torch.Generator,
        callback: Callback | None = None,
    ) -> Reconstruction:
        """Check the options, then reconstruct every sample of the messages, in the order they were sent.

        Args:
            observations: what was sent; left as it is.
            knowledge: the threat model: public models and data, and which defences are on. No truth can reach it.
            options: the attack's own.
            generator: of all draws; unused where nothing is drawn.
            callback: told of every step, batch or draw, with the attack's own objective.

        Raises:
            InputError: it takes no such option, or not with such a value; there are no messages, or they lack a field
                that it needs.
        """
        self.check(options)
        return self.function(observations, knowledge, generator=generator, callback=callback, **options)


def _parameter(parameter: inspect.Parameter) -> Parameter:
    """Read an `Annotated[type, Option(...)]`."""
    kind, (option, *_) = parameter.annotation.__origin__, parameter.annotation.__metadata__
    return Parameter(option, getattr(kind, "__args__", (kind,)), parameter.default)
