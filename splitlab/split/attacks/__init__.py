"""What the other side can do with what it saw: one file per idea, which says all there is to say of its attacks.

Every module here with `ATTACKS`, a tuple of `Attack` records, joins the catalogue: tables, report and explorer follow.
"""

from collections.abc import Iterable

from splitlab.core.catalogue import catalogue
from splitlab.core.labels import FIELD_WORDS
from splitlab.split.attacks.record import Attack
from splitlab.split.config import Adversary

ATTACKS: dict[str, Attack] = catalogue(__name__, __path__)
"""By name, simplest first."""

NO_INFORMATION = tuple(name for name, record in ATTACKS.items() if not record.informed)
"""The attacks that look at no message: what all others are measured against."""

REFERENCE = NO_INFORMATION[0]
"""The simplest of them: the row that pictures and differences are drawn against."""

FAMILIES = tuple(dict.fromkeys(record.family for record in ATTACKS.values() if record.family))
"""The ideas, in the order of their simplest attacks."""


def attack_label(attack: str | Adversary) -> str:
    """Say in words which attack it is, and what it was denied."""
    who = attack if isinstance(attack, Adversary) else Adversary(attack)
    words = ATTACKS[who.attack].label if who.attack in ATTACKS else who.attack.replace("_", " ")
    return words + (f" without {fields_label(who.denied)}" if who.denied else "")


def fields_label(names: Iterable[str]) -> str:
    """Say in words which fields are meant."""
    return ", ".join(FIELD_WORDS.get(name, name) for name in names)
