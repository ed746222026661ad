"""What the server of federated training can do with an update: one file per idea, which says all there is to say of it.

Every module here with `ATTACKS`, a tuple of `Attack` records, joins the catalogue.
"""

from collections.abc import Sequence

from splitlab.core.catalogue import catalogue
from splitlab.core.labels import GRANT_WORDS
from splitlab.federated.attacks.record import Attack

INVERSIONS: dict[str, Attack] = catalogue(__name__, __path__)
"""By name, in the order in which facts are found."""


def finding(fact: str) -> tuple[str, ...]:
    """Return the names of the attacks that are after a fact, see `Attack.finds`."""
    return tuple(name for name, record in INVERSIONS.items() if record.finds == fact)


ON_IMAGES = finding("images")

NO_INFORMATION = "no_information"
"""The guess that looks at no update: what all attacks are measured against."""


def inversion_label(attack: str, granted: Sequence[str] = ()) -> str:
    """Say in words which attack on updates it is, and what it was granted."""
    words = INVERSIONS[attack].label if attack in INVERSIONS else attack.replace("_", " ")
    facts = ", ".join(GRANT_WORDS.get(name, name) for name in granted)
    return words + (f" (knows {facts})" if facts else "")
