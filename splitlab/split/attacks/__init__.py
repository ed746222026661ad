"""What the other side can do with what it saw: one file per idea, which says all there is to say of its attacks.

Every module here with `ATTACKS`, a tuple of `Attack` records, joins the catalogue: tables, report and explorer follow.
"""

from splitlab.core.catalogue import catalogue
from splitlab.core.labels import FIELD_WORDS
from splitlab.split.attacks.record import Attack

ATTACKS: dict[str, Attack] = catalogue(__name__, __path__)
"""By name, simplest first."""

NO_INFORMATION = tuple(name for name, record in ATTACKS.items() if not record.informed)
"""The attacks that look at no message: what all others are measured against."""

FAMILIES = tuple(dict.fromkeys(record.family for record in ATTACKS.values() if record.family))
"""The ideas, in the order of their simplest attacks."""


def attack_label(attack: str) -> str:
    """Say in words which attack it is, and what it was denied."""
    live = "live: " if attack.startswith("live: ") else ""
    plain, _, denied = attack.removeprefix("live: ").partition("-without-")
    words = ATTACKS[plain].label if plain in ATTACKS else plain.replace("_", " ")
    facts = ", ".join(FIELD_WORDS.get(name, name) for name in denied.split("-")) if denied else ""
    return f"{live}{words}" + (f" without {facts}" if facts else "")
