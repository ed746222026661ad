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
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base
from splitlab.federated.attacks import NO_INFORMATION
from splitlab.federated.defences import read_level
from splitlab.federated.saved import SavedInversion, load_inversion
from splitlab.federated.update import UpdateTruth, read_update_truth
from splitlab.study.results import Results, long_table, settings_table, write_part
from splitlab.study.update_grid import Cell, UpdateConfig
from splitlab.study.update_survey import LoadSplit, resized

ROUNDED = ("ssim", "ssim_std", "psnr_db", "cpu_s", "id_top1", "ceiling_ssim")
"""Metrics written to four digits; the others are shares of few samples, or counts."""

CANDIDATES = 100


def evaluate_updates(
    config: UpdateConfig, base: Base, load: LoadSplit, *, recorded: Path, inversions: Path, metrics: Path
) -> Results:
    """Score every inversion of the grid; write federated training's part of the results, and the table that shows it.

    Args:
        config: the grid.
        base: decodes latents, for the ceiling.
        load: `(dataset, split) -> data`.
        recorded: the folder that `record_updates` filled.
        inversions: the folder that `attack_updates` filled.
        metrics: folder for the tables.

    Raises:
        InputError: a file is missing or damaged, or a cell has no row without information.
    """
    rows = []
    for cell, _, seeds in tqdm(config.cells, desc="evaluate", mininterval=2):
        private = load(cell.dataset, "private").images
        truths = [read_update_truth(recorded / "truth" / cell.name / f"{seed}.safetensors") for seed in range(seeds)]
        facts = _facts(config, cell, truths)
        for name in (NO_INFORMATION, *(spec.name for spec in cell.attacks)):
            saved = [load_inversion(inversions / cell.name / f"{name}-{seed}.safetensors") for seed in range(seeds)]
            rows.append(facts | _row(cell, saved, truths, private) | {"ceiling_ssim": _ceiling(base, truths)})
    table = pd.DataFrame(rows).round({name: 4 for name in ROUNDED})
    found = Results(long_table("federated", table), settings_table("federated", table))
    write_part(found, metrics, "federated")
    return found


def _facts(config: UpdateConfig, cell: Cell, truths: Sequence[UpdateTruth]) -> dict[str, Any]:
    """Return all facts of a cell; see `splitlab.study.results.SETTINGS`."""
    defence, level = read_level(cell.defence)
    shared = ("model", "dataset", "objective", "batch", "trainable", "dtype")
    return {name: getattr(cell, name) for name in shared} | {
        "setting": cell.name,
        "name": cell.name,
        "kind": "update",
        "trained": config.models[cell.model].trained,
        "size": pictures(truths[0]).shape[-1],
        "update": cell.update.replace("=", " "),
        "defence": defence,
        "level": level,
        "t": math.nan if cell.timestep < 0 else cell.timestep,
    }


def _row(cell: Cell, saved: Sequence[SavedInversion], truths: Sequence[UpdateTruth], private: Tensor) -> dict[str, Any]:
    scores: dict[str, list[Tensor]] = {}
    for seed, (inversion, truth) in enumerate(zip(saved, truths, strict=True)):
        for key, values in score_inversion(inversion, truth, cell, private, seed=seed).items():
            scores.setdefault(key, []).append(values)
    whole = {key: values for key, values in scores.items() if len(values) == len(saved)}  # refused once: no mean
    pooled = {key: torch.cat(values).double() for key, values in whole.items()}
    mean: Mapping[str, float] = {key: float(values.mean()) for key, values in pooled.items()}
    n = sum(len(truth) for truth in truths)
    return {
        "attack": saved[0].attack,
        "granted": saved[0].granted,
        "n": n // len(truths),
        "seeds": len(truths),
        "note": next((inversion.refused for inversion in saved if inversion.refused), None),
        **{name: mean.get(name) for name in ("ssim", "psnr_db", "timestep_exact", "prompt_exact")},
        "ssim_std": float(pooled["ssim"].std()) if len(pooled.get("ssim", ())) > 1 else None,
        "mse": float(f"{mean['mse']:.3g}") if "mse" in mean else None,
        "n_evals": max(inversion.n_evals for inversion in saved),
        "cpu_s": sum(inversion.cpu_s for inversion in saved) / n,
        "id_top1": mean.get("identified"),
        "id_chance": 1 / min(CANDIDATES, len(private)) if "identified" in mean else None,
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
