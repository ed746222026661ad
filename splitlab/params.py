"""params.yaml, for notebooks: they read it and pass plain values on; nothing below them does."""

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


def load_params(path: str | Path = "params.yaml") -> dict[str, Any]:
    """Read a parameter file (relative to the project root) by the same reader as DVC, which follows YAML 1.2.

    So 1e-4 and .inf are numbers, 010 is ten, and yes, no, on and off are words.

    Raises:
        InputError: it is missing, not YAML, gives a key twice, or has an unknown section.
    """
    path = resolve(path)
    try:
        params = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
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
    ) as error:  # unreadable, not UTF-8, no date, nested without end
        raise InputError(f"{path}: cannot be read ({error}); it must be YAML in UTF-8") from None
    if not isinstance(params, dict):
        raise InputError(f"{path}: expected sections, got {params!r}")
    unknown, missing = (
        sorted(map(str, set(one) - set(other))) for one, other in ((params, SECTIONS), (SECTIONS, params))
    )
    if unknown or missing:
        problem = f"unknown section {', '.join(unknown)}" if unknown else f"no section {', '.join(missing)}"
        raise InputError(f"{path}: {problem}; the sections are {', '.join(SECTIONS)}")
    for name, entries in params.items():
        if not isinstance(entries, dict):
            raise InputError(
                f"{path}, section {name}: expected names and values, got {entries!r}; {{}} is an empty one"
            )
        if other := [key for key in entries if not isinstance(key, str)]:
            raise InputError(f"{path}, section {name}: the name {other[0]!r} is no text; put it in quotes")
    if set(params["base"]) != {"source"} or not isinstance(params["base"]["source"], str):
        raise InputError(f"{path}, section base: expected source, a folder or a hub id, got {params['base']!r}")
    return params


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
        raise InputError(f"params.yaml: nothing called {key!r} in {name}; there: {', '.join(entries)}")
    return entries[key]
