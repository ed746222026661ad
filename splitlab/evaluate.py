"""Reconstructions meet the truth, here and nowhere before; figures and explorer show what was scored here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from splitlab import checkpoint, metrics
from splitlab.artefacts import SavedReconstruction, load_reconstruction
from splitlab.base import Base
from splitlab.colours import are_shapes
from splitlab.config import EvaluateConfig, TrainConfig, parse
from splitlab.data import ImageSet
from splitlab.errors import InputError
from splitlab.params import load_split
from splitlab.seeds import generator
from splitlab.train import control_scores
from splitlab.types import Truth
from splitlab.wire import read_truth

TRAINING_COLUMNS = (
    *("run", "dataset", "scheme", "defences", "n_clients", "steps", "eval_loss", "control_iou", "control_ssim"),
    *("up_bytes_per_sample", "down_bytes_per_sample", "client_s_per_sample", "server_s_per_sample", "peak_rss_mb"),
)
ATTACK_COLUMNS = (
    *("run", "dataset", "defences", "attack", "knowledge", "t_low", "t_high", "n", "n_seeds", "psnr_db", "psnr_db_std"),
    *("ssim", "mse", "id_top1", "id_chance", "ceiling_psnr_db", "no_info_psnr_db"),
    *("psnr_db_seed_std", "hint_psnr_db", "hint_iou"),
)


@dataclass(frozen=True)
class RunTruth:
    """What the evaluator knows about a recorded run.

    Attributes:
        config: the run's configuration.
        truth: indices, timesteps and noise of every recorded sample.
        private: the private data set.
        ceiling: `[n]` PSNR, dB, of the VAE's own reconstruction of each recorded sample's image.
    """

    config: TrainConfig
    truth: Truth
    private: ImageSet
    ceiling: Tensor


def run_truth(run: Path, base: Base, private: ImageSet) -> RunTruth:
    """Load a run's truth.

    Raises:
        InputError: the run's files are missing, damaged, or speak of other data.
    """
    config = parse(TrainConfig, read_json(run / "record.json")["config"], where=f"{run}/record.json")
    truth = read_truth(run / "truth.safetensors")
    if len(truth.indices) and int(truth.indices.max()) >= len(private):
        raise InputError(f"{run}: its truth speaks of image {int(truth.indices.max())}, the data hold {len(private)}")
    images = private.images[truth.indices.unique()]
    psnr = metrics.psnr_db(base.decode(base.encode(images)), images) if len(images) else torch.zeros(0)
    return RunTruth(config, truth, private, psnr[torch.searchsorted(truth.indices.unique(), truth.indices)])


def buckets(timesteps: Tensor, config: EvaluateConfig) -> dict[tuple[int, int], Tensor]:
    """Return (low, high) -> positions of the first `config.samples` samples with low <= t < high; no empty ones."""
    found = {}
    for low, high in zip(config.buckets, config.buckets[1:], strict=False):
        inside = torch.nonzero((timesteps >= low) & (timesteps < high))[:, 0][: config.samples]
        if len(inside):
            found[low, high] = inside
    return found


def score_samples(
    saved: SavedReconstruction, known: RunTruth, config: EvaluateConfig, *, localise: bool
) -> dict[str, Tensor]:
    """Score one reconstruction, sample by sample.

    Returns `mse`, `psnr_db`, `ssim`, `identified`, and where the attack recovers hints `hint_psnr_db` and, if
    `localise`, `hint_iou` (outlines of discs); each `[n]` float32.

    Raises:
        InputError: the reconstruction has another number of images than the truth.
    """
    truth, private, result = known.truth, known.private, saved.result
    if len(result.images) != len(truth.indices):
        raise InputError(
            f"{saved.attack}: {len(result.images)} reconstructions for {len(truth.indices)} samples; attack again"
        )
    images = private.images[truth.indices]
    scores = {
        "mse": metrics.mse(result.images, images),
        "psnr_db": metrics.psnr_db(result.images, images),
        "ssim": metrics.ssim(result.images, images),
        "identified": _identified(result.images, truth.indices, private, config),
    }
    if result.hints is not None:
        hints = private.hints[truth.indices]
        scores["hint_psnr_db"] = metrics.psnr_db(result.hints, hints)
        if localise:
            found, wanted = (torch.stack([metrics.outline_mask(h) for h in group]) for group in (result.hints, hints))
            scores["hint_iou"] = metrics.iou(found, wanted)
    return {name: value.float() for name, value in scores.items()}


def _identified(images: Tensor, indices: Tensor, private: ImageSet, config: EvaluateConfig) -> Tensor:
    """Pick each image's nearest among a line-up of private images, the same line-up for every attack."""
    size = min(config.candidates, len(private))
    line_up = metrics.line_ups(len(private), indices, size, generator("line-up", config.seed))
    return metrics.identified(images, private.images, line_up)


def attack_rows(
    run: str,
    known: RunTruth,
    scored: Mapping[str, Sequence[tuple[SavedReconstruction, dict[str, Tensor]]]],
    config: EvaluateConfig,
) -> list[dict[str, Any]]:
    """Aggregate scores to table rows: per attack and timestep bucket, over images and attack seeds.

    `psnr_db_std` is the spread over images and seeds together, `psnr_db_seed_std` that of the seeds' means.
    """
    rows = []
    for (low, high), chosen in buckets(known.truth.timesteps, config).items():
        guess = torch.stack([s["psnr_db"][chosen] for _, s in scored["mean_public"]])
        for attack, tries in scored.items():
            columns = {name: torch.stack([scores[name][chosen] for _, scores in tries]) for name in tries[0][1]}
            psnr = columns["psnr_db"]
            rows.append(
                {
                    "run": run,
                    "dataset": known.config.dataset,
                    "defences": str(known.config.defences),
                    "attack": attack,
                    "knowledge": tries[0][0].knowledge,
                    "t_low": low,
                    "t_high": high,
                    "n": len(chosen),
                    "n_seeds": len(tries),
                    "psnr_db": psnr.mean().item(),
                    "psnr_db_std": psnr.std(unbiased=False).item(),
                    "ssim": columns["ssim"].mean().item(),
                    "mse": columns["mse"].mean().item(),
                    "id_top1": columns["identified"].mean().item(),
                    "id_chance": 1.0 / min(config.candidates, len(known.private)),
                    "ceiling_psnr_db": known.ceiling[chosen].mean().item(),
                    "no_info_psnr_db": guess.mean().item(),
                    "psnr_db_seed_std": psnr.mean(1).std(unbiased=False).item(),
                    "hint_psnr_db": columns["hint_psnr_db"].mean().item() if "hint_psnr_db" in columns else None,
                    "hint_iou": columns["hint_iou"].mean().item() if "hint_iou" in columns else None,
                }
            )
    return rows


def evaluate_run(
    run: Path, reconstructions: Path, base: Base, private: ImageSet, config: EvaluateConfig, *, out: Path
) -> list[dict[str, Any]]:
    """Score every reconstruction of a run; write the per-sample scores to `out`, return the table's rows.

    Raises:
        InputError: there are no reconstructions, or the no-information row is missing among them.
    """
    known = run_truth(run, base, private)
    saved = [load_reconstruction(path) for path in sorted(reconstructions.glob("*.safetensors"))]
    if "mean_public" not in {s.attack for s in saved}:
        raise InputError(f"{reconstructions}: no reconstruction by mean_public, the no-information row; attack first")
    scored: dict[str, list[tuple[SavedReconstruction, dict[str, Tensor]]]] = {}
    for one in saved:
        scores = score_samples(one, known, config, localise=are_shapes(private.prompts))
        scored.setdefault(one.attack, []).append((one, scores))
    tensors = {
        f"{attack}/{one.seed}/{name}": value
        for attack, tries in scored.items()
        for one, scores in tries
        for name, value in scores.items()
    }
    checkpoint.save(out, tensors | {"ceiling_psnr_db": known.ceiling}, {"run": run.name})
    return attack_rows(run.name, known, scored, config)


def evaluate_all(
    runs: Path,
    reconstructions: Path,
    base: Base,
    params: Mapping[str, Any],
    config: EvaluateConfig,
    *,
    scores: Path,
    metrics: Path,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every run and every attack; write `training.csv`, `split_attacks.csv` and `summary.json` below `metrics`.

    Args:
        runs: folder of runs.
        reconstructions: folder of reconstructions, one folder per attacked run.
        base: the public models.
        params: the parameter file's content, for the data sets and the runs to expect.
        config: how to score.
        scores: folder for per-sample scores.
        metrics: folder for the tables.

    Returns the two tables.
    """
    names = list(params["runs"])
    configs = {name: parse(TrainConfig, params["runs"][name], where=f"runs.{name}") for name in names}
    training = [training_row(runs / name) for name in names]
    for dataset in dict.fromkeys(one.dataset for one in configs.values()):
        training += yardsticks(dataset, base, load_split(dataset, "heldout", params))
    rows = []
    for name in tqdm(params["attacks"], desc="evaluate"):
        private = load_split(configs[name].dataset, "private", params)
        out = scores / f"{name}.safetensors"
        rows += evaluate_run(runs / name, reconstructions / name, base, private, config, out=out)
    tables = table(training, TRAINING_COLUMNS), table(rows, ATTACK_COLUMNS)
    metrics.mkdir(parents=True, exist_ok=True)
    for frame, name in zip(tables, ("training", "split_attacks"), strict=True):
        frame.to_csv(metrics / f"{name}.csv", index=False, lineterminator="\n")
    (metrics / "summary.json").write_text(json.dumps(summary(*tables), indent=1, sort_keys=True) + "\n")
    return tables


def yardsticks(dataset: str, base: Base, heldout: ImageSet, *, samples: int = 64) -> list[dict[str, Any]]:
    """Return training-table rows for no control at all and for the VAE's own reconstruction, on held-out data."""
    asked = heldout.subset(range(min(samples, len(heldout))))
    text, latents = base.encode_prompts(asked.prompts), base.encode(asked.images)
    free = base.pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=base.encode_prompts([""] * len(asked)),
        height=asked.size,
        width=asked.size,
        num_inference_steps=25,
        guidance_scale=2.0,
        latents=torch.randn(latents.shape, generator=generator("no control")),
        output_type="pt",
    ).images
    pictures = {"no control": torch.as_tensor(free) * 2.0 - 1.0, "VAE ceiling": base.decode(latents)}
    return [
        {"run": f"({name}: {dataset})", "dataset": dataset, "scheme": name, **control_scores(images, asked)}
        for name, images in pictures.items()
    ]


def summary(training: pd.DataFrame, attacks: pd.DataFrame) -> dict[str, Any]:
    """Boil the tables down to one number per run and attack, for `dvc metrics show` and `diff`."""
    control = training.dropna(subset=["steps"]).set_index("run")[["eval_loss", "control_iou", "control_ssim"]]
    leaks = attacks.groupby(["run", "attack"])[["psnr_db", "id_top1"]].mean().round(4)
    attacked: dict[str, Any] = {}
    for row in leaks.reset_index().to_dict("records"):
        attacked.setdefault(row["run"], {})[row["attack"]] = {key: row[key] for key in ("psnr_db", "id_top1")}
    return {"train": json.loads(control.to_json(orient="index")), "attack": attacked}


def training_row(run: Path) -> dict[str, Any]:
    """Return a run's row of the training table."""
    record, timing = read_json(run / "record.json"), read_json(run / "timing.json")
    config = parse(TrainConfig, record["config"], where=f"{run}/record.json")
    row = {"run": run.name, "defences": str(config.defences)}
    row |= {name: getattr(config, name) for name in ("dataset", "scheme", "n_clients", "steps")}
    return row | {name: record.get(name, timing.get(name)) for name in TRAINING_COLUMNS if name not in row}


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, digits: int = 4) -> pd.DataFrame:
    """Make a table of the given columns, numbers rounded so that equal results give equal files."""
    frame = pd.DataFrame(rows, columns=list(columns))
    return frame.round(
        {"client_s_per_sample": 7, "server_s_per_sample": 7} | {c: digits for c in columns if "_s_per_" not in c}
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run the stage that makes it (`dvc repro`)") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: damaged ({error}); run the stage that makes it again") from None
    return content
