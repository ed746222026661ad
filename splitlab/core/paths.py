"""Where the project's files are, whatever directory a notebook was started in."""

import os
from pathlib import Path

ROOT = Path(os.environ.get("SPLITLAB_ROOT", Path(__file__).resolve().parents[2]))
"""The project root: the checkout this package was installed from (editable), or `$SPLITLAB_ROOT`."""

CACHE = ROOT / ".cache"
"""Content-addressed caches, and the checkpoints and secret keys of runs that have not ended."""


def resolve(path: str | Path) -> Path:
    """Return `path` unchanged if absolute, else relative to the project root; `~` is the user's home."""
    path = Path(os.path.expanduser(path))  # an unknown user's home stays as written
    return path if path.is_absolute() else ROOT / path
