"""params.yaml and params/, for notebooks: they read them and pass plain values on; nothing below them does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from splitlab.core.errors import InputError
from splitlab.core.paths import resolve
from splitlab.data import datasets
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.tokenizer import tokenizer_of

SECTIONS = ("base", "datasets", "pretrain", "runs", "attacks", "survey", "updates", "dp", "evaluate")
FILES = ("split.yaml", "federated.yaml", "dp.yaml")
"""What each system has to itself, in the folder beside the common file."""


def load_params(path: str | Path = "params.yaml") -> dict[str, Any]:
    """Read the parameters: a file (relative to the project root) and those of the folder of its name, `params/*.yaml`.

    The reader is DVC's, which follows YAML 1.2: 1e-4 and .inf are numbers, 010 is ten, and yes, no, on, off are words.

    Raises:
        InputError: a file is missing, not YAML, gives a key twice, or has an unknown section; a section is in two
            files, or in none.
    """
    path = resolve(path)
    params: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for file in (path, *sorted(path.with_suffix("").glob("*.yaml"))):
        for name, entries in _sections(file).items():
            if name in params:
                raise InputError(f"{file}: section {name} is in {origin[name]} too; keep one of them")
            params[name], origin[name] = entries, file
    if missing := sorted(set(SECTIONS) - set(params)):
        files = ", ".join([path.name, *(f"{path.stem}/{file}" for file in FILES)])
        raise InputError(f"{path}: no section {', '.join(missing)}; the sections are {', '.join(SECTIONS)}, in {files}")
    for name, entries in params.items():
        where = f"{origin[name]}, section {name}"
        if not isinstance(entries, dict):
            raise InputError(f"{where}: expected names and values, got {entries!r}; {{}} is an empty one")
        if other := [key for key in entries if not isinstance(key, str)]:
            raise InputError(f"{where}: the name {other[0]!r} is no text; put it in quotes")
    if set(params["base"]) != {"source"} or not isinstance(params["base"]["source"], str):
        raise InputError(
            f"{origin['base']}, section base: expected source, a folder or a hub id, got {params['base']!r}"
        )
    return params


def _sections(path: Path) -> dict[str, Any]:
    """Read the sections of one file."""
    try:
        sections = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such parameter file") from None
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        raise InputError(f"{path}, line {line}: {error.problem}; a key may be given once: keep one of them") from None
    except YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    except (
        OSError,
        ValueError,
        LookupError,
        RecursionError,
    ) as error:  # unreadable, no UTF-8, no date, endless nesting
        raise InputError(f"{path}: cannot be read ({error}); it must be YAML in UTF-8") from None
    if not isinstance(sections, dict):
        raise InputError(f"{path}: expected sections, got {sections!r}")
    if unknown := sorted(map(str, set(sections) - set(SECTIONS))):
        raise InputError(f"{path}: unknown section {', '.join(unknown)}; the sections are {', '.join(SECTIONS)}")
    return sections


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
    return datasets.load_split(
        dataset, split, params, limit=limit, tokenizer=lambda: tokenizer_of(params["base"]["source"])
    )


def section(params: Mapping[str, Any], name: str, key: str) -> Any:
    """Return `params[name][key]`.

    Raises:
        InputError: there is no such entry; the message lists those there are.
    """
    entries = params[name]
    if key not in entries:
        raise InputError(f"params: nothing called {key!r} in {name}; there: {', '.join(entries)}")
    return entries[key]
