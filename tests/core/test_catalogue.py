"""Adding an attack is adding a file."""

import sys
from pathlib import Path

import pytest

from splitlab.core.catalogue import catalogue
from splitlab.federated.attacks import INVERSIONS
from splitlab.split.attacks import ATTACKS, FAMILIES, NO_INFORMATION, attack_label
from splitlab.split.config import Adversary

RECORD = """
from splitlab.split.attacks.record import Attack

def {name}(observations, knowledge, *, generator, callback=None):
    ...

ATTACKS = (Attack({name}, "{name} in words", rank={rank}),)
"""


def test_every_file_of_a_folder_adds_its_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "catalogued"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helpers.py").write_text("ATTACK = 1\n")
    for name, rank in (("second", 2), ("first", 1)):
        (package / f"{name}.py").write_text(RECORD.format(name=name, rank=rank))
    monkeypatch.syspath_prepend(tmp_path)
    found = catalogue("catalogued", [str(package)])
    assert list(found) == ["first", "second"]
    assert found["first"].label == "first in words"
    for module in [name for name in sys.modules if name.startswith("catalogued")]:
        del sys.modules[module]


def test_records_say_what_tables_and_menus_need() -> None:
    assert NO_INFORMATION == ("mean_public", "random_public")
    labels = [record.label for record in (*ATTACKS.values(), *INVERSIONS.values())]
    assert len(set(labels)) == len(labels)
    assert all(record.family in FAMILIES for record in ATTACKS.values() if record.family)
    assert {record.finds for record in INVERSIONS.values()} == {"images", "timesteps", "prompts"}
    assert attack_label(Adversary("closed_form", ("noise",))) == "closed form without noise label"
    assert attack_label("of_somebody") == "of somebody"
