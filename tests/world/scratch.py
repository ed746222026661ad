"""Checkouts of their own, as a stranger would have them, for tests of make, git and DVC."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from splitlab.core.paths import ROOT

_IDENTITY = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")


def checkout(folder: Path, *, git: bool = True) -> Path:
    """Copy this checkout's files, committed or not, to `folder`; `git`: as one commit of a repository of their own."""
    listed = _git(ROOT, "ls-files", "-co", "--exclude-standard", "-z")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if git:
        _git(folder, "init", "-q")
        _git(folder, "add", "-A")
        _git(folder, *_IDENTITY, "commit", "-qm", "all")
    (folder / ".venv").mkdir()
    (folder / ".venv/.installed").write_text(f"{folder.resolve()}\n")  # the environment of the tests will do
    return folder


def _git(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True)


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of somebody without an identity for git, whose home cannot be written."""
    home = folder.parent / f"home of {folder.name}"
    home.mkdir(mode=0o500, exist_ok=True)
    kept = ("LANG", "TMPDIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "HOME": str(home),
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc"),
    }


def run(folder: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a checkout with the rights of its owner; root's own are put down."""
    root = os.geteuid() == 0 and shutil.which("setpriv") is not None
    words = [*(("setpriv", "--bounding-set=-all", "--inh-caps=-all") if root else ()), *command]
    environ = environment(folder) | variables
    return subprocess.run(words, cwd=folder, env=environ, check=False, capture_output=True, text=True)


def changed(folder: Path) -> set[str]:
    """Return what `git status` shows, but dvc.lock, which is renewed whenever a module has changed."""
    lines = _git(folder, "status", "--porcelain").stdout.splitlines()
    return {line[3:] for line in lines} - {"dvc.lock"}


def tree(folder: Path) -> dict[str, bytes]:
    """Return file -> content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
