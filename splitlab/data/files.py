"""The files of a folder or a zip, alike: names with forward slashes, and contents; nothing outside can be named."""

import os
import posixpath
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from splitlab.core.errors import InputError
from splitlab.data.pictures import SUFFIXES

LARGEST = 2**30
"""Bytes that one file of a data set may have when unpacked: more is no picture or table, but a decompression bomb."""

SYSTEM = {"__macosx", "$recycle.bin", "system volume information", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini"}
"""What macOS, Windows and network disks put beside people's files, thumbnails among it; in lower case."""

POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Files:
    """Files by name; those that an operating system adds are left out.

    Attributes:
        path: the folder or zip.
        names: name relative to `top` -> its name as stored.
        content: `(name as stored) -> bytes`.
        top: the folder in it that is looked into, with a slash behind; or "".
    """

    path: Path
    names: Mapping[str, str]
    content: Callable[[str], bytes]
    top: str = ""

    @property
    def folders(self) -> list[str]:
        """The names of the folders in it, sorted."""
        return sorted({name.partition("/")[0] for name in self.names if "/" in name})

    def below(self, folder: str) -> "Files":
        """Return the files of one of the folders in it."""
        inside = {name.removeprefix(f"{folder}/"): stored for name, stored in self.names.items()}
        names = {name: stored for name, stored in inside.items() if f"{folder}/{name}" in self.names}
        return Files(self.path, names, self.content, f"{self.top}{folder}/")

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            InputError: there is no such file, it lies outside, or it cannot be read. The message names the file alone.
        """
        clean = _clean(name)
        if clean.startswith(("../", "/")) or clean == ".." or clean[1:3] == ":/":
            raise InputError(f"{name!r} leads out of the data set; name files inside it")
        if clean not in self.names:
            alike = [other for other in self.names if other.lower() == clean.lower()]
            advice = (
                f"but {alike[0]} is there: names must agree in upper and lower case" if alike else "restore the file"
            )
            if name.startswith(("http:", "https:")):
                advice = "addresses are not fetched: put the file into the data set, and its name into the table"
            raise InputError(f"{name:.200} is missing; {advice}")
        try:
            content = self.content(self.names[clean])
        except InputError:
            raise
        except Exception as error:  # zip and file readers raise many types for damaged files
            raise InputError(f"{name} cannot be read ({error}); restore or mend it") from None
        if content.startswith(POINTER):
            raise InputError(f"{name} is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`")
        return content


def open_files(path: Path) -> Files:
    """List a folder, a zip, or a single file (by its own name). Nothing is unpacked.

    Raises:
        InputError: it is missing, or a damaged zip.
    """
    if path.is_dir():
        return Files(path, _named(path, _walk(path)), lambda name: _regular(path / name).read_bytes())
    if not path.is_file():
        raise InputError(f"{path}: no such data set; `dvc pull` fetches the shipped ones")
    with path.open("rb") as file:
        parquet = file.read(4) == b"PAR1" or path.suffix.lower() == ".parquet"  # in caches, files have no suffix
    if parquet:
        return Files(path.parent, {f"{path.stem}.parquet": path.name}, lambda name: (path.parent / name).read_bytes())
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises many types for damaged archives
        if path.suffix.lower() in (*SUFFIXES, ".csv", ".jsonl", ".json", ".txt"):
            raise InputError(f"{path}: one file of a data set; name the folder that holds it, {path.parent}") from None
        raise InputError(
            f"{path}: not a zip file ({error}); give a folder, zip or Parquet file. `dvc pull` restores shipped ones"
        ) from None
    return Files(
        path, _named(path, (name for name in archive.namelist() if not name.endswith("/"))), _unpacker(archive)
    )


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path.name} is no file that can be read; restore it")
    return path


def _unpacker(archive: zipfile.ZipFile) -> Callable[[str], bytes]:
    def content(name: str) -> bytes:
        size = archive.getinfo(name).file_size
        if size > LARGEST:
            raise InputError(f"{archive.filename}: {name} has {size} bytes unpacked, more than {LARGEST}")
        return archive.read(name)

    return content


def _walk(folder: Path) -> Iterator[str]:
    """Yield the names of all files, through links to folders, but into no folder twice."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/") for name in files)


def _named(path: Path, stored: Iterator[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in stored:
        clean = _clean(name)
        if _is_hidden(clean):
            continue
        if clean.startswith(("../", "/")) or clean in names:
            problem = "given twice" if clean in names else "outside of it"
            raise InputError(f"{path}: it holds {name!r}, {problem}; pack it again")
        names[clean] = name
    return names


def _clean(name: str) -> str:
    """Return a name as others write it: forward slashes, no ./, composed letters (macOS stores é as two)."""
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


def _is_hidden(name: str) -> bool:
    parts = name.removeprefix("../").lower().split("/")
    return not SYSTEM.isdisjoint(parts) or any(part.startswith(".") and part != ".." for part in parts)
