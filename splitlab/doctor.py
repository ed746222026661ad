"""What works in this checkout, what is missing, and which command mends it. Nothing is fetched, written or changed."""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from packaging.requirements import Requirement

from splitlab.core.errors import InputError
from splitlab.core.parallel import n_workers
from splitlab.core.paths import ROOT, resolve
from splitlab.data.datasets import SPLITS, dataset_config
from splitlab.data.layouts import open_listing
from splitlab.data.reading import read
from splitlab.diffusion.base import load_base
from splitlab.diffusion.base_source import may_be_hub_id
from splitlab.params import load_params

FREE_GB = 2.0
"""Disk space that a run of the whole pipeline takes."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: its name.
        works: whether it is there and of use.
        detail: what was found.
        mend: the command, or the step, that mends it where it does not work.
        needed: whether the pipeline needs it.
    """

    what: str
    works: bool
    detail: str
    mend: str = ""
    needed: bool = True


def diagnose(params_file: str | Path = "params.yaml") -> tuple[Check, ...]:
    """Look at environment, devices, parameters, base model and data sets; models and data on the hub stay there.

    Args:
        params_file: the parameter file, relative to the project root.
    """
    checks = [*_environment(), *_devices()]
    params: dict[str, Any] = {}
    checks.append(_tried("parameters", lambda: _read_params(params, params_file), "mend the file"))
    if params:
        source = params["base"]["source"]
        checks.append(_tried("base model", lambda: _base(source), "make data, or name another as base.source"))
        for name in params["datasets"]:
            mend = f"make data fetches shipped sets; else mend datasets.{name} in {params_file}"
            checks.append(_tried(f"data set {name}", partial(_dataset, name, params), mend))
    return tuple(checks)


def _tried(what: str, look: Callable[[], str], mend: str) -> Check:
    try:
        return Check(what, True, look())
    except InputError as error:
        return Check(what, False, str(error), mend)


def _environment() -> Iterator[Check]:
    """Check the interpreter, the packages that splitlab declares, and the programs that the pipeline calls."""
    yield Check("Python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")
    lock = ROOT / "requirements.lock"
    pinned = dict(line.split("==") for line in lock.read_text().split() if "==" in line) if lock.exists() else {}
    required = [Requirement(text) for text in metadata.requires("splitlab") or ()]
    missing, other = [], []
    for name in (need.name for need in required if not need.marker or need.marker.evaluate({"extra": ""})):
        try:
            version = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
        else:
            other += [f"{name} {version} (lock: {pinned[name]})"] if pinned.get(name, version) != version else []
    yield Check("packages", not missing, f"missing: {', '.join(missing)}" if missing else "all there", "make setup")
    if other:
        yield Check("versions", False, f"numbers may differ in the last digits with {', '.join(other)}", "make setup",
                    needed=False)  # fmt: skip
    for program in ("dvc", "papermill", "jupyter-lab"):
        place = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
        yield Check(program, bool(place), place or "not on the path", "make setup")


def _devices() -> Iterator[Check]:
    """Check what there is to compute with and to write to."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(ROOT)
    processes = n_workers()
    detail = f"{psutil.cpu_count()} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory free"
    yield Check("processor", True, f"{detail}; independent attacks run in {processes} processes")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Check("accelerator", bool(names), ", ".join(names) or "none; all of the pipeline runs without", needed=False)
    yield Check("disk", disk.free >= FREE_GB * 1e9, f"{disk.free / 1e9:.1f} GB free in {ROOT}",
                f"make room: the pipeline takes {FREE_GB:g} GB")  # fmt: skip


def _read_params(params: dict[str, Any], path: str | Path) -> str:
    params |= load_params(path)
    return f"{path}: {len(params['runs'])} runs, {len(params['datasets'])} data sets"


def _base(source: str) -> str:
    """Load a base model that is in a folder; of one on the hub, say whether it was fetched."""
    name = Path(source.removeprefix("hub:"))
    if any(place.is_dir() for place in (Path(source).expanduser(), resolve(source))) or not may_be_hub_id(source, name):
        base = load_base(source)
        return f"{source}: {sum(weight.numel() for weight in base.unet.parameters()):,} weights in its U-Net"
    repository, _, revision = name.as_posix().partition("@")
    cached = huggingface_hub.try_to_load_from_cache(repository, "unet/config.json", revision=revision or None)
    return f"{source}: on the hub, {'and in its cache' if isinstance(cached, str) else 'fetched when first used'}"


def _dataset(name: str, params: dict[str, Any]) -> str:
    """List a data set's splits, or its one source, and read the first sample of each."""
    config = dataset_config(name, params)
    counts = []
    for split in SPLITS[:1] if config.source else SPLITS:
        what, place = ("source", config.source) if config.source else (split, config.place(split))
        if place.startswith("hub:"):
            counts.append(f"{what} on the hub, fetched when first used")
            continue
        listing = open_listing(config.place(split))
        read(listing, config, range(min(1, len(listing.rows))))
        counts.append(f"{what} {len(listing.rows)}")
    return ", ".join(counts)
