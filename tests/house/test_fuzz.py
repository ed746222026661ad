"""A few thousand changed messages and files: each is refused by one InputError, or is what the documentation says."""

import pytest
from world.fuzz.changes import Kind, Outcome, attempt
from world.fuzz.kinds import kinds

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.core.tables import read_table

NAMES = ("message", "transcript", "truth", "server", "update", "update truth", "granted", "reconstruction", "inversion")
NAMES += ("record", "samples", "scores", "image", "metadata")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return kinds(tmp_path_factory.mktemp("fuzz"))


def test_every_kind_is_tried(known: dict[str, Kind]):
    assert set(known) == set(NAMES)


def test_the_tracked_counts_are_of_every_kind_and_nothing_went_wrong():
    table = read_table(ROOT / "reports/metrics/fuzz.csv").set_index("kind")
    assert set(table.index) == set(NAMES)
    assert table.loc[["message", "transcript", "update", "image", "metadata"], "n"].min() == 100_000
    assert table["n"].sum() == 680_000  # as docs/measurements.md says
    assert (table["accepted"] + table["refused"] == table["n"]).all()
    assert not table[["crashes", "out_of_range"]].to_numpy().any()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_changed_is_refused_or_in_range(known: dict[str, Kind], name: str):
    outcome = attempt(known[name], 1500 if name == "message" else 200, seed=1)
    assert not outcome.first
    assert outcome.accepted > 10  # else the mutations only ever tested the parser of the container
    assert outcome.refused > 10


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("image", "metadata")])
def test_originals_are_accepted(known: dict[str, Kind], name: str):
    for original in known[name].originals:
        assert not known[name].check(known[name].read(original), original)


def test_a_crash_and_an_acceptance_out_of_range_are_seen():
    def read(content: bytes) -> int:
        if content == b"2":
            raise KeyError("not an InputError")
        if content == b"1":
            raise InputError("refused")
        return int(content)

    kind = Kind([b"0", b"1", b"2", b"3"], read, lambda value, content: ["too large"] * (value > 2), lambda c, draw: c)
    outcome = attempt(kind, 8)
    assert (outcome.accepted, outcome.refused, outcome.crashes, outcome.out_of_range) == (4, 2, 2, 2)
    assert "KeyError" in outcome.first[0]
    assert "too large" in outcome.first[1]
    assert attempt(kind, 1, start=3) == Outcome(accepted=1, out_of_range=1, first=["try 3: too large"])
