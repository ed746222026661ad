"""Pictures of gradient inversion: what comes back at each timestep, iteration by iteration, and under defences."""

import textwrap
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from splitlab.federated.attacks import NO_INFORMATION, inversion_label
from splitlab.federated.saved import load_inversion
from splitlab.federated.update import read_update_truth
from splitlab.report.figures.style import save_figure, show_images, subplots
from splitlab.study.results import words
from splitlab.study.update_grid import Cell, UpdateConfig
from splitlab.study.update_scores import matched, pictures
from splitlab.study.update_survey import resized

COLUMNS = 9
"""Pictures in a strip."""


def draw_update_figures(
    config: UpdateConfig, table: pd.DataFrame, *, recorded: Path, inversions: Path, out: Path
) -> list[Path]:
    """Draw everything the report shows of the grid.

    Args:
        config: the grid.
        table: what `evaluate_updates` returned.
        recorded, inversions: the folders of updates' truths and of inversions.
        out: folder of the pictures; made anew.

    Returns the files: `strip-<model>.png`, `images-<model>.png`, and `curve.png` where a defence has several levels.
    """
    out.mkdir(parents=True, exist_ok=True)  # of a grid without images too
    paths = []
    image_rows = table[table["ssim"].notna() & (table["attack"] != NO_INFORMATION)]
    for model in image_rows["model"].unique():
        cells = [cell for cell, _, _ in config.cells if cell.model == model and cell.defence == "none"]
        cells = [cell for cell in cells if cell.name in set(image_rows["cell"])]
        if cells:
            best = max(cells, key=lambda cell: len(cell.attacks))
            paths.append(save_figure(draw_strip(best, recorded, inversions), out / f"strip-{model}.png"))
            paths.append(save_figure(draw_cells(cells, recorded, inversions), out / f"images-{model}.png"))
    if len(levels(table)):
        paths.append(save_figure(draw_curve(table), out / "curve.png"))
    return paths


def draw_strip(cell: Cell, recorded: Path, inversions: Path) -> Figure:
    """Draw one update's reconstruction iteration by iteration, one row per attack, the private image last."""
    truth = pictures(read_update_truth(recorded / "truth" / cell.name / "0.safetensors"))
    rows: dict[str, Tensor] = {}
    for spec in cell.attacks:
        saved = load_inversion(inversions / cell.name / f"{spec.name}-0.safetensors")
        if saved.images is None:
            continue
        apart = torch.cdist(saved.images[: cell.together].flatten(1), truth[:1].flatten(1))
        first = int(apart.argmin())  # images of one update come in no order
        history = [image[first] for _, image in saved.history] or [saved.images[first]]
        chosen = torch.linspace(0, len(history) - 1, min(COLUMNS - 1, len(history))).round().long().tolist()
        counts = f"{saved.history[0][0]}–{saved.history[-1][0]}" if saved.history else str(saved.n_evals)
        shown = [history[index] for index in chosen]
        label = f"{_lines(inversion_label(spec.attack, spec.grant))}\n{counts} evaluations"
        rows[label] = torch.stack([*shown, *[shown[-1]] * (COLUMNS - 1 - len(shown)), truth[0]])
    return show_images(rows)


def draw_cells(cells: list[Cell], recorded: Path, inversions: Path) -> Figure:
    """Draw the first image of every cell: the private one, then what each attack made of it."""
    rows: dict[str, list[Tensor]] = {}
    truths = {cell.name: read_update_truth(recorded / "truth" / cell.name / "0.safetensors") for cell in cells}
    size = pictures(truths[cells[0].name]).shape[-1]
    blank = torch.ones(3, size, size)
    for cell in cells:
        rows.setdefault("private", []).append(pictures(truths[cell.name])[0])
    names = {spec.name: _lines(inversion_label(spec.attack, spec.grant)) for cell in cells for spec in cell.attacks}
    for name, label in names.items():
        row = []
        for cell in cells:
            path = inversions / cell.name / f"{name}-0.safetensors"
            images = load_inversion(path).images if path.exists() else None
            truth = pictures(truths[cell.name])
            row.append(blank if images is None else matched(images, truth, cell.together)[0])
        if any(image is not blank for image in row):
            rows[label] = row
    figure = show_images({label: resized(torch.stack(images), size) for label, images in rows.items()})
    for axis, cell in zip(figure.axes, cells, strict=False):
        title = cell.name.removeprefix(f"{cell.model}-").replace("-", "\n")
        axis.set_title(title, fontsize=7)
    return figure


def _lines(label: str) -> str:
    """Break a label into short lines: beside one picture there is no room for more."""
    return "\n".join(textwrap.wrap(label, 20))


def levels(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of updates with Gaussian noise, and of the same updates without, per epsilon gradient."""
    noisy = table[(table["defence"] == "noise")]
    plain = table[table["defence"] == "none"].copy()
    keys = ["model", "dataset", "size", "objective", "update", "t", "batch", "trainable", "dtype"]
    wanted = set(noisy[keys].fillna(-1).itertuples(index=False, name=None))
    same = [row in wanted for row in plain[keys].fillna(-1).itertuples(index=False, name=None)]
    plain = plain[same]
    return pd.concat([plain.assign(level=0.0), noisy]) if noisy["level"].nunique() > 1 else noisy.iloc[:0]


def draw_curve(table: pd.DataFrame) -> Figure:
    """Draw what survives Gaussian noise on the update: SSIM of images, exact timesteps and prompts."""
    rows = levels(table)
    attacked = rows[rows["ssim"].notna() & (rows["attack"] != NO_INFORMATION) & (rows["level"] > 0)]
    with_images = set(attacked["model"])
    figure, axes = subplots(1, 2, size=(11.0, 4.6))
    places = {level: index for index, level in enumerate(sorted(rows["level"].unique()))}
    for axis, columns, title in (
        (axes[0, 0], ("ssim",), "images: SSIM"),
        (axes[0, 1], ("timestep_exact", "prompt_exact"), "share of updates read exactly"),
    ):
        for (model, attack, granted), own in rows.groupby(["model", "attack", "granted"], sort=False, dropna=False):
            for column in columns:
                line = own.dropna(subset=[column]).sort_values("level")
                blind = attack == NO_INFORMATION and (column != "ssim" or model not in with_images)
                if len(line) < 2 or blind:
                    continue
                label = f"{model}: {inversion_label(str(attack), words(granted))}"
                grey = {"color": "#7f7f7f", "ls": "--"} if attack == NO_INFORMATION else {"marker": "o"}
                axis.plot([places[level] for level in line["level"]], line[column], label=label, **grey)
        axis.set(title=title, ylim=(-0.05, 1.05), xlabel="noise std / RMS of each tensor of the update")
        axis.set_xticks(list(places.values()), [f"{level:g}" for level in places])
        axis.legend(fontsize=8, loc="lower left")
    return figure
