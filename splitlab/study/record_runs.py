"""All runs of the parameters, trained and recorded in parallel; what was trained before is not trained again."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitlab.core import storage
from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.parallel import parallel
from splitlab.data.image_set import digest
from splitlab.diffusion.base import Base
from splitlab.split.config import TrainConfig
from splitlab.split.train import train
from splitlab.study.kept import code_digest, file_digest
from splitlab.study.survey import LoadSplit

SENT = ("transcript.safetensors", "server.safetensors")
"""The files of a run that its server has: what it was sent, and what a malicious one trained."""


def record_runs(
    runs: Mapping[str, Any], base: Base, load: LoadSplit, *, out: Path, cache: Path, workers: int = 1
) -> list[str]:
    """Train every run of the section `runs` and write its outputs to `out`/<run> (`splitlab.split.train.train`).

    `out`/sent.json holds the digests of what the servers have: attacks follow from it, and from nothing else in `out`.
    An interrupted call goes on with the runs that have not ended, each from its last checkpoint.

    Returns the runs' names.

    Raises:
        InputError: one or several runs failed; the others have ended, and earlier outputs of those that failed stay.
    """
    configs = {name: parse(TrainConfig, values, where=f"runs.{name}") for name, values in runs.items()}
    out.mkdir(parents=True, exist_ok=True)
    calls = [(name, config, base) for name, config in configs.items()]
    failures = list(filter(None, parallel(partial(_attempt, load, out, cache), calls, desc="runs", workers=workers)))
    if failures:
        raise InputError("\n".join(failures))
    sent = {name: {file: file_digest(out / name / file) for file in SENT} for name in configs}
    storage.write_text(out / "sent.json", json.dumps(sent, indent=1, sort_keys=True) + "\n")
    return list(configs)


def _attempt(load: LoadSplit, out: Path, cache: Path, run: str, config: TrainConfig, base: Base) -> str:
    """Train one run; return what went wrong, so that one run's error does not end the others."""
    try:
        _record_run(run, config, base, load, out / run, cache)
    except InputError as error:
        return f"run {run}: {error}"
    return ""


def _record_run(run: str, config: TrainConfig, base: Base, load: LoadSplit, out: Path, cache: Path) -> None:
    """Train one run below `cache`, unless the same was trained before, and copy its outputs to `out`."""
    with storage.whole_folder(out, "train", apart={"cache": cache}) as folder:  # what is refused is refused first
        data = {split: load(config.dataset, split) for split in ("private", "heldout", "public")}
        follows_from = {"config": config, "base": base.digest, "code": code_digest("split")}
        follows_from |= {split: images.digest for split, images in data.items()}
        follows_from |= {"torch": torch.__version__, "numpy": np.__version__}
        kept = cache / "runs" / f"{run}-{digest(follows_from)[:16]}"
        if not (kept / "record.json").exists():
            train(run, config, base, data["private"], data["heldout"], out=kept, cache=cache, public=data["public"])
        shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(storage.MARKER))
