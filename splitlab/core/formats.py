"""What a file is, told by its first bytes: for errors that say what was given, and how to convert it. Runs no code."""

import zipfile
from pathlib import Path

UNPICKLED = (
    "splitlab runs no code from files: where you trust it, open it in PyTorch with weights_only=True "
    "and write its tensors with safetensors.torch.save_file"
)
PICKLED = f"a pickle, as old versions of torch.save wrote; {UNPICKLED}"
UNPACK = "unpack it and name the file inside"
FETCH = "the file itself was never fetched: run `git lfs pull`, or download it again"

MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x93NUMPY", "npy", "a single NumPy array (.npy); write named arrays with safetensors.numpy.save_file"),
    (b"\x89HDF\r\n\x1a\n", "hdf5", "an HDF5 file; read its arrays with h5py and write them with safetensors"),
    (b"\x1f\x8b", "gzip", f"compressed with gzip; {UNPACK}"),
    (b"BZh", "bzip2", f"compressed with bzip2; {UNPACK}"),
    (b"\xfd7zXZ\0", "xz", f"compressed with xz; {UNPACK}"),
    (b"\x28\xb5\x2f\xfd", "zstd", f"compressed with zstd; {UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", "7z", f"a 7z archive; {UNPACK}"),
    (b"Rar!", "rar", f"a RAR archive; {UNPACK}"),
    (b"version https://git-lfs", "lfs pointer", f"a Git LFS pointer; {FETCH}"),
    (b"/annex/objects/", "annex pointer", "a git-annex pointer; run `git annex get` to fetch the file itself"),
    (b"GGUF", "gguf", "a GGUF model; name the safetensors weights that it was converted from"),
    (b"PAR1", "parquet", "a Parquet table, not tensors; name the file that holds the tensors"),
    (b"ARROW1", "arrow", "an Arrow table, not tensors; name the file that holds the tensors"),
    (b"SQLite format 3", "sqlite", "an SQLite database, not tensors; name the file that holds the tensors"),
    (b"\x89PNG", "png", "a PNG image, not tensors; name the file that holds the tensors"),
    (b"\xff\xd8\xff", "jpeg", "a JPEG image, not tensors; name the file that holds the tensors"),
    (b"%PDF", "pdf", "a PDF document, not tensors; name the file that holds the tensors"),
    *((b"\x80" + bytes([protocol]), "pickle", PICKLED) for protocol in (2, 3, 4, 5)),
)

ARCHIVES = {
    "npz": "a NumPy archive (.npz); write its arrays with safetensors.numpy.save_file",
    "torch": f"a pickle in a zip, as torch.save writes; {UNPICKLED}",
    "zip": f"a zip archive; {UNPACK}",
}


def file_kind(path: Path) -> str:
    """Tell what kind of file `path` is, e.g. "safetensors", "npz", "torch" (a pickle in a zip), "pickle", "empty".

    A file whose start looks like safetensors may still be damaged further on. "unknown": nothing known by its bytes.

    Raises:
        OSError: the file cannot be read.
    """
    return _recognise(path)[0]


def describe_file(path: Path) -> str:
    """Say in words what `path` is and, where it holds no safetensors, what to do: the end of an error's sentence.

    Raises:
        OSError: the file cannot be read.
    """
    return _recognise(path)[1]


def _recognise(path: Path) -> tuple[str, str]:
    if path.is_dir():
        return "folder", "a folder; name a file in it"
    size = path.stat().st_size
    if not size:
        return "empty", "empty; copy or download it again"
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK"):
        kind = _archive(path)
        return kind, ARCHIVES[kind]
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" or (start[8:9].isspace() and length < 100_000_000):
        return "safetensors", _whole(length, size)
    for magic, kind, words in MAGIC:
        if start.startswith(magic):
            return kind, words
    if start[257:262] == b"ustar":
        return "tar", f"a tar archive; {UNPACK}"
    return _text(start)


def _archive(path: Path) -> str:
    """Tell what a zip holds by its entries' names; none of them is opened."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return "zip"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "torch"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"


def _whole(length: int, size: int) -> str:
    if 8 + length > size:
        return f"cut short: its header alone should have {length} bytes, the file has {size}; copy or download it again"
    return "a safetensors file whose header does not fit its content; copy or download it again"


def _text(start: bytes) -> tuple[str, str]:
    try:
        text = start.decode("utf-8-sig").lstrip().lower()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # else a character is cut in two where the sample ends
            return "unknown", "of no kind that is known here; safetensors is what is read"
        text = start[: error.start].decode("utf-8-sig").lstrip().lower()
    if text.startswith(("<!doctype html", "<html")):
        return "html", "an HTML page, as servers send in place of a file; download the file itself"
    if text.startswith("<"):
        return "xml", "XML text, not tensors; name the file that holds the tensors"
    if text.startswith(("{", "[")):
        index = '"weight_map"' in text
        words = "an index of shards; name the folder it is in" if index else "name the file that holds the tensors"
        return "json", f"JSON text, not tensors; {words}"
    if "\0" in text:
        return "unknown", "of no kind that is known here; safetensors is what is read"
    return "text", "plain text, not tensors; name the file that holds the tensors"
