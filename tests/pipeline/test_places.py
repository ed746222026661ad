"""A checkout wherever people put it: odd paths, no git, no writable home, no room, no network, others at work."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from world import scratch

from pipeline import checkout
from splitlab.core.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's list of the files"),
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh checkout in a folder of a difficult name; no test changes it for good."""
    return scratch.checkout(tmp_path_factory.mktemp("places") / "it's my Ordner, ü")


@pytest.fixture(scope="module")
def pulled(pristine: Path) -> Path:
    made = scratch.run(pristine, "make", "data")
    assert made.returncode == 0, made.stdout + made.stderr
    return pristine


def test_set_up_and_a_stage_in_an_odd_path_with_a_home_that_cannot_be_written(pulled: Path) -> None:
    home = str(pulled / ".cache/home")  # where make takes it
    assert (pulled / "data/private/shapes.zip").exists()
    assert (pulled / "models/base/model_index.json").exists()
    for command in (["dvc", "repro", "inputs"], ["dvc", "repro", "--force", "--single-item", "evaluate-dp"]):
        ran = scratch.run(pulled, *command, HOME=home)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert scratch.changed(pulled) == set()


def test_an_unwritable_home_is_replaced_and_a_writable_one_is_not(pulled: Path, tmp_path: Path) -> None:
    (tmp_path / "tell.mk").write_text("include Makefile\ntell:\n\t@echo $$HOME\n")

    def home(**variables: str) -> str:
        return scratch.run(pulled, "make", "-s", "-f", str(tmp_path / "tell.mk"), "tell", **variables).stdout.strip()

    assert home() == home(HOME="/nowhere") == str(pulled / ".cache/home")
    assert home(HOME=str(tmp_path)) == str(tmp_path)
    (tmp_path / ".cache").mkdir(mode=0o500)
    assert home(HOME=str(tmp_path)) == str(pulled / ".cache/home")


def test_a_download_without_git_works_and_becomes_a_repository_when_asked(tmp_path: Path) -> None:
    folder = scratch.checkout(tmp_path / "download", git=False)
    made = scratch.run(folder, "make", "data")
    assert made.returncode == 0, made.stderr
    ran = scratch.run(folder, "dvc", "repro", "inputs")
    assert ran.returncode == 0, ran.stderr
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    assert scratch.run(folder, "make", "data").returncode == 0
    assert "no_scm" not in (folder / ".dvc/config.local").read_text()


def test_files_in_data_are_one_error_of_make_and_safe_from_dvc(pulled: Path) -> None:
    mine = pulled / "data/private/mine"
    mine.mkdir()
    try:
        (mine / "000.png").write_bytes(b"private pixels")
        (mine / "metadata.csv").write_text("file_name\n000.png\n")
        store = set(scratch.tree(pulled / "dvcstore"))
        made = scratch.run(pulled, "make", "report")
        assert made.returncode != 0
        assert "data/private/mine/000.png is no shipped file (and 1 more)" in made.stderr
        assert "Nothing was changed, copied or deleted" in made.stderr
        assert "section datasets of params.yaml" in made.stderr
        assert "--force" not in made.stdout + made.stderr
        for command in ("dvc pull data.dvc pretrain", "dvc repro data.dvc inputs", "dvc push"):
            ran = scratch.run(pulled, *command.split())
            assert ran.returncode == 0, ran.stderr
        assert scratch.tree(mine)["000.png"] == b"private pixels"
        assert set(scratch.tree(pulled / "dvcstore")) == store
        assert b"private pixels" not in scratch.tree(pulled / ".dvc").values()
        assert scratch.changed(pulled) == set()
        stale = scratch.run(pulled, "dvc", "status", "data.dvc", "pretrain", "cost", "dp").stdout
        assert "data" not in stale.replace("inputs/data", "").replace("datasets.py", "").replace("data.py", "")
    finally:
        shutil.rmtree(mine)


def test_a_changed_shipped_file_stays_and_is_never_pushed(pulled: Path) -> None:
    path = pulled / "data/heldout/digits.zip"
    shipped = path.read_bytes()
    try:
        path.unlink()
        path.write_bytes(b"my own")
        made = scratch.run(pulled, "make", "data")
        assert made.returncode != 0
        assert "data/heldout/digits.zip is not as it was shipped" in made.stderr
        assert path.read_bytes() == b"my own"
        store = set(scratch.tree(pulled / "dvcstore"))
        for command in (["dvc", "repro", "data.dvc"], ["dvc", "push"]):
            assert scratch.run(pulled, *command).returncode == 0
        assert set(scratch.tree(pulled / "dvcstore")) == store
    finally:
        path.unlink()
        path.write_bytes(shipped)
        subprocess.run(["git", "checkout", "-q", "data.dvc"], cwd=pulled, check=True)


def test_an_own_model_in_the_place_of_the_shipped_one_stays(pulled: Path) -> None:
    path = pulled / "models/base/unet/config.json"
    shipped = path.read_bytes()
    path.unlink()
    path.write_bytes(b"{}")
    try:
        made = scratch.run(pulled, "make", "data")
        assert made.returncode != 0
        assert "models/base/unet/config.json is not as it was shipped" in made.stderr
        assert "base.source" in made.stderr
        assert path.read_bytes() == b"{}"
    finally:
        path.write_bytes(shipped)


def test_what_pip_complains_of_is_seen_and_ends_the_set_up(tmp_path: Path) -> None:
    folder = scratch.checkout(tmp_path / "no network", git=False)
    (folder / ".venv/.installed").unlink()
    made = scratch.run(folder, "make", "setup", PIP_NO_INDEX="1", PIP_CACHE_DIR=str(tmp_path / "pip"))
    assert made.returncode != 0
    assert "ERROR: " in made.stderr
    assert "setuptools" in made.stderr
    assert not (folder / ".venv/.installed").exists()


def test_an_environment_of_another_place_is_made_anew(pulled: Path) -> None:
    installed = pulled / ".venv/.installed"
    here = installed.read_text()
    assert "venv" not in scratch.run(pulled, "make", "-n", ".venv/.installed").stdout.replace(".venv/.installed", "")
    try:
        installed.write_text("/where/it/was/before\n")
        assert "python3 -m venv --clear .venv" in scratch.run(pulled, "make", "-n", ".venv/.installed").stdout
        installed.write_text("")  # of a version that did not say
        assert "python3" not in scratch.run(pulled, "make", "-n", ".venv/.installed").stdout
    finally:
        installed.write_text(here)


def test_two_reports_at_once_are_one_error(pulled: Path) -> None:
    with (pulled / ".cache/report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = scratch.run(pulled, "make", "report")
    assert made.returncode != 0
    assert "another 'make report' is at work in this folder" in made.stderr
    assert "pulling" not in made.stdout


def test_git_changes_no_byte_at_checkout_whatever_it_is_told(pristine: Path, tmp_path: Path) -> None:
    told = ["-c", "core.autocrlf=true", "-c", "core.eol=crlf"]
    subprocess.run(["git", *told, "clone", "-q", str(pristine), str(tmp_path / "windows")], check=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=pristine, check=True, capture_output=True, text=True).stdout
    names = [name for name in listed.split("\0") if name]
    assert len(names) > 200
    for name in names:
        assert (tmp_path / "windows" / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_no_tracked_text_has_carriage_returns() -> None:
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not [line for line in listed.splitlines() if "i/crlf" in line or "i/mixed" in line]


def test_a_full_disk_and_a_place_of_others_are_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checkout.room(0) is None
    assert "100000 GB are needed; make room" in str(checkout.room(1e5))
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written by this user; clone into a folder of your own" in str(checkout.room(0))
    assert checkout.main(["room", "0"]) == 1
