"""Files and folders that appear whole or not at all, and take the place of nothing but splitlab's own."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT

MARKER = ".splitlab.json"
"""In a folder that splitlab wrote: who wrote it, and the SHA-256 of every file. What is not in it is not replaced."""

BYSTANDERS = (".gitignore", ".gitkeep", ".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that other tools leave in any folder: they are carried over to what replaces it."""

STALE_S = 24 * 3600.0
"""Seconds after which a half-written file has nobody who writes it."""

REMEDIES = {
    errno.ENOSPC: "the disk is full: free some disk space and run again",
    errno.EDQUOT: "the quota is used up: free some disk space and run again",
    errno.EFBIG: "a file may not be that large here: name a place on another disk, or raise the limit",
    errno.EROFS: "the disk is read-only: name another place",
    errno.EACCES: "permission is missing: name a place that you may write to",
    errno.EPERM: "permission is missing: name a place that you may write to",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ENOTDIR: "a part of its path is a file: name another place",
    errno.EEXIST: "a part of its path is a file: name another place",
    errno.EISDIR: "there is a folder of that name: give another name",
    errno.ELOOP: "its symbolic links lead in a circle: name another place",
}


def cannot_write(path: Path, error: Exception) -> InputError:
    """Return the error of a failed write; the safetensors library gives the system's number in its words only."""
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else 0
    remedy = REMEDIES.get(number or 0, "check that place and run again")
    return InputError(f"{path}: cannot be written ({error}); {remedy}; what was there before is intact")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write in the block, the system's or safetensors', into one error that names `path`."""
    if "\0" in str(path):
        raise InputError(f"{path!s:.200}: nothing can have this name; give another")
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Give a file to write that takes the place of `path` only once the block has ended without an error.

    Args:
        path: what is to appear, whole or not at all; an earlier file stays until then.
        private: only its owner may read it (mode 0600), from its first byte on.

    Raises:
        InputError: the disk is full, or the folder cannot be written; what was at `path` is still there.
    """
    partial = path.parent / f".partial-{uuid.uuid4().hex[:16]}.file"  # of one length, whatever the name; of one process
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear_stale(path.parent)
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            partial.chmod(mode)  # some writers replace the file by one of their own mode
            _to_disk(partial)
            os.replace(partial, path)
            _to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _clear_stale(folder: Path) -> None:
    """Remove what a killed process left half-written: no write takes as long as a day."""
    for left in folder.glob(".partial-" + "[0-9a-f]" * 16 + ".file"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; see `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _to_disk(path: Path) -> None:
    """Have the system write a file's or folder's content out before the next step relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every file system can do it for folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(path: Path, lock: Path, what: str) -> Iterator[None]:
    """Keep `path` for this process while the block runs; the system lets go of the lock when a process ends or dies.

    Args:
        path: what must not be used twice at once.
        lock: the file that stands for it; it is made, and stays.
        what: what the other process would be, e.g. "a run that writes it".

    Raises:
        InputError: another process, or thread, has it.
    """
    held = FileLock(lock, timeout=0)
    with writing(path):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except Timeout:
            raise InputError(f"{path}: {what} is in progress; wait until it has ended, or give another name") from None
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def whole_folder(path: str | Path, maker: str, *, apart: Mapping[str, Path] | None = None) -> Iterator[Path]:
    """Give a folder to fill that takes the place of `path` only once the block has ended without an error.

    All that can be refused is refused before the block begins, so that hours of work inside do not end in an error: an
    existing folder is replaced only if it is empty, or holds what the same `maker` wrote and nothing else. What appears
    in it meanwhile, or is changed there, is kept in a folder beside it.

    Args:
        path: the folder; if it is a symbolic link, what it points to.
        maker: who writes it, e.g. "train".
        apart: what must not lie in `path`, by the argument that names it.

    Raises:
        InputError: `path` holds other files, is no folder, belongs to others (home, checkout, working directory), is
            being written by another process, or cannot be written.
    """
    place = _place(path, apart or {})
    workshop = place.with_name(f".partial-{hashlib.sha256(place.name.encode()).hexdigest()[:16]}")
    with alone(place, workshop / "lock", "a run that writes it"):
        try:
            with writing(place):
                _recover(workshop, place)
                _check_replaceable(place, maker)
                (workshop / "new").mkdir()
                (workshop / "new").chmod(_mode(place, workshop / "new"))
            yield workshop / "new"
            with writing(place):
                _mark(workshop / "new", maker)
                _swap(workshop, place)
        except InputError as error:  # of a write in the block: people know the folder that they named
            raise InputError(str(error).replace(str(workshop / "new"), str(place))) from None
        finally:
            shutil.rmtree(workshop / "new", ignore_errors=True)
            if not (workshop / "old").exists():
                shutil.rmtree(workshop, ignore_errors=True)


def _mode(place: Path, new: Path) -> int:
    """Return the permissions of the folder that is replaced, else those of a new one: nothing opens to more people."""
    return stat.S_IMODE((place if place.exists() else new).stat().st_mode)


def discard(path: Path, maker: str) -> None:
    """Remove a folder that `maker` wrote, as far as nobody changed it or added to it.

    Raises:
        InputError: it is not such a folder.
    """
    _check_replaceable(path, maker)
    shutil.rmtree(path, ignore_errors=True)


def _place(path: str | Path, apart: Mapping[str, Path]) -> Path:
    """Return the folder that `path` names, links followed, if it may be made or replaced."""
    path = Path(path)
    try:
        with writing(path):
            place = path.expanduser().resolve()
            exists = place.exists()
            owners = {"home": Path.home(), "checkout": ROOT, "working directory": Path.cwd()}
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: no folder can have this name ({error}); give another") from None
    for owner, folder in owners.items():
        if folder.resolve().is_relative_to(place):
            raise InputError(f"{path}: the {owner} is here, and it stays; name a folder of its own for the output")
    for name, other in apart.items():
        if other.resolve().is_relative_to(place):
            raise InputError(f"{path}: {name} ({other}) lies in the folder to be written; name a place outside it")
    if exists and not place.is_dir():
        raise InputError(f"{path}: this is a file, and it stays; name a folder for the output")
    if exists and not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"{path}: permission is missing to write here; name a place that you may write to")
    if os.path.ismount(place):
        raise InputError(f"{path}: this is a mount point, which cannot be replaced whole; name a folder in it")
    return place


def _recover(workshop: Path, place: Path) -> None:
    """Clear away what a killed process left; an earlier output that it had already moved aside comes back."""
    shutil.rmtree(workshop / "new", ignore_errors=True)
    if (workshop / "old").exists():
        if place.exists():
            _dispose(workshop / "old", place)
        else:
            (workshop / "old").rename(place)


def _check_replaceable(place: Path, maker: str) -> None:
    """Refuse a folder that holds anything but what `maker` wrote."""
    names = sorted(_files(place))  # none, if there is no such folder
    if not names:
        return
    by, hashes = _marker(place)
    if by != maker:
        whose = f"it is an output of {by}" if by else f"it holds {_some(names)}, which splitlab did not write"
        raise InputError(f"{place}: {whose}; it stays as it is: name another folder for the output, or move this one")
    foreign = [name for name in names if not _ours(place, name, hashes)]
    if foreign:
        raise InputError(
            f"{place}: {_some(foreign)} was added or changed after splitlab wrote the folder; "
            "it stays as it is: name another folder for the output, or move this one"
        )


def _files(place: Path) -> Iterator[str]:
    """Yield the names of all in a folder that is neither a folder itself, nor the marker, nor a bystander."""
    for folder, folders, files in os.walk(place, onerror=_raise) if place.exists() else ():
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in (*files, *links):
            if name not in BYSTANDERS:
                inside = (Path(folder) / name).relative_to(place).as_posix()
                if inside != MARKER:
                    yield inside


def _raise(error: OSError) -> None:
    raise error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _marker(place: Path) -> tuple[str | None, dict[str, str]]:
    """Read who wrote a folder, and the digests of its files; (None, {}) if nothing tells."""
    try:
        content = json.loads((place / MARKER).read_text())
        return str(content["maker"]), dict(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, {}


def _mark(folder: Path, maker: str) -> None:
    hashes = {name: _sha256(folder / name) for name in _files(folder)}
    text = json.dumps({"maker": maker, "sha256": hashes}, indent=1, sort_keys=True)
    (folder / MARKER).write_text(text + "\n")
    for inside in (*hashes, MARKER):
        _to_disk(folder / inside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ours(place: Path, name: str, hashes: Mapping[str, str]) -> bool:
    path = place / name
    return name in hashes and path.is_file() and _sha256(path) == hashes[name]


def _swap(workshop: Path, place: Path) -> None:
    """Put the new folder in place of the old one, which is moved aside first; `_recover` mends a crash between."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(workshop / "old")
    (workshop / "new").rename(place)
    _to_disk(place.parent)
    if (workshop / "old").exists():
        _dispose(workshop / "old", place)


def _dispose(old: Path, place: Path) -> None:
    """Remove what splitlab wrote of a replaced folder; what others put there goes on beside or in the new one."""
    _, hashes = _marker(old)
    for name in list(_files(old)):
        if _ours(old, name, hashes):
            (old / name).unlink()
    left = list(_files(old))
    for bystander in [
        path for path in old.rglob("*") if path.name in BYSTANDERS and (path.is_symlink() or path.is_file())
    ]:
        target = place / bystander.relative_to(old)
        if target.parent.is_dir() and not os.path.lexists(target):
            bystander.rename(target)
        else:
            left.append(str(bystander.relative_to(old)))
    if left:
        kept = place.with_name(f"{place.name}-kept-{uuid.uuid4().hex[:6]}")
        old.rename(kept)
        print(f"{place}: {_some(left)}: added or changed during the run, now in {kept}")
    else:
        shutil.rmtree(old, ignore_errors=True)
