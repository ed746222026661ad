"""params.yaml, for notebooks: they read it and pass plain values on; nothing below them does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from splitlab.data import ImageSet, load, locate
from splitlab.errors import InputError
from splitlab.paths import resolve

SECTIONS = ("base", "data", "pretrain", "runs", "attacks", "survey", "updates", "dp", "evaluate")


def load_params(path: str | Path = "params.yaml") -> dict[str, Any]:
    """Read a parameter file (relative to the project root).

    Raises:
        InputError: it is missing, not YAML, or has an unknown section.
    """
    path = resolve(path)
    try:
        params = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such parameter file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(params, dict):
        raise InputError(f"{path}: expected sections, got {params!r}")
    unknown, missing = sorted(set(params) - set(SECTIONS)), sorted(set(SECTIONS) - set(params))
    if unknown or missing:
        problem = f"unknown section {', '.join(unknown)}" if unknown else f"no section {', '.join(missing)}"
        raise InputError(f"{path}: {problem}; the sections are {', '.join(SECTIONS)}")
    return params


def section(params: Mapping[str, Any], name: str, key: str) -> Any:
    """Return `params[name][key]`.

    Raises:
        InputError: there is no such entry; the message lists those there are.
    """
    entries = params[name]
    if key not in entries:
        raise InputError(f"params.yaml: nothing called {key!r} in {name}; there: {', '.join(entries)}")
    return entries[key]


def load_split(dataset: str, split: str, params: Mapping[str, Any]) -> ImageSet:
    """Load the `split` ("public", "heldout", "private") of a data set below the params' data root."""
    return load(locate(dataset, split, root=resolve(params["data"]["root"])))
