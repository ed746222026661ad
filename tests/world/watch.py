"""Which files were opened, by whatever means: the kernel says so (inotify), not Python, whose hooks libraries evade."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_ACCESS, IN_OPEN, IN_ISDIR, IN_Q_OVERFLOW = 0x1, 0x20, 0x40000000, 0x4000
_HEAD = struct.Struct("iIII")


@contextmanager
def watched(*folders: Path) -> Iterator[set[Path]]:
    """Yield a set that holds, once the block is left, every file below `folders` that any process opened or read."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    opened: set[Path] = set()
    try:
        places = [place for folder in folders for place in (folder, *folder.rglob("*")) if place.is_dir()]
        names = {libc.inotify_add_watch(descriptor, os.fsencode(place), IN_OPEN | IN_ACCESS): place for place in places}
        assert len(names) == len(places) > 0
        assert min(names) > 0, os.strerror(ctypes.get_errno())
        yield opened
        opened |= set(_events(descriptor, names))
    finally:
        os.close(descriptor)


def _events(descriptor: int, names: dict[int, Path]) -> Iterator[Path]:
    while True:
        try:
            buffer = os.read(descriptor, 1 << 20)
        except BlockingIOError:
            return
        while buffer:
            watch, mask, _, size = _HEAD.unpack_from(buffer)
            assert not mask & IN_Q_OVERFLOW, "more was opened than was noted down"
            name, buffer = os.fsdecode(buffer[_HEAD.size :][:size].rstrip(b"\0")), buffer[_HEAD.size + size :]
            if not mask & IN_ISDIR:
                yield names[watch] / name
