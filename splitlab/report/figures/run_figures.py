"""Pictures, drawn from saved artefacts and plain tensors only. Equal artefacts give equal bytes."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.labels import UNSCORED
from splitlab.core.tables import read_table, write_table
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, load_base
from splitlab.params import load_split
from splitlab.report.figures.overview import Sample, draw_overview
from splitlab.report.figures.style import STYLE, fill, save_figure, subplots
from splitlab.report.figures.survey_figures import draw_frontier, draw_matrix
from splitlab.report.figures.tradeoff_figures import draw_tradeoff
from splitlab.split.artefacts import Recorded, load_reconstruction, read_record, read_samples, read_scores
from splitlab.split.attacks import ATTACKS, REFERENCE, attack_label
from splitlab.split.config import Adversary
from splitlab.split.messages import stack
from splitlab.split.wire import read_transcript, read_truth
from splitlab.study.config import EvaluateConfig
from splitlab.study.results import by_adversary
from splitlab.study.scoring import buckets
from splitlab.study.tradeoff import tradeoff

_PALETTE = ("#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#E69F00", "#0072B2", "#D55E00", "#000000")
"""Okabe & Ito's, which people with any colour vision tell apart."""

_RUN_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_GRID_COLUMNS = 10


def by_strength(attacks: pd.DataFrame) -> list[Adversary]:
    """Return who attacked, weakest first, by mean PSNR over all runs and buckets of the table."""
    means = {who.name: (who, rows["psnr_db"].mean()) for who, rows in by_adversary(attacks).items()}
    order = pd.Series({name: mean for name, (_, mean) in sorted(means.items())}).sort_values(kind="stable")
    return [means[name][0] for name in order.index]


@style.context(["default", STYLE])  # in this module's style, whatever the user's is
def draw_figures(
    runs: Path,
    reconstructions: Path,
    scores: Path,
    metrics: Path,
    params: Mapping[str, Any],
    *,
    out: Path,
    survey: Path | None = None,
) -> list[Path]:
    """Draw every picture of the report as a PNG below `out`; equal inputs give equal bytes.

    Args:
        runs: folder of runs.
        reconstructions: folder of reconstructions, one folder per attacked run.
        scores: folder of per-sample scores.
        metrics: folder of the result tables.
        params: the parameter file's content: which runs and attacks there are, and how they were scored.
        out: folder to write; it is made.
        survey: folder of the survey's transcripts and reconstructions; None: there is none.

    Returns the files: per attacked transcript `grid-<run>.png` and `leakage-<run>.png`, per data set `loss-`,
    `control-` and `samples-<dataset>.png`, `bytes.png`, per data set of the survey `frontier-` and
    `matrix-<dataset>.png`, `overview.png` and `tradeoff.png`. What the last shows is also written, to `tradeoff.csv`.

    Raises:
        InputError: an artefact is missing or damaged.
    """
    training, attacks = (read_table(metrics / f"{name}.csv") for name in ("training", "split_attacks"))
    config = parse(EvaluateConfig, params["evaluate"], where="evaluate")
    base = load_base(params["base"]["source"])
    recorded = [Recorded.of_run(run, runs, reconstructions) for run in params["attacks"]]
    if survey is not None:
        recorded += [Recorded.of_survey(path.name, survey) for path in sorted((survey / "truth").iterdir())]
    drawn = []
    for run in recorded:
        rows = attacks[attacks["run"] == run.name]
        private = load_split(str(rows["dataset"].iloc[0]), "private", params)
        picked, order = pick(run, config), by_strength(rows)
        shown = _reconstructed(run, scores / f"{run.name}.safetensors", order, picked)
        drawn.append(save_figure(draw_grid(run, base, private, picked, shown), out / f"grid-{run.name}.png"))
        drawn.append(save_figure(draw_leakage(rows, order, config), out / f"leakage-{run.name}.png"))
    drawn.append(save_figure(draw_overview(_defended(recorded, base, scores, params)), out / "overview.png"))
    drawn += _draw_trainings(training, runs, out)
    drawn += _draw_verdicts(read_table(metrics / "split_verdicts.csv", empty=True), attacks, out)
    points = tradeoff(metrics, alphas_cumprod=base.alphas_cumprod)
    write_table(points, out / "tradeoff.csv")
    return [*drawn, save_figure(draw_tradeoff(points), out / "tradeoff.png")]


def _draw_verdicts(verdicts: pd.DataFrame, attacks: pd.DataFrame, out: Path) -> Iterator[Path]:
    for dataset, judged in verdicts.groupby("dataset", sort=False):
        yield save_figure(draw_frontier(judged), out / f"frontier-{dataset}.png")
        yield save_figure(draw_matrix(attacks, str(dataset), list(judged["setting"])), out / f"matrix-{dataset}.png")


def _draw_trainings(training: pd.DataFrame, runs: Path, out: Path) -> Iterator[Path]:
    """Draw losses, control and samples of every data set's runs, and the bytes of all."""
    for dataset, rows in training.groupby("dataset", sort=False):
        trained, yardsticks = rows[rows["steps"].notna()], rows[rows["steps"].isna()]
        folders = {name: runs / name for name in trained["run"]}
        yield save_figure(draw_losses(folders), out / f"loss-{dataset}.png")
        yield save_figure(draw_control(folders, trained, yardsticks), out / f"control-{dataset}.png")
        yield save_figure(draw_samples(folders), out / f"samples-{dataset}.png")
    yield save_figure(draw_bytes(training[training["steps"].notna()]), out / "bytes.png")


def _defended(recorded: Sequence[Recorded], base: Base, scores: Path, params: Mapping[str, Any]) -> Sample:
    """Take one sample of the trained run with most defences: of those scored, the nearest to the schedule's middle.

    What is shown is made of it by the attack that identifies most of that run's images.
    """
    runs = [one for one in recorded if one.name in params["attacks"]]
    configs = [read_record(one.record)[1] for one in runs]
    active = [sum(map(bool, asdict(config.defences).values())) for config in configs]
    place = max(range(len(runs)), key=lambda i: (active[i], i))
    run, seen = runs[place], stack(read_transcript(runs[place].transcript).observations)
    truth, scored = read_truth(run.truth), read_scores(scores / f"{run.name}.safetensors")
    attempts = [name for name in sorted(ATTACKS) if f"{name}/0/identified" in scored]
    attack = max(attempts, key=lambda name: float(scored[f"{name}/0/identified"].nanmean()))
    psnr_db = scored[f"{attack}/0/psnr_db"]
    distance = (seen.need("timesteps") - len(base.alphas_cumprod) // 2).abs().float()
    sample = int(distance.masked_fill(psnr_db.isnan(), torch.inf).argmin())
    private = load_split(configs[place].dataset, "private", params)
    original = int(truth.indices[sample])
    rebuilt = load_reconstruction(run.reconstructions / f"{attack}-0.safetensors").result.images
    if rebuilt is None:
        raise InputError(f"{run.name}: {attack} identifies images and recovers none; attack again (`dvc repro`)")
    return Sample(
        private=private.images[original],
        hint=private.need_hints()[original],
        received=base.decode(seen.need("noisy_latents")[sample : sample + 1])[0],
        rebuilt=rebuilt[sample],
        fields=tuple(seen.tensors),
        attack=attack_label(attack),
        psnr_db=float(psnr_db[sample]),
    )


@dataclass(frozen=True)
class Picked:
    """The samples a grid shows: their positions in the transcript, timesteps and places in the private data."""

    positions: Tensor
    timesteps: Tensor
    indices: Tensor


def pick(recorded: Recorded, config: EvaluateConfig) -> Picked:
    """Take the first samples of every timestep bucket, about ten in all, in order of timestep: nothing is hand-picked.

    Raises:
        InputError: the run's truth is missing or holds no sample.
    """
    truth = read_truth(recorded.truth)
    found = buckets(truth.timesteps, config)
    if not found:
        raise InputError(f"{recorded.name}: its transcript holds no sample to show; record the run again")
    each = max(1, _GRID_COLUMNS // len(found))
    chosen = torch.cat([inside[:each] for inside in found.values()])
    chosen = chosen[truth.timesteps[chosen].argsort(stable=True)]
    return Picked(chosen, truth.timesteps[chosen], truth.indices[chosen])


@dataclass(frozen=True)
class Shown:
    """One attack's part of a grid: the images or hints it recovers, with each one's PSNR in dB."""

    images: Tensor | None
    hints: Tensor | None
    psnr_db: Tensor


def _reconstructed(
    recorded: Recorded, scores: Path, order: Sequence[Adversary], picked: Picked
) -> dict[Adversary, Shown]:
    """Load every attack's first try on the picked samples; those that recover no picture are left out."""
    scored = read_scores(scores)
    shown = {}
    for adversary in order:
        attempt = f"{adversary.name}/0"
        result = load_reconstruction(recorded.reconstructions / f"{adversary.name}-0.safetensors").result
        place = scored.get(f"{attempt}/place", torch.arange(len(scored["ceiling_psnr_db"]))).long()[picked.positions]
        images, hints = (None if part is None else part[place] for part in (result.images, result.hints))
        if images is not None or hints is not None:
            measure = "psnr_db" if images is not None else "hint_psnr_db"
            shown[adversary] = Shown(images, hints, scored[f"{attempt}/{measure}"][picked.positions])
    return shown


def draw_grid(
    recorded: Recorded, base: Base, private: ImageSet, picked: Picked, shown: Mapping[Adversary, Shown]
) -> Figure:
    """Draw what was sent and what came back: private images, received latents, each attack, then the hints.

    Args:
        recorded: the transcript.
        base: the public models; the VAE decodes what the server received.
        private: the private data.
        picked: which samples.
        shown: reconstructions of those, weakest attack first.
    """
    seen = stack(read_transcript(recorded.transcript).observations)
    received = base.decode(seen.need("noisy_latents")[picked.positions])
    rows = {"private image": private.images[picked.indices], "what the server receives,\ndecoded": received}
    of_images = {name: one for name, one in shown.items() if one.images is not None}
    rows |= {_wrapped(name): torch.as_tensor(one.images) for name, one in of_images.items()}
    start = len(rows) + 1
    rows["private hint"] = private.need_hints()[picked.indices]
    of_hints = {name: one for name, one in shown.items() if one.hints is not None and one.images is None}
    rows |= {f"hint by {_wrapped(name)}": torch.as_tensor(one.hints) for name, one in of_hints.items()}
    for who, one in of_images.items():
        if who.attack in ATTACKS and ATTACKS[who.attack].shows_hints and not who.denied and one.hints is not None:
            rows[f"hint by {attack_label(who)}"] = one.hints
    n = len(picked.positions)
    figure, axes = subplots(len(rows), n, size=(0.86 * n + 2.3, 0.98 * len(rows) + 0.3))
    fill(axes, rows)
    for axis, timestep in zip(axes[0], picked.timesteps.tolist(), strict=True):
        axis.set_title(f"t = {timestep}", fontsize=9)
    for first, group in ((2, of_images), (start, of_hints)):
        for line, one in zip(axes[first:], group.values(), strict=False):
            for axis, psnr in zip(line, one.psnr_db.tolist(), strict=True):
                label = UNSCORED if math.isnan(psnr) else f"{psnr:.1f} dB"
                axis.text(0.5, -0.03, label, transform=axis.transAxes, ha="center", va="top", fontsize=7.5)
    return figure


def _wrapped(adversary: Adversary) -> str:
    return attack_label(adversary).replace(" (", "\n(").replace(" without ", "\nwithout ").replace(": ", ":\n")


def draw_leakage(rows: pd.DataFrame, order: Sequence[Adversary], config: EvaluateConfig) -> Figure:
    """Draw one run's PSNR and identification against the timestep bucket, with what bounds them.

    Args:
        rows: the run's rows of the attack table.
        order: its attacks, weakest first.
        config: the bucket edges.
    """
    figure, axes = subplots(1, 2, size=(11.0, 4.9))
    left, right = axes[0]
    edges = list(zip(config.buckets, config.buckets[1:], strict=False))
    place = {low: i for i, (low, _) in enumerate(edges)}
    bounds = rows.drop_duplicates("t_low").sort_values("t_low")
    where = [place[low] for low in bounds["t_low"]]
    left.plot(where, bounds["ceiling_psnr_db"], color="#222222", lw=6, alpha=0.22, label="VAE ceiling", zorder=1)
    left.plot(where, bounds["no_info_psnr_db"], color="#555555", ls=":", lw=2, label=attack_label(REFERENCE))
    right.plot(where, bounds["id_chance"], color="#555555", ls="--", lw=1.5, label="chance")
    looks, lines = attack_looks(order), by_adversary(rows)
    for adversary in order:
        own = lines[adversary].sort_values("t_low")
        if adversary.attack == REFERENCE or own["psnr_db"].isna().all():
            continue  # the first is the reference line, the others recover no image
        x = [place[low] for low in own["t_low"]]
        look = looks[adversary]
        left.plot(x, own["psnr_db"], label=attack_label(adversary), **look)
        spread = own["psnr_db_std"]
        left.fill_between(x, own["psnr_db"] - spread, own["psnr_db"] + spread, color=look["color"], alpha=0.12, lw=0)
        right.plot(x, own["id_top1"], **look)
    left.set(title="How close the reconstruction is", ylabel="PSNR, dB (band: ± 1 standard deviation)")
    right.set(title="How often it identifies the private image", ylabel="top-1 identification", ylim=(-0.04, 1.06))
    for axis in (left, right):
        _timestep_axis(axis, edges, set(rows["t_low"]))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9.5)
    return figure


def attack_looks(attacks: Sequence[Adversary]) -> dict[Adversary, dict[str, Any]]:
    """Return matplotlib's keywords for each attack's line: its own colour, or one that no other attack here has."""
    own = {who: ATTACKS[who.attack].colour for who in attacks if who.attack in ATTACKS and not who.denied}
    spare = itertools.cycle([colour for colour in _PALETTE if colour not in own.values()])
    markers = itertools.cycle("oDs^vPX*")
    return {who: {"color": own.get(who) or next(spare), "marker": next(markers), "zorder": 2} for who in attacks}


def _timestep_axis(axis: Axes, edges: Sequence[tuple[int, int]], sent: set[int]) -> None:
    """Label the buckets, and shade those from which no timestep was ever drawn."""
    axis.set_xticks(range(len(edges)), [f"{low}–{high - 1}" for low, high in edges])
    axis.set(xlim=(-0.5, len(edges) - 0.5), xlabel="timestep t (more noise to the right)")
    empty = [i for i, (low, _) in enumerate(edges) if low not in sent]
    for i in empty:
        axis.axvspan(i - 0.5, i + 0.5, color="#bbbbbb", alpha=0.25, lw=0)
    if empty:
        label = "never drawn:\nbelow the timestep floor"
        middle = (empty[0] + empty[-1]) / 2
        axis.text(middle, 0.5, label, transform=axis.get_xaxis_transform(), ha="center", fontsize=8.5, color="#444444")
        axis.texts[-1].set_rotation(90 if len(empty) == 1 else 0)


def draw_losses(runs: Mapping[str, Path], *, window: int = 50) -> Figure:
    """Draw the runs' training losses, each the mean of the last `window` steps."""
    figure, axes = subplots(1, 1, size=(9.0, 4.2))
    axis = axes[0, 0]
    for (name, folder), colour in zip(runs.items(), _RUN_COLOURS * len(runs), strict=False):
        loss = pd.Series(read_record(folder / "record.json", "loss")[0]["loss"])
        axis.plot(loss.rolling(window, min_periods=min(window, len(loss))).mean(), color=colour, label=name, lw=1.6)
    axis.set(xlabel="optimiser step", ylabel=f"training loss (mean of {window} steps)")
    figure.legend(loc="outside right upper")
    return figure


def control_per_image(run: Path, *, shapes: bool) -> Tensor:
    """Score each generated image of a run, `[n]`: disc IoU if `shapes`, else `metrics.edge_control`."""
    hints, images, _ = read_samples(run / "samples.safetensors")
    return metrics.disc_iou(images, hints) if shapes else metrics.edge_control(images, hints)


def draw_control(runs: Mapping[str, Path], trained: pd.DataFrame, yardsticks: pd.DataFrame) -> Figure:
    """Draw how well each run's generated images follow their hints, between no control and the VAE's ceiling."""
    shapes = bool(trained["control_iou"].notna().any())
    column = "control_iou" if shapes else "control_edges"
    figure, axes = subplots(1, 1, size=(9.0, 1.7 + 0.42 * len(runs)))
    axis = axes[0, 0]
    backdrop = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    for i, (name, folder) in enumerate(runs.items()):
        per_image = control_per_image(folder, shapes=shapes)
        error = float(per_image.std() / len(per_image) ** 0.5)
        value = float(trained.set_index("run").loc[name, column])  # type: ignore[arg-type]
        axis.errorbar(value, i, xerr=error, fmt="o", color="#0072B2", ms=8, capsize=4)
        axis.text(value, i - 0.22, f"{value:.2f}", ha="center", va="bottom", fontsize=9, bbox=backdrop)
    for _, row in yardsticks.iterrows():
        ceiling = row["scheme"] == "VAE ceiling"
        colour = "#222222" if ceiling else "#D55E00"
        label = f"VAE's own reconstruction: {row[column]:.2f}" if ceiling else f"no control: {row[column]:.2f}"
        axis.axvline(row[column], color=colour, ls="--" if ceiling else ":", lw=1.8, label=label)
    axis.set_yticks(range(len(runs)), list(runs))
    axis.set(ylim=(len(runs) - 0.5, -0.8), xlim=(0, 1.02) if shapes else (-0.05, 1.1 * float(yardsticks[column].max())))
    overlap, edges = "overlap (IoU) of generated and asked-for disc", "F1 of edges, less that with the hint turned"
    what = overlap if shapes else edges
    axis.set_xlabel(f"{what}; whisker: ± 1 standard error over images")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_samples(runs: Mapping[str, Path]) -> Figure:
    """Draw the first generated images of each run below the hints they were asked to follow."""
    rows: dict[str, Tensor] = {}
    previous = None
    for name, folder in runs.items():
        hints, images = (part[:_GRID_COLUMNS] for part in read_samples(folder / "samples.safetensors")[:2])
        if previous is None or not torch.equal(previous, hints):
            rows["hint" if previous is None else f"hint for {name}"] = hints
        rows[name], previous = images, hints
    n = max(len(images) for images in rows.values())
    figure, axes = subplots(len(rows), n, size=(0.86 * n + 2.0, 0.9 * len(rows)))
    fill(axes, rows)
    return figure


def draw_bytes(trained: pd.DataFrame) -> Figure:
    """Draw the bytes that each run moves per training sample, up and down."""
    figure, axes = subplots(1, 1, size=(9.0, 1.5 + 0.55 * len(trained)))
    axis = axes[0, 0]
    columns = {
        "up_bytes_per_sample": ("client to server", "#0072B2"),
        "down_bytes_per_sample": ("server to client", "#E69F00"),
    }
    largest = max(float(trained[name].max()) for name in columns)
    for (name, (label, colour)), shift in zip(columns.items(), (-0.19, 0.19), strict=True):
        values = trained[name].astype(float)
        heights = [i + shift for i in range(len(trained))]
        axis.barh(heights, values.clip(lower=1.0) - 1.0, left=1.0, height=0.36, color=colour, label=label)
        for height, value in zip(heights, values, strict=True):
            axis.text(max(value, 1.0) * 1.15, height, f"{value:,.0f}" if value else "none", va="center", fontsize=8.5)
    axis.set_xscale("log")
    axis.set_yticks(range(len(trained)), list(trained["run"]))
    axis.set(xlim=(1.0, max(largest, 10.0) * 12), ylim=(len(trained) - 0.5, -0.5))
    axis.set_xlabel("bytes per training sample (logarithmic)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
