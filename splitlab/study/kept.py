"""What was computed before is kept below the cache, under a digest of all that it follows from, code included."""

import hashlib
import os
import shutil
from functools import cache
from pathlib import Path

from splitlab.data.image_set import digest

PACKAGE = Path(__file__).resolve().parent.parent
SHARED = ("core", "data", "diffusion", "privacy")
"""The rooms below all three systems."""


@cache
def code_digest(*places: str) -> str:
    """Return the digest of the code of some rooms or modules of the package, and of the rooms below all systems."""
    folders = [PACKAGE / place for place in (*SHARED, *places)]
    files = [path for place in folders for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return digest({path.relative_to(PACKAGE).as_posix(): file_digest(path) for path in files})


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hand_out(kept: Path, out: Path) -> None:
    """Put all files of the folder `kept` into `out` as well: as links where the disk has them, which take no room."""
    for path in sorted(path for path in kept.rglob("*") if path.is_file()):
        target = out / path.relative_to(kept)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copy2(path, target)
