"""What DVC prints of this project fits into a terminal of 160 columns."""

import subprocess

import pytest
import yaml

from splitlab.core.paths import ROOT

COLUMNS = 160

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="DVC needs a repository")


def printed(*command: str) -> list[str]:
    ran = subprocess.run(["dvc", *command], cwd=ROOT, check=True, capture_output=True, text=True)
    return [line.rstrip() for line in ran.stdout.splitlines()]


def test_the_graph_of_stages_fits() -> None:
    lines = printed("dag", "--collapse-foreach-matrix")
    assert max(map(len, lines)) <= COLUMNS
    text = "\n".join(lines)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert all(f"| {name} |" in text for name in stages)


def test_the_headline_numbers_fit() -> None:
    lines = printed("metrics", "show")
    assert len(lines) == 2
    assert max(map(len, lines)) <= COLUMNS


def test_the_first_screen_of_experiments_holds_every_headline_number() -> None:
    names = printed("metrics", "show")[0].split()[1:]
    header = printed("exp", "show", "--csv")[0].split(",")
    assert set(header[5 : 5 + len(names)]) == set(names), "parameters come behind them"
    shown = ["Experiment", "Created", *names]
    assert sum(len(name) + 3 for name in shown) <= COLUMNS
