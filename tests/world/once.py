"""What is costly to make is made once for all processes of a test session."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Let `make` fill `folder`, unless another process of this test session has; return it."""
    whole = folder.parent / f"{folder.name}.whole"
    with FileLock(f"{folder}.lock"):
        if not whole.exists():
            make(folder)
            whole.touch()
    return folder
