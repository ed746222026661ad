"""Inversions of federated updates meet the truth, here and nowhere before."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.seeds import generator
from splitlab.core.tables import write_table
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base
from splitlab.federated.attacks import NO_INFORMATION
from splitlab.federated.saved import SavedInversion, load_inversion
from splitlab.federated.update import UpdateTruth, read_update_truth
from splitlab.study.update_grid import Cell, UpdateConfig
from splitlab.study.update_survey import LoadSplit, resized

COLUMNS = (
    *("model", "trained", "dataset", "size", "objective", "update", "defence", "level", "attack", "knowledge"),
    *("t", "batch", "n", "n_seeds", "ssim", "ssim_std", "psnr_db", "mse", "timestep_exact", "prompt_exact", "n_evals"),
    *("cpu_s", "id_top1", "id_chance", "trainable", "dtype", "ceiling_ssim", "cell", "refused"),
)
"""t is empty where each image draws its own; cpu_s is per image; ceiling_ssim is that of the VAE's own decoding."""

CANDIDATES = 100


def evaluate_updates(
    config: UpdateConfig, base: Base, load: LoadSplit, *, recorded: Path, inversions: Path, out: Path
) -> pd.DataFrame:
    """Score every inversion of the grid.

    Args:
        config: the grid.
        base: decodes latents, for the ceiling.
        load: `(dataset, split) -> data`.
        recorded: the folder that `record_updates` filled.
        inversions: the folder that `attack_updates` filled.
        out: the CSV file to write.

    Returns a table of `COLUMNS`.

    Raises:
        InputError: a file is missing or damaged, or a cell has no row without information.
    """
    rows = []
    for cell, _, seeds in tqdm(config.cells, desc="evaluate", mininterval=2):
        private = load(cell.dataset, "private").images
        truths = [read_update_truth(recorded / "truth" / cell.name / f"{seed}.safetensors") for seed in range(seeds)]
        for name in (NO_INFORMATION, *(spec.name for spec in cell.attacks)):
            saved = [load_inversion(inversions / cell.name / f"{name}-{seed}.safetensors") for seed in range(seeds)]
            rows.append(_row(config, cell, saved, truths, private) | {"ceiling_ssim": _ceiling(base, truths)})
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table = table.round({c: 4 for c in ("ssim", "ssim_std", "psnr_db", "cpu_s", "id_top1", "ceiling_ssim")})
    write_table(table, out)
    return table


def _row(
    config: UpdateConfig, cell: Cell, saved: Sequence[SavedInversion], truths: Sequence[UpdateTruth], private: Tensor
) -> dict[str, Any]:
    spec = config.models[cell.model]
    defence, _, level = cell.defence.partition("=")
    scores: dict[str, list[Tensor]] = {}
    for seed, (one, truth) in enumerate(zip(saved, truths, strict=True)):
        for key, values in score_inversion(one, truth, cell, private, seed=seed).items():
            scores.setdefault(key, []).append(values)
    whole = {key: values for key, values in scores.items() if len(values) == len(saved)}  # refused once: no mean
    pooled = {key: torch.cat(values).double() for key, values in whole.items()}
    mean: Mapping[str, float] = {key: float(values.mean()) for key, values in pooled.items()}
    n = sum(len(truth) for truth in truths)
    return {
        "model": cell.model,
        "trained": spec.trained,
        "dataset": cell.dataset,
        "size": pictures(truths[0]).shape[-1],
        "objective": cell.objective,
        "update": cell.update.replace("=", " "),
        "defence": defence,
        "level": float(level) if level else math.nan,
        "attack": saved[0].attack,
        "knowledge": saved[0].knowledge,
        "t": math.nan if cell.timestep < 0 else cell.timestep,
        "batch": cell.batch,
        "n": n // len(truths),
        "n_seeds": len(truths),
        "ssim": mean.get("ssim"),
        "ssim_std": float(pooled["ssim"].std()) if len(pooled.get("ssim", ())) > 1 else None,
        "psnr_db": mean.get("psnr_db"),
        "mse": float(f"{mean['mse']:.3g}") if "mse" in mean else None,
        "timestep_exact": mean.get("timestep_exact"),
        "prompt_exact": mean.get("prompt_exact"),
        "n_evals": max(one.n_evals for one in saved),
        "cpu_s": sum(one.cpu_s for one in saved) / n,
        "id_top1": mean.get("identified"),
        "id_chance": 1 / min(CANDIDATES, len(private)) if "identified" in mean else None,
        "trainable": cell.trainable,
        "dtype": cell.dtype,
        "cell": cell.name,
        "refused": next((one.refused for one in saved if one.refused), None),
    }


def _ceiling(base: Base, truths: Sequence[UpdateTruth]) -> float | None:
    """Return the mean SSIM of the VAE's own decoding of the true latents; None for pixel models."""
    values = [
        metrics.ssim(base.decode(t.clean), t.images) for t in truths if t.text is not None and t.images is not None
    ]
    return float(torch.cat(values).mean()) if values else None


def score_inversion(
    saved: SavedInversion, truth: UpdateTruth, cell: Cell, private: Tensor, *, seed: int
) -> dict[str, Tensor]:
    """Score one inversion: values per sample for images, per update for timesteps and prompts.

    Images of one update come in no order: they are matched by best assignment, guesses too.
    """
    updates = [truth[i : i + cell.together] for i in range(0, len(truth), cell.together)]
    scores: dict[str, Tensor] = {}
    if saved.timesteps is not None:
        wanted = [tuple(sorted(set(one.timesteps.flatten().tolist()))) for one in updates]
        scores["timestep_exact"] = _equal(saved.timesteps, wanted)
    if saved.prompts is not None and truth.prompts:
        scores["prompt_exact"] = _equal(saved.prompts, [tuple(sorted(set(one.prompts))) for one in updates])
    if saved.images is not None:
        scores |= _image_scores(saved.images, truth, cell, private, seed)
    return scores


def _equal(found: Sequence[tuple[Any, ...]], wanted: Sequence[tuple[Any, ...]]) -> Tensor:
    return torch.tensor([one == other for one, other in zip(found, wanted, strict=True)]).float()


def _image_scores(images: Tensor, truth: UpdateTruth, cell: Cell, private: Tensor, seed: int) -> dict[str, Tensor]:
    wanted = pictures(truth)
    if len(images) != len(wanted):
        raise InputError(f"{cell.name}: {len(images)} images were reconstructed of {len(truth)}; attack again")
    found, size = matched(images, wanted, cell.together), images.shape[-1]
    gallery = resized(private, size)
    own = torch.cdist(wanted.flatten(1), gallery.flatten(1)).argmin(1)
    draw = generator("update line-up", cell.dataset, seed)
    gallery_indices = metrics.draw_galleries(len(gallery), own, min(CANDIDATES, len(gallery)), draw)
    return {
        "ssim": metrics.ssim(found, wanted),
        "psnr_db": metrics.psnr_db(found, wanted),
        "mse": metrics.mse(found, wanted),
        "identified": metrics.identified(found, gallery, gallery_indices).float(),
    }


def pictures(truth: UpdateTruth) -> Tensor:
    """Return the private images `[n, 3, s, s]`."""
    return truth.clean if truth.images is None else truth.images


def matched(found: Tensor, truth: Tensor, batch: int) -> Tensor:
    """Return `found` `[n, 3, h, w]` with each update's `batch` images in the order that suits `truth` best."""
    if batch == 1:
        return found
    parts = []
    for mine, theirs in zip(found.split(batch), truth.split(batch), strict=True):
        errors = torch.cdist(mine.flatten(1).double(), theirs.flatten(1).double()).square()
        rows, columns = linear_sum_assignment(errors.numpy())
        order = torch.empty(len(rows), dtype=torch.int64)
        order[torch.from_numpy(columns)] = torch.from_numpy(rows)
        parts.append(mine[order])
    return torch.cat(parts)
