"""What the stages read, by content: the stage `inputs`, which every `dvc repro` runs first.

Writes `inputs/notebooks/<notebook>.json`, a digest of what the notebook says, its outputs left out;
`inputs/data/<stage>.json`, a digest of every split that the stage reads; and `inputs/base.json`, one of the base model.
Stages depend on these files, so DVC never sees, copies or pushes data that people bring, and saved outputs make nothing
stale. Standard library and YAML
only: it takes a fraction of a second, where importing `splitlab` takes many.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("private", "public", "heldout", "private_test")
RECORDED = ("grid", "accumulate", "attacks", "epoch_attacks", "messages", "epochs", "epoch_samples")
"""Keys of the section `survey` that training what a defence costs does not look at; DVC cannot leave some out."""
Split = tuple[str, str]
"""(data set, split)."""


class MissingInput(Exception):
    """A source is not there."""


def reads(params: Mapping[str, Any]) -> dict[str, set[Split]]:
    """Return stage -> the splits it reads, for all stages that read data sets."""
    runs = {run: _dataset(entry, "shapes") for run, entry in params["runs"].items()}
    attacked = {runs[run] for run in params["attacks"] if run in runs}
    surveyed = {*params["survey"].get("datasets", ("shapes",)), *params["survey"].get("default", {})}
    recorded = {*runs.values(), *surveyed}
    updates = {_dataset(case, "photos") for case in params["updates"].get("cases", ())}
    trained = {"private", "public", "heldout"}
    grids = {f"dp/{grid}": _dataset(entry.get("common", {}), "digits") for grid, entry in params["dp"].items()}
    shares = params["pretrain"].get("shares", ("shapes", "photos", "digits"))
    stages = {grid: _pairs([dataset], SPLITS) for grid, dataset in grids.items()}
    return stages | {
        "pretrain": _pairs(shares, {"public"}),
        "record-split": _pairs(recorded, trained),
        "cost": _pairs(surveyed, {"private", "heldout"}),
        "attack-split": _pairs(attacked | surveyed, {"public"}),
        "evaluate-split": _pairs(recorded, trained),
        "record-federated": _pairs(updates, trained),
        "attack-federated": _pairs(updates, {"public"}),
        "evaluate-federated": _pairs(updates, {"private"}),
        "figures": _pairs(recorded, {"private"}),
    }


def _dataset(entry: Mapping[str, Any], default: str) -> str:
    return str(entry.get("dataset", default))


def _pairs(datasets: Iterable[str], splits: Iterable[str]) -> set[Split]:
    return {(dataset, split) for dataset in datasets for split in splits}


def sources(dataset: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data set's entry: of the section `datasets`, of a folder of splits, or of the hub.

    Raises:
        MissingInput: there is no such data set.
    """
    entries = params.get("datasets") or {}
    if dataset in entries:
        return dict(entries[dataset])
    if dataset.startswith("hub:"):
        return {"source": dataset}
    folder = _path(dataset)
    if not folder.exists():
        raise MissingInput(f"no data set {dataset!r}: neither in the section datasets of params.yaml nor a folder")
    parts = {split: [folder / f"{split}{end}" for end in ("", ".zip", ".parquet")] for split in SPLITS}
    return {split: str(path) for split, places in parts.items() for path in places if path.exists()}


class Digests:
    """SHA-256 of files, kept from call to call while a file's size and time stay the same."""

    def __init__(self, memory: Path):
        self._memory = memory
        try:
            self._known: dict[str, list[Any]] = json.loads(memory.read_text())
        except (OSError, ValueError):
            self._known = {}
        self._used: dict[str, list[Any]] = {}

    def file(self, path: Path) -> str:
        """Return the digest of a file's bytes."""
        facts = path.stat()
        stamp, key = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino], str(path)
        known = self._known.get(key, [])
        if known[:-1] != stamp:
            with path.open("rb") as file:
                known = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        self._used[key] = known
        return str(known[-1])

    def path(self, path: Path) -> str:
        """Return the digest of a file, or of the names and contents of a folder's files."""
        if path.is_file():
            return self.file(path)
        return _digest({file.relative_to(path).as_posix(): self.file(file) for file in _files(path)})

    def split(self, dataset: str, split: str, params: Mapping[str, Any]) -> str | None:
        """Return the digest of all that a split is made from; None if the data set has no such split.

        Raises:
            MissingInput: a source is not there.
        """
        entry = sources(dataset, params)
        if split not in entry and any(name in entry for name in SPLITS):
            return None
        for name in (split, "source"):
            source = entry.get(name)
            if isinstance(source, str) and source and not source.startswith("hub:") and not _place(source):
                raise MissingInput(f"data set {dataset}: {name} is {source}, and there is no such file or folder")
        kept = {name: entry[name] for name in entry if name == split or name not in SPLITS}
        return _digest(kept | {name: self.content(kept[name]) for name in (split, "source") if name in kept})

    def content(self, value: Any) -> Any:
        """Return `value` with the contents of files and folders in place of their paths."""
        if isinstance(value, Mapping):
            return {str(name): self.content(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self.content(part) for part in value]
        if isinstance(value, str) and (place := _place(value)):
            path, part = place
            return {"content": self.path(path)} | ({"part": part} if part else {})
        return value

    def keep(self) -> None:
        """Write down what is known, for the next call."""
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        _write(self._memory, json.dumps(self._used))


def _path(text: str) -> Path:
    return ROOT / Path(text).expanduser()


def _place(text: str) -> tuple[Path, str] | None:
    """Return the file or folder that `text` names and the split in it, `<path>@<split>`; None if there is none."""
    path, _, part = text.rpartition("@")
    named = ((text, ""), (path, part))
    return next(((_path(name), split) for name, split in named if name and _path(name).exists()), None)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, through links to folders, but into none twice; hidden ones left out."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        if real not in seen:
            yield from (path for name in sorted(names) if name[0] != "." and (path := Path(root, name)).is_file())
        seen.add(real)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def notebook_digest(path: Path) -> str:
    """Return the digest of a notebook's cells, without what running or saving it changes."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    kept = [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]
    return _digest(kept)


def written(params: Mapping[str, Any], digests: Digests) -> dict[str, dict[str, Any]]:
    """Return file below `inputs` -> its content."""
    run = sorted(set(re.findall(r"notebooks/(\w+)\.ipynb", (ROOT / "dvc.yaml").read_text(encoding="utf-8"))))
    notebooks = {name: ROOT / "notebooks" / f"{name}.ipynb" for name in run}
    files: dict[str, dict[str, Any]] = {
        f"notebooks/{name}.json": {"cells": notebook_digest(path)} for name, path in notebooks.items()
    }
    source = params["base"]["source"]  # the shipped base is a stage's output: those that need it depend on it
    files["base.json"] = {"source": source if _path(source) == _path("models/base") else digests.content(source)}
    for stage, pairs in reads(params).items():
        found = {f"{name}/{split}": digests.split(name, split, params) for name, split in sorted(pairs)}
        files[f"data/{stage}.json"] = {name: value for name, value in found.items() if value}
    trained = {name: value for name, value in params["survey"].items() if name not in RECORDED}
    files["data/cost.json"]["survey"] = _digest(trained)
    for name, model in params["updates"].get("models", {}).items():
        source = model.get("source", "")
        if source and not _path(source).is_relative_to(ROOT / "runs"):  # that of a run is a stage's output
            for stage in ("record-federated", "attack-federated"):
                files[f"data/{stage}.json"][f"model {name}"] = digests.content(source)
    return files


def within_reach_of_git(params: Mapping[str, Any]) -> list[str]:
    """Return the data sets' sources in the checkout that `git add` would take up: their owner may not mean that."""
    named = {name for pairs in reads(params).values() for name, _ in pairs}
    entries = [sources(name, params) for name in sorted(named)]
    values = [entry[part] for entry in entries for part in (*SPLITS, "source") if isinstance(entry.get(part), str)]
    paths = [place[0].resolve() for value in values if (place := _place(value))]
    inside = sorted({path for path in paths if path.is_relative_to(ROOT.resolve())})
    command = ["git", "-C", str(ROOT), "ls-files", "--others", "--exclude-standard", "--"]
    try:
        return [
            str(path) for path in inside if subprocess.run([*command, path], capture_output=True, check=True).stdout
        ]
    except (OSError, subprocess.CalledProcessError):
        return []  # no git here


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _is_digests(path: Path) -> bool:
    """Say whether a file holds digests and nothing else: what is somebody's own stays where it is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return all(re.fullmatch("[0-9a-f]{64}", value) for value in content.values())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def main() -> int:
    """Bring `inputs/` up to date; what is right already is not touched."""
    params: dict[str, Any] = {}
    for path in (ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))):
        params |= YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    digests, folder = Digests(ROOT / ".cache" / "inputs.json"), ROOT / "inputs"
    try:
        files = written(params, digests)
    except MissingInput as error:
        print(f"error: {error}. No stage was run, and nothing was deleted; bring it back or mend params.yaml")
        return 1
    for source in within_reach_of_git(params):
        print(f"warning: {source} is in the checkout, and `git add` would take it up: move it outside, or ignore it")
    for name, content in files.items():
        path, text = folder / name, json.dumps(content, indent=1, sort_keys=True) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, text)
    for path in folder.rglob("*.json"):
        if path.relative_to(folder).as_posix() not in files and _is_digests(path):
            path.unlink()
    digests.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
