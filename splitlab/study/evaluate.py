"""Reconstructions meet the truth, here and nowhere before; figures and explorer show what was scored here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from splitlab.core import checkpoint
from splitlab.core.checkpoint import load_json
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
from splitlab.split.attacks import REFERENCE
from splitlab.split.config import Adversary, Defences, TrainConfig, read_defences
from splitlab.split.privacy import message_guarantee
from splitlab.split.train import control_scores
from splitlab.study.config import EvaluateConfig
from splitlab.study.results import KEY, SETTINGS, Results, long_table, settings_table, write_part
from splitlab.study.scoring import RunTruth, buckets, run_truth, score_samples
from splitlab.study.survey import UTILITY_COLUMNS
from splitlab.study.verdicts import ablations, verdicts

NO_INFORMATION_ROW = Adversary(REFERENCE)
"""What every table of attacks must have."""

METRICS = {name: name for name in ("psnr_db", "ssim", "mse", "hint_psnr_db", "hint_iou", "prompt_exact")} | {
    "identified": "id_top1",
    "hint_identified": "hint_id_top1",
    "both_identified": "both_id_top1",
}
"""Score of one sample -> how its mean is called."""

PER_SAMPLE = ("client_s_per_sample", "server_s_per_sample")
TRAINED = (
    *("eval_loss", "control_iou", "control_edges", "up_bytes_per_sample", "down_bytes_per_sample", "peak_rss_mb"),
    *PER_SAMPLE,
)
"""What is measured of a training."""

Tries = Mapping[Adversary, Sequence[tuple[SavedReconstruction, Mapping[str, Tensor]]]]
"""Who attacked -> by seed, the reconstruction and its scores."""


def attack_rows(run: str, known: RunTruth, tries: Tries, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Aggregate scores to table rows: per attack and timestep bucket, over images and attack seeds.

    `psnr_db_std` is the spread over images and seeds together, `psnr_db_seed_std` that of the seeds' means.
    """
    rows = []
    for (low, high), chosen in buckets(known.truth.timesteps, config).items():
        guess = torch.stack([scores["psnr_db"][chosen] for _, scores in tries[NO_INFORMATION_ROW]])
        for adversary, scored in tries.items():
            columns = {name: torch.stack([scores[name][chosen] for _, scores in scored]) for name in scored[0][1]}
            psnr = columns.get("psnr_db", torch.full((1, 1), torch.nan))
            first = scored[0][0].result
            rows.append(
                {"setting": run, "dataset": known.config.dataset, "attack": adversary.attack}
                | {"denied": adversary.denied, "used": first.used, "t_low": low, "t_high": high}
                | {"n": len(chosen), "seeds": len(scored)}
                | {METRICS[name]: value.mean().item() for name, value in columns.items() if name in METRICS}
                | {
                    "psnr_db_std": psnr.std(unbiased=False).item(),
                    "psnr_db_seed_std": psnr.mean(1).std(unbiased=False).item(),
                    "id_chance": 1.0 / min(config.candidates, len(known.private)),
                    "ceiling_psnr_db": known.ceiling[chosen].mean().item(),
                    "no_info_psnr_db": guess.mean().item(),
                    "n_evals": first.n_evals,
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
    """Score every reconstruction of a run; write the per-sample scores to `out`, return lines for the results.

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
    saved = {path: load_reconstruction(path) for path in sorted(reconstructions.glob("*.safetensors"))}
    if NO_INFORMATION_ROW not in {reconstruction.adversary for reconstruction in saved.values()}:
        raise InputError(f"{reconstructions}: no reconstruction by {REFERENCE}, the no-information row; attack first")
    chosen = None if every else torch.cat(list(buckets(known.truth.timesteps, config).values()))
    tries: dict[Adversary, list[tuple[SavedReconstruction, dict[str, Tensor]]]] = {}
    seconds: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for path, reconstruction in saved.items():
        scores = score_samples(reconstruction, known, config, localise=are_shapes(private.prompts), chosen=chosen)
        tries.setdefault(reconstruction.adversary, []).append((reconstruction, scores))
        if (timing := path.with_suffix(".timing.json")).exists():
            who = reconstruction.adversary
            seconds.setdefault((who.attack, who.denied), []).append(float(load_json(timing, "cpu_s")["cpu_s"]))
    tensors = {
        f"{adversary.name}/{reconstruction.seed}/{name}": value
        for adversary, scored in tries.items()
        for reconstruction, scores in scored
        for name, value in scores.items()
    }
    checkpoint.save(out, tensors | {"ceiling_psnr_db": known.ceiling}, {"run": run.name})
    rows = attack_rows(run.name, known, tries, config)
    means = {who: sum(values) / len(values) for who, values in seconds.items()}
    return [row | {"cpu_s": means.get((row["attack"], row["denied"]))} for row in rows]


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
) -> Results:
    """Score every run and every attack; write split training's part of the results, and the tables that show it.

    Besides the views (`splitlab.study.results.VIEWS`) they are `split_verdicts.csv` and `ablations.csv`
    (`splitlab.study.verdicts`).

    Args:
        runs: folder of runs.
        reconstructions: folder of reconstructions, one folder per attacked run.
        base: the public models.
        params: the parameter file's content, for the data sets and the runs to expect.
        config: how to score.
        scores: folder for per-sample scores.
        metrics: folder for the tables.
        survey: folder of the survey, with `truth/` and `reconstructions/`; None: there is none.
        utility: table of what each of the survey's defences costs (`splitlab.study.survey.utility`); None: none.

    Raises:
        InputError: something is missing, or public and private data share images.
    """
    training = list(training_rows(runs, base, params))
    training += [] if utility is None else cost_rows(read_table(utility, *UTILITY_COLUMNS))
    folders = [(runs / name, reconstructions / name) for name in params["attacks"]]
    surveyed = [] if survey is None else sorted(path for path in (survey / "truth").iterdir() if path.is_dir())
    folders += [(path, path.parents[1] / "reconstructions" / path.name) for path in surveyed]
    split = lru_cache(maxsize=None)(lambda dataset: disjoint(dataset, params))
    attacks, refused = [], {}
    for run, made in tqdm(folders, desc="evaluate"):
        for path in sorted(made.glob("*.refused.json")):
            refusal = load_json(path, "attack", "denied", "reason")
            refused[run.name, Adversary(refusal["attack"], tuple(refusal["denied"]))] = str(refusal["reason"])
        private, every = split(read_record(run / "record.json")[1].dataset), run.parent == runs
        attacks += evaluate_run(run, made, base, private, config, out=scores / f"{run.name}.safetensors", every=every)
    settings = pd.DataFrame(training + [survey_setting(path, base) for path in surveyed])
    measured = long_table("split", pd.concat([rounded(training), rounded(attacks)]))
    found = Results(measured, settings_table("split", settings))
    write_part(found, metrics, "split")
    _judge(found, refused, metrics, costed=utility is not None)
    return found


def _judge(found: Results, refused: Mapping[tuple[str, Adversary], str], metrics: Path, *, costed: bool) -> None:
    """Write what follows from the results: verdicts and ablations."""
    attacks = found.view("split_attacks")
    judged = verdicts(attacks, found.view("costs") if costed else None, found.settings.set_index("setting"))
    write_table(judged, metrics / "split_verdicts.csv")
    write_table(ablations(attacks, refused), metrics / "ablations.csv")


def training_rows(runs: Path, base: Base, params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a line for every run that the parameters name, then the yardsticks of their data sets."""
    yield from (training_row(runs / name) for name in params["runs"])
    configs = [parse(TrainConfig, section, where=f"runs.{name}") for name, section in params["runs"].items()]
    for dataset in dict.fromkeys(config.dataset for config in configs):
        yield from yardsticks(dataset, base, load_split(dataset, "heldout", params))


def setting_of(setting: str, kind: str, config: TrainConfig, *, name: str = "") -> dict[str, Any]:
    """Return all facts of a setting of split training; see `splitlab.study.results.SETTINGS`."""
    facts = {key: getattr(config, key) for key in ("dataset", "scheme", "server", "n_clients", "steps", "randomness")}
    return facts | {"setting": setting, "name": name or setting, "kind": kind} | defence_facts(config.defences)


def defence_facts(defences: Defences) -> dict[str, Any]:
    """Return which defences are on: one by one, and in words."""
    return asdict(defences) | {"defences": str(defences)}


def survey_setting(folder: Path, base: Base) -> dict[str, Any]:
    """Return the facts of one of the survey's transcripts: with the ε that one message buys, or why it has none."""
    record, config = read_record(folder / "record.json", "kind", "setting")
    claim = message_guarantee(config.defences, base.alphas_cumprod)
    facts = setting_of(folder.name, str(record["kind"]), config, name=str(record["setting"]))
    return facts | {"epsilon_message": claim.epsilon if claim.events else None, "why_no_epsilon": claim.why}


def cost_rows(utility: pd.DataFrame) -> list[dict[str, Any]]:
    """Return lines of what each of the survey's defences costs, by training seed."""
    rows = []
    for cells in utility.to_dict("records"):
        row = {str(name): value for name, value in cells.items()}
        facts = {"setting": f"cost-{row['dataset']}-{row['setting']}", "name": row["setting"], "kind": "cost"}
        rows.append({"scheme": "split"} | row | facts | defence_facts(read_defences(row["defences"])))
    return rows


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
        {"setting": f"({name}: {dataset})", "name": name, "kind": "yardstick", "dataset": dataset, "scheme": name}
        | control_scores(images, asked)
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


def training_row(run: Path) -> dict[str, Any]:
    """Return a run's line: its setting, and what was measured of its training."""
    (record, config), timed = read_record(run / "record.json"), run / "timing.json"
    timing = load_json(timed) if timed.exists() else {}
    return setting_of(run.name, "trained", config) | {name: record.get(name, timing.get(name)) for name in TRAINED}


def rounded(rows: Sequence[Mapping[str, Any]], *, digits: int = 4) -> pd.DataFrame:
    """Return lines with metrics rounded, so that equal results give equal files."""
    frame = pd.DataFrame(rows)
    metrics = [name for name in frame if name not in KEY and name not in SETTINGS]
    return frame.round({name: 7 if name in PER_SAMPLE else digits for name in metrics})
