"""What every attack on updates says of itself: one record in its own file, read wherever attacks are listed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attack:
    """An attack on what federated clients share.

    Attributes:
        function: `(update, knowledge, *, generator, callback=None, ...)`. It may read the update, and through
            `knowledge` public models and what the threat model grants; no truth can reach it. Its name is the attack's.
        label: how it is called wherever people read of it.
        rank: its place among the attacks, in the order in which facts are found.
        finds: what it is after: "images", of several updates side by side; "timesteps" or "prompts", of one.
        as_published: it can find neither scale nor sign, and takes a gradient as it is unless it is told.
        usual: options that suit models of any make better than its defaults.
    """

    function: Callable[..., Any]
    label: str
    rank: int
    finds: str = "images"
    as_published: bool = False
    usual: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in parameters, files and tables."""
        return self.function.__name__
