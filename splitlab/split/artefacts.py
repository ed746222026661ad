"""Reconstructions on disk: what an attack leaves for the evaluation, for figures and for the explorer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitlab.core import checkpoint
from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.pixels import pictures, to_uint8
from splitlab.split.config import Adversary, TrainConfig
from splitlab.split.messages import Reconstruction

MEASURED = ("control_iou", "control_edges", "eval_loss", "up_bytes_per_sample", "down_bytes_per_sample")
"""Numbers in a run's record, where it has them."""


@dataclass(frozen=True)
class SavedReconstruction:
    """A reconstruction as saved, with what is known about its making.

    Attributes:
        result: images and hints, quantised to 8 bits.
        adversary: who made it.
        seed: the attacker's seed.
        threat_model: (what, value) rows.
    """

    result: Reconstruction
    adversary: Adversary
    seed: int
    threat_model: tuple[tuple[str, str], ...]


def save_reconstruction(path: Path, saved: SavedReconstruction) -> None:
    """Write a reconstruction; timings stay out, so that equal attacks give equal files."""
    result = saved.result
    tensors = {"objective": torch.tensor(result.objective, dtype=torch.float32)}
    for name in ("images", "hints"):
        if getattr(result, name) is not None:
            tensors[name] = to_uint8(getattr(result, name))
    meta: dict[str, Any] = {
        "attack": saved.adversary.attack,
        "denied": list(saved.adversary.denied),
        "seed": saved.seed,
        "threat_model": [list(row) for row in saved.threat_model],
        "used": list(result.used),
        "n_evals": result.n_evals,
        "prompts": None if result.prompts is None else list(result.prompts),
    }
    checkpoint.save(path, tensors, meta)


def load_reconstruction(path: Path) -> SavedReconstruction:
    """Read what `save_reconstruction` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    tensors, content = checkpoint.load(path, remedy=checkpoint.REMADE)
    meta = parse(_Meta, content, where=f"{path}: what it says of itself")
    images, hints = (pictures(tensors, n, 4, path) if n in tensors else None for n in ("images", "hints"))
    if len({len(part) for part in (images, hints, meta.prompts) if part is not None}) > 1:
        raise InputError(f"{path}: its images, hints and prompts differ in number; attack again (`dvc repro`)")
    if any(len(row) != 2 for row in meta.threat_model):
        raise InputError(f"{path}: its threat model has no rows of (what, value); attack again (`dvc repro`)")
    objective = tuple(checkpoint.field(tensors, "objective", 1, (torch.float32,), path, finite=False).tolist())
    result = Reconstruction(images, hints, meta.prompts, meta.used, objective, meta.n_evals)
    rows = tuple((what, value) for what, value in meta.threat_model)
    return SavedReconstruction(result, Adversary(meta.attack, meta.denied), meta.seed, rows)


@dataclass(frozen=True)
class _Meta:
    attack: str
    denied: tuple[str, ...]
    seed: int
    threat_model: tuple[tuple[str, ...], ...]
    used: tuple[str, ...]
    n_evals: int
    prompts: tuple[str, ...] | None


def read_samples(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Read the images that a run generated: hints and images `[n, 3, h, w]` in [-1, 1], and n prompts.

    Raises:
        InputError: the file is missing or damaged, or holds no such samples.
    """
    tensors, meta = checkpoint.load(path, remedy=checkpoint.REMADE)
    hints, images = pictures(tensors, "hints", 4, path), pictures(tensors, "images", 4, path)
    prompts = meta.get("prompts")
    texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not texts or not len(hints) == len(images) == len(prompts):  # type: ignore[arg-type]
        raise InputError(f"{path}: its hints, images and prompts do not go together; {checkpoint.REMADE}")
    return hints, images, prompts  # type: ignore[return-value]


def read_scores(path: Path) -> dict[str, Tensor]:
    """Read a run's per-sample scores, `<attack>/<seed>/<measure>` -> `[n]`, and `ceiling_psnr_db`.

    Raises:
        InputError: the file is missing or damaged, or holds no scores.
    """
    tensors, _ = checkpoint.load(path, remedy=checkpoint.REMADE)
    if "ceiling_psnr_db" not in tensors or len({tuple(value.shape) for value in tensors.values()}) > 1:
        raise InputError(f"{path}: it holds no scores, or scores of different numbers of samples; {checkpoint.REMADE}")
    return tensors


def read_record(path: Path, *needed: str) -> tuple[dict[str, Any], TrainConfig]:
    """Read a run's record and the configuration in it.

    Args:
        path: a file `record.json` that `train` or `record_survey` wrote.
        needed: keys that it must have besides "config".

    Raises:
        InputError: it is missing or damaged, or lacks a key.
    """
    record = checkpoint.load_json(path, "config", *needed)
    config = parse(TrainConfig, record["config"], where=f"{path}: config")
    losses = record.get("loss", [])
    numbers = [record[name] for name in MEASURED if record.get(name) is not None]
    numbers += losses if isinstance(losses, list) else ["no list"]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in numbers):
        raise InputError(f"{path}: loss or one of {', '.join(MEASURED)} is no number; {checkpoint.REMADE}")
    return record, config


@dataclass(frozen=True)
class Recorded:
    """Where the files of an attacked transcript are: of a trained run, or of the survey.

    Attributes:
        name: of the run.
        transcript, truth, record: files.
        reconstructions: folder.
    """

    name: str
    transcript: Path
    truth: Path
    record: Path
    reconstructions: Path

    @classmethod
    def of_run(cls, name: str, runs: Path, reconstructions: Path) -> "Recorded":
        """Name the files of a trained run."""
        return cls._named(name, runs, runs, reconstructions)

    @classmethod
    def of_survey(cls, name: str, survey: Path) -> "Recorded":
        """Name the files of one of the survey's transcripts."""
        return cls._named(name, survey / "transcripts", survey / "truth", survey / "reconstructions")

    @classmethod
    def _named(cls, name: str, seen: Path, hidden: Path, reconstructions: Path) -> "Recorded":
        files = (
            seen / name / "transcript.safetensors",
            hidden / name / "truth.safetensors",
            hidden / name / "record.json",
        )
        return cls(name, *files, reconstructions / name)
