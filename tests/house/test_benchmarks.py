"""The commands behind the numbers that documents quote can be started: what they import is there."""

import importlib

import pytest

from splitlab.core.paths import ROOT

BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, "the first line says what it measures"
