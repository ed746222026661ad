"""What a source holds, whichever layout it is in: rows of names and values, with nothing decoded yet.

Folders and zips (where there is one folder at the top, that is looked into):

- the Hugging Face imagefolder: `metadata.csv` or `metadata.jsonl`, pictures named in column `file_name` or `image`,
  hints in `conditioning_image_file_name` or `conditioning_image`;
- fill50k's `prompt.json`: lines of `source` (the hint), `target` (the image) and `prompt`;
- Parquet files as the hub has them, and folders written by `Dataset.save_to_disk`;
- pictures with captions in text files of the same name, and pictures in one folder per class.

What holds several splits, as folders or Parquet files called `train`, `test` and the like, is asked for one of them as
`<path>@<split>`. `hub:<id>[/<configuration>][@<split>]` is read through `datasets`. Files that belong to no layout are
named in a warning, but for those that explain the set.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from splitlab.core.errors import InputError, brief
from splitlab.data.files import Files, open_files
from splitlab.data.metadata import read_csv, read_jsonl, read_text
from splitlab.data.pictures import SUFFIXES

METADATA = ("metadata.csv", "metadata.jsonl")
TABLES = (*METADATA, "prompt.json")
FILL50K = {"target": "image", "source": "conditioning_image", "prompt": "text"}
SPLIT_NAMES = (
    *("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"),
    *("private", "public", "heldout"),
)
UNREAD = (
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr", ".dcm", ".npy"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
"""Suffixes of pictures that are not read here: a set of pictures would silently lack them."""

EXPLAINING = re.compile(
    r"(?i)(.*/)?((readme|licen[cs]e|citation|datasheet|dataset_infos?)[^/]*|[^/.]+|.*\.(md|html|yaml|bib|py|pdf))"
)
"""Files that explain a set and are no part of it."""

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\b.*")
"""A Parquet file as the hub names it."""

PICTURE_COLUMNS = ("file_name", "image_file_name", "image")
"""Where a table may name the picture, in the order of preference."""

LAYOUT = (
    "expected metadata.csv or metadata.jsonl with the columns file_name and text (and conditioning_image_file_name "
    "where hints are needed) beside the images, or one of the other layouts in splitlab.data.layouts"
)


@runtime_checkable
class Rows(Protocol):
    """Rows by number; a list, an Arrow table, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Listing:
    """The rows of a source.

    Attributes:
        name: what the source is called in messages.
        columns: the names of its columns.
        rows: values by column; pictures as `read` takes them.
        place: `(index of a row) -> where it stands`, for messages.
        read: `(value of a picture) -> (its name, its bytes)`; raises InputError.
        classes: per column of class numbers, the names of the classes.
    """

    name: str
    columns: tuple[str, ...]
    rows: Rows
    place: Callable[[int], str]
    read: Callable[[Any], tuple[str, bytes]]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def open_listing(source: str, *, image_column: str = "") -> Listing:
    """List the rows of a folder, zip, Parquet file or hub data set.

    Args:
        source: a path, `<path>@<split>`, or `hub:<id>[@<split>]`.
        image_column: the column that names the picture, where it is none of `PICTURE_COLUMNS`.

    Raises:
        InputError: it is missing, damaged, empty, of no known layout, or has several splits and none is named.
    """
    if source.startswith("hub:"):
        return _hub(source)
    path, split = split_off(source)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    files, split = _inside(open_files(path), split)
    wanted = (image_column,) if image_column else PICTURE_COLUMNS
    found = [name for name in METADATA if name in files.names]
    if len(found) > 1:
        raise InputError(f"{path}: both {' and '.join(found)}, which need not agree; keep one of them elsewhere")
    if found:
        return _table(source, files, found[0], wanted)
    if "prompt.json" in files.names:
        return _table(source, files, "prompt.json", wanted)
    parquet = [name for name in files.names if name.lower().endswith(".parquet")]
    if other := [name for name in files.names if name.lower().startswith("metadata") and name not in parquet]:
        raise InputError(f"{path}: {other[0]} is not read; the table is called {' or '.join(METADATA)}")
    if parquet:
        return _parquet(source, files, parquet, split, whole=files.path == path)
    if further := sorted(name for name in files.names if PurePosixPath(name).name in TABLES):
        folder = PurePosixPath(further[0]).parent
        raise InputError(f"{path}: its table {further[0]} is further down: name the folder, as in {path / folder}")
    return _pictures(source, files)


def split_off(source: str, root: Path = Path()) -> tuple[Path, str]:
    """Return the path of a source, relative to `root`, and the split that is named behind it, "" if none is.

    Raises:
        InputError: no path can be called that.
    """
    if not source.strip():
        raise InputError("no data set is named: give a folder, zip or Parquet file, or hub:<id>")
    path, _, split = source.rpartition("@")
    try:
        whole = root / Path(source).expanduser()
        whole.resolve()  # raises where `exists` keeps quiet
        return (whole, "") if whole.exists() or not path else (root / Path(path).expanduser(), split)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a character that names cannot have, no such user
        raise InputError(f"{source!r:.200} can be no path ({error!s:.100})") from None


def _inside(files: Files, split: str) -> tuple[Files, str]:
    """Look into the only folder at the top, and into that of the split; return the split if it is still to be found."""
    while len(files.folders) == 1 and all("/" in name or EXPLAINING.fullmatch(name) for name in files.names):
        folder = files.folders[0]
        if folder.lower() == split.lower():
            split = ""
        elif split and folder.lower() in SPLIT_NAMES:
            break
        files = files.below(folder)
    folders = {name.lower(): name for name in files.folders}
    if split.lower() in folders:
        return _inside(files.below(folders[split.lower()]), "")
    has_rows = any(name in files.names for name in TABLES)
    named = [name for name in files.folders if name.lower() in SPLIT_NAMES]
    parquet = any(name.lower().endswith(".parquet") for name in files.names)
    if split and not parquet:
        raise InputError(f"{files.path}: no split {split!r}; there: {', '.join(files.folders) or 'no folders'}")
    if len(named) > 1 and not has_rows and not parquet:
        raise InputError(_which(files.path, named))
    return files, split


def _which(path: Path, splits: Sequence[str], wanted: str = "") -> str:
    if list(splits) == [""]:
        return f"{path}: no split {wanted!r}: its files name no splits; leave @{wanted} out"
    problem = f"no split {wanted!r}; " if wanted else ""
    return f"{path}: {problem}it has the splits {', '.join(splits)}; name one, as in {path}@{splits[0]}"


def _table(source: str, files: Files, name: str, wanted: Sequence[str]) -> Listing:
    """List the rows of a metadata table."""
    try:
        text = read_text(files.read(name))
        rows = read_csv(text, wanted) if name.endswith(".csv") else read_jsonl(text)
    except InputError as error:
        raise InputError(f"{files.path}: {name}: {error}") from None
    values = [row for _, row in rows]
    if name == "prompt.json":
        values = [{FILL50K.get(key, key): value for key, value in row.items()} for row in values]
    return Listing(
        name=source,
        columns=tuple(dict.fromkeys(key for row in values for key in row)),
        rows=values,
        place=lambda index: f"row {index} (line {rows[index][0]} of {name})",
        read=lambda value: _file(files, value),
    )


def _file(files: Files, value: Any) -> tuple[str, bytes]:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"the name of a file is needed, not {value!r}")
    return value, files.read(value)


def _pictures(source: str, files: Files) -> Listing:
    """List pictures without a table: captions may stand beside them, and the folder they are in may be their class."""
    pictures = sorted(name for name in files.names if PurePosixPath(name).suffix.lower() in SUFFIXES)
    if unread := sorted(name for name in files.names if PurePosixPath(name).suffix.lower() in UNREAD):
        raise InputError(f"{files.path}: {unread[0]} is of a kind that is not read here; convert it to PNG or JPEG")
    if not pictures:
        there = ", ".join(sorted(files.names)[:5]) or "it is empty"
        raise InputError(f"{files.path}: no pictures and no metadata ({there}); {LAYOUT}")
    texts = {name[:-4]: name for name in files.names if name.lower().endswith(".txt")}
    captions = {name: texts.get(name[: -len(PurePosixPath(name).suffix)]) for name in pictures}
    if bare := [name for name, caption in captions.items() if caption is None]:
        if len(bare) < len(pictures):
            raise InputError(
                f"{files.path}: {len(pictures) - len(bare)} pictures have a caption in a text file beside them, "
                f"{len(bare)} have none, the first {bare[0]}; give each its caption"
            )
        captions = {}
    _name_unread(files, {*pictures, *captions.values()})
    rows = []
    for name in pictures:
        row: dict[str, Any] = {"image": name}
        if "/" in name:
            row["label"] = PurePosixPath(name).parent.name
        if caption := captions.get(name):
            row["text"] = _caption(files, caption)
        rows.append(row)
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Listing(source, columns, rows, lambda index: f"row {index}", lambda value: _file(files, value))


def _name_unread(files: Files, read: Set[str | None]) -> None:
    """Say which files are not read: among them may be captions, or the captions of pictures that are gone."""
    if unread := sorted(name for name in files.names if name not in read and not EXPLAINING.fullmatch(name)):
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        warnings.warn(
            f"{files.path}: of no use here and not read: {', '.join(unread[:3])}{more}; captions stand in "
            f"{' or '.join(METADATA)}, or in a text file beside each picture, called as it is",
            stacklevel=5,
        )


def _caption(files: Files, name: str) -> str:
    try:
        return read_text(files.read(name)).strip()
    except InputError as error:
        raise InputError(f"{files.path}: the caption {name}: {error}") from None


def _parquet(source: str, files: Files, names: Sequence[str], split: str, *, whole: bool) -> Listing:
    """List the rows of Parquet files, in the order of their names; `whole`: no shard of theirs may be missing."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = _chosen(files.path, names, split)
    if len(folders := sorted({str(PurePosixPath(name).parent) for name in chosen})) > 1:
        raise InputError(f"{files.path}: Parquet files in several folders, {', '.join(folders)}; name one folder")
    if whole:
        _refuse_lost_shards(files.path, chosen)
    try:
        table = pa.concat_tables([pq.read_table(pa.BufferReader(files.read(name))) for name in chosen])
        classes = _classes(datasets.Features.from_arrow_schema(table.schema))
    except InputError:
        raise
    except Exception as error:  # pyarrow raises many types for damaged files
        raise InputError(
            f"{files.path}: {', '.join(chosen)} cannot be read ({brief(error)}); restore or mend it"
        ) from None
    return Listing(
        name=source,
        columns=tuple(table.column_names),
        rows=_ArrowRows(table),
        place=lambda index: f"row {index}",
        read=lambda value: _file(files, value) if isinstance(value, str) else _stored(value, files.read),
        classes=classes,
    )


def _chosen(path: Path, names: Sequence[str], split: str) -> list[str]:
    """Return which of the Parquet files make up a split; "": the only one."""
    splits: dict[str, list[str]] = {}
    for name in sorted(names):
        splits.setdefault(_split_of(name), []).append(name)
    if len(splits) > 1:
        for name in splits.pop("", []):  # beside splits, a file that names none is one
            splits.setdefault(PurePosixPath(name).stem, []).append(name)
    if (split and split not in splits) or (not split and len(splits) > 1):
        raise InputError(_which(path, list(splits), split))
    return splits[split] if split else next(iter(splits.values()))


def _split_of(name: str) -> str:
    """Return the split that a Parquet file belongs to, by its own name or its folder's; "" if neither tells."""
    path = PurePosixPath(name)
    shard = SHARD.fullmatch(path.name)
    for part in (shard["split"] if shard else path.stem, path.parent.name):
        if known := [word for word in re.split(r"[\W\d_]+", part.lower()) if word in SPLIT_NAMES]:
            return known[0]
    return shard["split"] if shard else ""


def _refuse_lost_shards(path: Path, names: Sequence[str]) -> None:
    shards = [shard for name in names if (shard := SHARD.fullmatch(name))]
    for (split, total), there in itertools.groupby(shards, lambda shard: (shard["split"], shard["total"])):
        numbers = {int(shard["number"]) for shard in there}
        if lost := [number for number in range(int(total)) if number not in numbers]:
            raise InputError(
                f"{path}: {len(lost)} of the {int(total)} shards of {split} are missing, the first "
                f"{split}-{lost[0]:05d}-of-{total}; get them as well, or name a file"
            )


class _ArrowRows:
    """The rows of an Arrow table, each made when it is asked for."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: self._table.column(name)[index].as_py() for name in self._table.column_names}


def _stored(value: Any, read: Callable[[str], bytes]) -> tuple[str, bytes]:
    """Return name and content of a picture as Arrow tables hold it: its bytes, or a record of bytes and path."""
    name, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (None, value)
    if content is None and isinstance(name, str):
        try:
            content = read(name)
        except OSError as error:
            raise InputError(f"{name:.200} cannot be read ({error.strerror}); restore the file") from None
    if not isinstance(content, bytes):
        raise InputError(f"it holds no image, but {str(value)[:100]!r}; name an image column")
    return str(name or ""), content


def _classes(features: Any) -> dict[str, tuple[str, ...]]:
    return {name: tuple(kind.names) for name, kind in features.items() if hasattr(kind, "names")}


def _hub(source: str) -> Listing:
    import datasets

    repository, _, split = source.removeprefix("hub:").partition("@")
    owner, _, rest = repository.partition("/")
    name, _, configuration = rest.partition("/")
    if not owner:
        raise InputError(f"{source}: no hub id; write hub:<owner>/<name>, and @<split> behind it")
    try:
        rows = datasets.load_dataset(
            *filter(None, (f"{owner}/{name}".removesuffix("/"), configuration)), split=split or "train"
        )
    except Exception as error:  # datasets raises many types, from network to parsing
        raise InputError(
            f"{source}: cannot be loaded ({brief(error)}); check the name, the split and the network. An entry of the "
            "section datasets says which are meant: hub:<owner>/<name>/<configuration>@<split>"
        ) from None
    return _dataset(source, rows)


def _saved(path: Path, split: str) -> Listing:
    """List the rows of a folder written by `save_to_disk`, of a `Dataset` or one split of a `DatasetDict`."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        raise InputError(f"{path}: cannot be loaded ({brief(error)}); restore the folder") from None
    splits = saved if isinstance(saved, dict) else {str(saved.split or ""): saved}
    if (split and split not in splits) or (not split and len(splits) != 1):
        raise InputError(_which(path, list(splits), split))
    return _dataset(str(path), splits[split] if split else next(iter(splits.values())))


def _dataset(source: str, rows: Any) -> Listing:
    """List the rows of a `datasets.Dataset`."""
    import datasets

    for name, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return Listing(
        name=source,
        columns=tuple(rows.column_names),
        rows=rows,
        place=lambda index: f"row {index}",
        read=lambda value: _stored(value, lambda name: Path(name).read_bytes()),
        classes=_classes(rows.features),
    )
