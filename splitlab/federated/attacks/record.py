"""What every attack on updates says of itself: one record in its own file, read wherever attacks are listed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("closed form", "classical", "GIDM", "ours")
"""Read off the update exactly; the two inversions all others descend from; the paper whose claims are judged; ours."""


@dataclass(frozen=True)
class Attack:
    """An attack on what federated clients share.

    Attributes:
        function: `(update, knowledge, *, generator, callback=None, <options>)`; its name is the attack's.
            `update`: what one client sent; for attacks on images also several updates, inverted side by side.
            `knowledge`: public models and the facts that the threat model grants; no truth can reach it.
            `generator`: of all that the attacker draws. `callback`: told of every evaluation.
            It raises an InputError if a needed fact is missing or the update does not fit the model.
        label: how it is called wherever people read of it.
        rank: its place among the attacks, in the order in which facts are found.
        finds: what it is after: "images", of several updates side by side; "timesteps" or "prompts", of one.
        family: of `FAMILIES`.
        needs: facts of the knowledge that it cannot do without.
        as_published: it can find neither scale nor sign, and takes a gradient as it is unless it is told.
        usual: options that suit models of any make better than its defaults.
        may_be_0: counts among its options that may be 0, besides those that are 0 by default.
    """

    function: Callable[..., Any]
    label: str
    rank: int
    finds: str = "images"
    family: str = "ours"
    needs: tuple[str, ...] = ()
    as_published: bool = False
    usual: Mapping[str, Any] = field(default_factory=dict)
    may_be_0: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in parameters, files and tables."""
        return self.function.__name__
