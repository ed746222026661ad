"""Data sets by name: the section `datasets` of params.yaml, which says where each split is and how it is read."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from splitlab.config import parse
from splitlab.data import ImageSet, digest, load
from splitlab.errors import InputError
from splitlab.paths import resolve

SPLITS = ("private", "public", "heldout")
"""The splits that every data set has; beside them it may have `private-test`."""


@dataclass(frozen=True)
class DatasetConfig:
    """One data set: an entry of the section `datasets`.

    A source is a folder or zip in imagefolder layout, or `hub:<id>[@<split>]`; paths are relative to the project root.

    Attributes:
        private: the source of the private split, which no attack may read.
        public: the source of the public split: what the adversary has.
        heldout: the source of the held-out split, which nothing is trained on.
        private_test: the source of further private samples, never trained on, that classifiers are tested on (S3).
        size: the height and width of the images, pixels; 0: the first image's.
        limit: read the first that many samples of each split only; 0: all.
    """

    private: str = ""
    public: str = ""
    heldout: str = ""
    private_test: str = ""
    size: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        """Refuse a set without its splits."""
        if missing := [split for split in SPLITS if not getattr(self, split)]:
            raise InputError(f"no {', '.join(missing)}: a data set needs a source for each of {', '.join(SPLITS)}")
        for one, other in itertools.combinations(SPLITS, 2):
            if self.source(one) == self.source(other):
                raise InputError(
                    f"the {one} and the {other} split are both {self.source(one)}: what an attacker may read and "
                    "what he may not must be different images; give each split its own source"
                )
        for name in ("size", "limit"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def source(self, split: str) -> str:
        """Return the source of `split`, a path absolute.

        Raises:
            InputError: the data set has no such split.
        """
        name = split.replace("-", "_")
        source = getattr(self, name) if name in (*SPLITS, "private_test") else ""
        if not source:
            there = [name for name in (*SPLITS, "private_test") if getattr(self, name)]
            raise InputError(f"no split {split!r}; there: {', '.join(there)}. Give {name}: a source, or use another")
        return source if source.startswith("hub:") else str(resolve(Path(source).expanduser()).resolve())


def dataset_config(name: str, params: Mapping[str, Any]) -> DatasetConfig:
    """Return what a data set's name stands for: an entry of `params["datasets"]`, or else a path or `hub:<id>`.

    The path of a folder stands for its three parts `private`, `public` and `heldout`, folders or zips; `hub:<id>` for
    the hub's splits of those names.

    Raises:
        InputError: there is no such entry, or the path does not have the three parts.
    """
    entries = params.get("datasets") or {}
    if name in entries:
        return parse(DatasetConfig, entries[name], where=f"datasets.{name}")
    if name.startswith("hub:"):
        return parse(DatasetConfig, {split: f"{name}@{split}" for split in SPLITS}, where=name)
    folder = resolve(Path(name).expanduser())
    if not folder.exists():
        raise InputError(
            f"no data set {name!r}: it is neither a path nor in the section datasets of params.yaml; "
            f"there: {', '.join(entries) or 'nothing'}"
        )
    parts = {split: _part(folder, split) for split in SPLITS}
    if missing := [split for split, part in parts.items() if part is None]:
        raise InputError(
            f"{folder}: no {', '.join(missing)} in it. The path of a data set is a folder with the three parts "
            f"{', '.join(SPLITS)}; what is one set of images needs an entry in the section datasets of params.yaml, "
            "which says where the three splits are"
        )
    return parse(DatasetConfig, {split: str(part) for split, part in parts.items()}, where=name)


def _part(folder: Path, split: str) -> Path | None:
    return next((path for path in (folder / split, folder / f"{split}.zip") if path.exists()), None)


def load_split(dataset: str, split: str, params: Mapping[str, Any], *, limit: int | None = None) -> ImageSet:
    """Load the `split` ("public", "heldout", "private", "private-test") of a data set.

    Args:
        dataset: a name in the section `datasets`, the path of a folder with three splits, or `hub:<id>`.
        split: which part.
        params: the content of params.yaml.
        limit: read the first `limit` samples at most.

    Raises:
        InputError: there is no such data set or split, or it cannot be read.
    """
    config = dataset_config(dataset, params)
    limits = [n for n in (config.limit, limit) if n]
    return load(config.source(split), size=config.size or None, limit=min(limits, default=None))


def content_digest(dataset: str, split: str, params: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a split is made from, without decoding it.

    It covers the bytes and names of its files, or the hub's revision, and the options of its entry, but no path: a data
    set that is moved keeps its digest.

    Raises:
        InputError: there is no such data set or split.
    """
    config = dataset_config(dataset, params)
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in (*SPLITS, "private_test")}
    return digest({"options": options, "content": source_digest(config.source(split))})


def source_digest(source: str) -> str:
    """Return the SHA-256 of a source's files (names and bytes), or of the hub's revision."""
    if source.startswith("hub:"):
        return digest({"hub": source, "revision": _hub_revision(source)})
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path}: no such data set; `dvc pull` fetches the shipped ones")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
    named = {"" if file == path else file.relative_to(path).as_posix(): _file_digest(file) for file in files}
    return digest(named)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_revision(source: str) -> str:
    import datasets

    repository = source.removeprefix("hub:").partition("@")[0]
    try:
        return str(datasets.load_dataset_builder(repository).hash)
    except Exception as error:  # datasets raises many types, from network to parsing
        raise InputError(f"{source}: cannot be looked up ({error}); check the name and the network") from None
