"""Every case of `benchmarks/cases.py` comes out right."""

import sys

import pytest

from splitlab import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cases


@pytest.mark.parametrize("name", cases.CASES)
def test_what_people_bring_is_loaded_as_meant_or_refused(name: str) -> None:
    assert cases.run(name) == ""


def test_a_case_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(scratch: object) -> None:
        raise AssertionError("nothing was read as meant")

    monkeypatch.setitem(cases.CASES, "silent", silent)
    assert "nothing was read as meant" in cases.run("silent")
