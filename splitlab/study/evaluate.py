"""Reconstructions meet the truth, here and nowhere before; figures and explorer show what was scored here."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from splitlab.core import checkpoint, storage
from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.pixels import finite
from splitlab.core.seeds import generator
from splitlab.core.tables import read_table, write_table
from splitlab.data.colours import are_shapes
from splitlab.data.image_set import ImageSet
from splitlab.data.overlap import refuse_overlap
from splitlab.diffusion.base import Base
from splitlab.params import load_split
from splitlab.split.artefacts import SavedReconstruction, load_reconstruction, read_record
from splitlab.split.config import TrainConfig
from splitlab.split.train import control_scores
from splitlab.study.config import EvaluateConfig
from splitlab.study.scoring import RunTruth, buckets, run_truth, score_samples
from splitlab.study.verdicts import ablations, verdicts

COST = ("dataset", "defences", "control_iou", "eval_loss")
"""Columns of the table of what each defence costs that verdicts need."""

TRAINING_COLUMNS = (
    *("run", "dataset", "scheme", "defences", "n_clients", "steps", "eval_loss", "control_iou", "control_edges"),
    *("up_bytes_per_sample", "down_bytes_per_sample", "client_s_per_sample", "server_s_per_sample", "peak_rss_mb"),
    "server",
)
ATTACK_COLUMNS = (
    *("run", "dataset", "defences", "attack", "knowledge", "t_low", "t_high", "n", "n_seeds", "psnr_db", "psnr_db_std"),
    *("ssim", "mse", "id_top1", "id_chance", "ceiling_psnr_db", "no_info_psnr_db"),
    *("psnr_db_seed_std", "hint_psnr_db", "hint_iou", "hint_id_top1", "prompt_exact", "n_evals", "cpu_s"),
    *("both_id_top1", "randomness"),
)


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
            mean = {name: value.mean().item() for name, value in columns.items()}
            psnr = columns.get("psnr_db", torch.full((1, 1), torch.nan))
            first = tries[0][0]
            rows.append(
                {
                    "run": run,
                    "dataset": known.config.dataset,
                    "defences": str(known.config.defences),
                    "attack": attack,
                    "knowledge": first.knowledge,
                    "t_low": low,
                    "t_high": high,
                    "n": len(chosen),
                    "n_seeds": len(tries),
                    "psnr_db": mean.get("psnr_db"),
                    "psnr_db_std": psnr.std(unbiased=False).item(),
                    "ssim": mean.get("ssim"),
                    "mse": mean.get("mse"),
                    "id_top1": mean.get("identified"),
                    "id_chance": 1.0 / min(config.candidates, len(known.private)),
                    "ceiling_psnr_db": known.ceiling[chosen].mean().item(),
                    "no_info_psnr_db": guess.mean().item(),
                    "psnr_db_seed_std": psnr.mean(1).std(unbiased=False).item(),
                    "hint_psnr_db": mean.get("hint_psnr_db"),
                    "hint_iou": mean.get("hint_iou"),
                    "hint_id_top1": mean.get("hint_identified"),
                    "both_id_top1": mean.get("both_identified"),
                    "prompt_exact": mean.get("prompt_exact"),
                    "n_evals": first.result.n_evals,
                    "randomness": known.config.randomness,
                }
            )
    return rows


def evaluate_run(
    run: Path,
    reconstructions: Path,
    base: Base,
    private: ImageSet,
    config: EvaluateConfig,
    *,
    out: Path,
    every: bool = True,
) -> list[dict[str, Any]]:
    """Score every reconstruction of a run; write the per-sample scores to `out`, return the table's rows.

    Args:
        run: folder with the run's `record.json` and `truth.safetensors`.
        reconstructions: folder with what the attacks left.
        base: the public models.
        private: the private data.
        config: how to score.
        out: file for the per-sample scores.
        every: score every sample; else those only that the table counts.

    Raises:
        InputError: there are no reconstructions, or the no-information row is missing among them.
    """
    known = run_truth(run, base, private)
    saved = [load_reconstruction(path) for path in sorted(reconstructions.glob("*.safetensors"))]
    if "mean_public" not in {s.attack for s in saved}:
        raise InputError(f"{reconstructions}: no reconstruction by mean_public, the no-information row; attack first")
    chosen = None if every else torch.cat(list(buckets(known.truth.timesteps, config).values()))
    scored: dict[str, list[tuple[SavedReconstruction, dict[str, Tensor]]]] = {}
    for one in saved:
        scores = score_samples(one, known, config, localise=are_shapes(private.prompts), chosen=chosen)
        scored.setdefault(one.attack, []).append((one, scores))
    tensors = {
        f"{attack}/{one.seed}/{name}": value
        for attack, tries in scored.items()
        for one, scores in tries
        for name, value in scores.items()
    }
    checkpoint.save(out, tensors | {"ceiling_psnr_db": known.ceiling}, {"run": run.name})
    seconds = _seconds(reconstructions)
    return [row | {"cpu_s": seconds.get(row["attack"])} for row in attack_rows(run.name, known, scored, config)]


def _seconds(reconstructions: Path) -> dict[str, float]:
    """Return each attack's CPU seconds, mean over its seeds; nothing for those that were not timed."""
    tries: dict[str, list[float]] = {}
    for path in reconstructions.glob("*.timing.json"):
        attack = path.name.removesuffix(".timing.json").rpartition("-")[0]
        tries.setdefault(attack, []).append(float(checkpoint.load_json(path, "cpu_s")["cpu_s"]))
    return {attack: sum(own) / len(own) for attack, own in tries.items()}


def evaluate_all(
    runs: Path,
    reconstructions: Path,
    base: Base,
    params: Mapping[str, Any],
    config: EvaluateConfig,
    *,
    scores: Path,
    metrics: Path,
    survey: Path | None = None,
    utility: Path | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every run and every attack; write the tables below `metrics`.

    They are `training.csv`, `split_attacks.csv`, `split_verdicts.csv` and `ablations.csv` (`splitlab.study.verdicts`),
    and `summary.json`.

    Args:
        runs: folder of runs.
        reconstructions: folder of reconstructions, one folder per attacked run.
        base: the public models.
        params: the parameter file's content, for the data sets and the runs to expect.
        config: how to score.
        scores: folder for per-sample scores.
        metrics: folder for the tables.
        survey: folder of the survey, with `truth/` and `reconstructions/`; None: there is none.
        utility: table of what each of the survey's defences costs (`splitlab.study.survey.utility`); None: there is
            none.

    Returns the tables of training and of attacks.

    Raises:
        InputError: something is missing, or public and private data share images.
    """
    names = list(params["runs"])
    configs = {name: parse(TrainConfig, params["runs"][name], where=f"runs.{name}") for name in names}
    training = [training_row(runs / name) for name in names]
    for dataset in dict.fromkeys(one.dataset for one in configs.values()):
        training += yardsticks(dataset, base, load_split(dataset, "heldout", params))
    split = lru_cache(maxsize=None)(lambda dataset: disjoint(dataset, params))
    folders = [(runs / name, reconstructions / name) for name in params["attacks"]]
    if survey is not None:
        surveyed = sorted(path for path in (survey / "truth").iterdir() if path.is_dir())
        folders += [(path, survey / "reconstructions" / path.name) for path in surveyed]
    rows, refused = [], {}
    for run, found in tqdm(folders, desc="evaluate"):
        for path in sorted(found.glob("*.refused.json")):
            refused[run.name, path.name.removesuffix(".refused.json")] = str(
                checkpoint.load_json(path, "reason")["reason"]
            )
        dataset = read_record(run / "record.json")[1].dataset
        out, every = scores / f"{run.name}.safetensors", run.parent == runs
        rows += evaluate_run(run, found, base, split(dataset), config, out=out, every=every)
    training_table, attack_table = table(training, TRAINING_COLUMNS), table(rows, ATTACK_COLUMNS)
    judged = verdicts(attack_table, read_table(utility, *COST) if utility else None, base.alphas_cumprod)
    frames = {"training": training_table, "split_attacks": attack_table, "split_verdicts": judged}
    for name, frame in (frames | {"ablations": ablations(attack_table, refused)}).items():
        write_table(frame, metrics / f"{name}.csv")
    content = summary(training_table, attack_table)
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    storage.write_text(metrics / "summary.json", text + "\n")
    return training_table, attack_table


def disjoint(dataset: str, params: Mapping[str, Any]) -> ImageSet:
    """Return a data set's private split.

    Raises:
        InputError: the attackers' public data share images with it, compared by content.
    """
    splits = {split: load_split(dataset, split, params) for split in ("private", "public")}
    refuse_overlap(splits, dataset=dataset)
    return splits["private"]


def yardsticks(dataset: str, base: Base, heldout: ImageSet, *, samples: int = 64) -> list[dict[str, Any]]:
    """Return training-table rows for no control at all and for the VAE's own reconstruction, on held-out data."""
    asked = heldout.subset(range(min(samples, len(heldout))))
    return [
        {"run": f"({name}: {dataset})", "dataset": dataset, "scheme": name, **control_scores(images, asked)}
        for name, images in without_control(base, asked).items()
    ]


def without_control(base: Base, asked: ImageSet) -> dict[str, Tensor]:
    """Return "no control", what the base makes of the prompts alone, and "VAE ceiling", the images encoded and decoded.

    Both are `[n, 3, s, s]` in [-1, 1].
    """
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
    free = finite(torch.as_tensor(free), "images without control")
    return {"no control": free * 2.0 - 1.0, "VAE ceiling": base.decode(latents)}


def summary(training: pd.DataFrame, attacks: pd.DataFrame) -> dict[str, Any]:
    """Boil the tables down to one number per run and attack, for `dvc metrics show` and `diff`.

    What an attack does not answer with, a data set has no measure for, or was not scored in a bucket is left out.
    """
    control = training.dropna(subset=["steps"]).set_index("run")[["eval_loss", "control_iou", "control_edges"]]
    buckets = attacks.groupby(["run", "attack"])[["psnr_db", "id_top1"]]
    leaks = buckets.mean().where(buckets.count().eq(buckets.size(), axis=0)).round(4)
    told: dict[str, Any] = {"train": per_row(control), "attack": {}}
    for run, part in leaks.dropna(how="all").groupby("run"):
        told["attack"][run] = per_row(part.droplevel("run"))
    return told


def per_row(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return every row as a mapping, by its index, without what is missing."""
    return {str(name): frame.loc[name].dropna().to_dict() for name in frame.index}


def training_row(run: Path) -> dict[str, Any]:
    """Return a run's row of the training table."""
    (record, config), timed = read_record(run / "record.json"), run / "timing.json"
    timing = checkpoint.load_json(timed) if timed.exists() else {}
    row = {"run": run.name, "defences": str(config.defences)}
    row |= {name: getattr(config, name) for name in ("dataset", "scheme", "n_clients", "steps", "server")}
    return row | {name: record.get(name, timing.get(name)) for name in TRAINING_COLUMNS if name not in row}


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, digits: int = 4) -> pd.DataFrame:
    """Make a table of the given columns, numbers rounded so that equal results give equal files."""
    frame = pd.DataFrame(rows, columns=list(columns))
    return frame.round(
        {"client_s_per_sample": 7, "server_s_per_sample": 7} | {c: digits for c in columns if "_s_per_" not in c}
    )
