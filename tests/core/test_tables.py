"""Tables that git keeps hold only what repeats; seconds and memory are beside them, and read where they are there."""

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from world.project import World

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.core.tables import MACHINE, read_table, read_timed, timed_path, write_table
from splitlab.report import page as report
from splitlab.report import update_report

MEASURED = re.compile(r"(^|_)(s|ms|seconds?|minutes|hours|mb|gb|rss|memory|time|wall|cpu)(_|$)", re.I)
"""Column names that say seconds or memory."""


def test_every_machine_column_is_known_by_its_name() -> None:
    assert all(MEASURED.search(name) for name in MACHINE)
    assert not any(MEASURED.search(name) for name in ("steps", "timestep_exact", "psnr_db", "n_seeds", "up_bytes"))


def test_no_tracked_table_has_a_column_of_seconds_or_memory() -> None:
    listed = subprocess.run(["git", "ls-files", "*.csv"], cwd=ROOT, capture_output=True, text=True, check=False)
    tables = listed.stdout.split() or [path.relative_to(ROOT) for path in (ROOT / "reports").glob("*/*.csv")]
    assert "reports/metrics/dp.csv" in map(str, tables)
    for table in tables:
        columns = pd.read_csv(ROOT / table, nrows=0).columns
        if {"date", "machine"} <= set(columns):  # what a benchmark measured one day on one machine; no stage makes it
            continue
        assert not [name for name in columns if MEASURED.search(name)], table


def test_stages_write_seconds_to_files_that_git_does_not_track(world: World) -> None:
    tables = sorted((world.root / "metrics").glob("*.csv"))
    assert {"training.csv", "split_attacks.csv", "gradient_attacks.csv", "dp.csv"} <= {path.name for path in tables}
    for path in tables:
        assert not [name for name in read_table(path, empty=True).columns if MEASURED.search(name)], path
    for name, column in (("training", "peak_rss_mb"), ("split_attacks", "cpu_s"), ("gradient_attacks", "cpu_s")):
        assert (read_timed(world.root / "metrics" / f"{name}.csv")[column].dropna() >= 0).any(), name
    for name in ("training.csv", "dp.csv"):
        place = timed_path(Path("reports/metrics") / name)
        ignored = subprocess.run(["git", "check-ignore", "--no-index", str(place)], cwd=ROOT, capture_output=True)
        assert ignored.returncode in (0, 128), f"{place} would be tracked"  # 128: there is no git here


def test_seconds_are_joined_to_the_rows_they_were_measured_for(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    table = pd.DataFrame({"attack": ["none", "b", "c"], "n": [1, 2, None], "cpu_s": [0.5, 1.5, 2.5], "ssim": 0.1})
    write_table(table, path)
    assert path.read_text().splitlines()[:2] == ["attack,n,ssim", "none,1.0,0.1"]
    assert read_timed(path)["cpu_s"].tolist() == [0.5, 1.5, 2.5]
    write = pd.read_csv(path, keep_default_na=False).iloc[::-1].replace("b", "other")
    write.to_csv(path, index=False)
    found = read_timed(path)
    assert found["cpu_s"].isna().tolist() == [False, True, False]
    assert found["cpu_s"].dropna().tolist() == [2.5, 0.5]
    timed_path(path).unlink()
    assert read_timed(path)[list(MACHINE)].isna().all(axis=None)


def test_a_table_of_before_keeps_the_seconds_it_has(tmp_path: Path) -> None:
    pd.DataFrame({"attack": ["a"], "cpu_s": [3.0]}).to_csv(tmp_path / "table.csv", index=False)
    assert read_timed(tmp_path / "table.csv")["cpu_s"].tolist() == [3.0]


def test_the_report_does_without_seconds(world: World, tmp_path: Path) -> None:
    updates = update_report.load_updates(world.root / "metrics", world.root / "figures-updates")
    assert "CPU s per image" in update_report.claims_table(updates).data
    assert "less CPU time" in update_report.conclusion(updates).data
    for path in (world.root / "metrics").glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    untimed = update_report.load_updates(tmp_path, world.root / "figures-updates")
    for text in (update_report.claims_table(untimed).data, update_report.conclusion(untimed).data):
        assert "CPU" not in text.replace("CPU s</th>", "")
        assert "nan" not in text
    material = report.load_material(**world.folders)
    assert "Measured on" in report.cost_table(material).data


def test_a_table_that_is_none_of_splitlabs_is_refused_by_its_columns(tmp_path: Path):
    path = tmp_path / "mine.csv"
    path.write_text("setting,notes\na,b\n")
    assert list(read_table(path, "setting")) == ["setting", "notes"]
    with pytest.raises(InputError, match=r"mine\.csv: it has no column attack, defences; name a folder"):
        read_table(path, "setting", "attack", "defences")


@pytest.mark.parametrize("content", [b"", b"\n", b"a,b\n1,2,3\n", b"\xff\xfe\0", b'a\n"open', b"\0" * 100])
def test_a_damaged_table_is_one_error(tmp_path: Path, content: bytes):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.csv: (damaged|it has no)"):
        read_table(tmp_path / "x.csv", "needed")
