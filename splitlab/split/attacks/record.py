"""What every attack says of itself: one record in its own file, read wherever attacks are listed, drawn or judged."""

from collections.abc import Callable
from dataclasses import dataclass

from splitlab.split.messages import Reconstruction


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
        function: `(observations, knowledge, *, generator, callback=None, ...) -> Reconstruction`. It may read the
            observations, and through `knowledge` public models and public data; no truth can reach it. Its name is the
            attack's, and its other keywords are the options.
        label: how it is called wherever people read of it.
        rank: its place among the attacks, simplest first; of attacks that get equally far, the simpler one is named.
        family: the idea behind it; None for what is no attack on images or hints.
        reason: why a defence does not stop it, to follow "identifies 98 %: "; "" if that has no one reason.
        informed: False for a guess, which looks at no message: what all others are measured against.
        takes_surrogates: whether it is given public data as the client would replace them before sending
            (`splitlab.split.surrogates`); False for an attack that replaces them itself.
        colour: of its line in pictures; "": one that is free.
    """

    function: Callable[..., Reconstruction]
    label: str
    rank: int
    family: Family | None = None
    reason: str = ""
    informed: bool = True
    takes_surrogates: bool = True
    colour: str = ""

    @property
    def name(self) -> str:
        """Its name in parameters, files and tables."""
        return self.function.__name__
