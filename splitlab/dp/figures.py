"""Pictures of private fine-tuning: what each ε costs, and what the models then draw."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure
from torch import Tensor

from splitlab.canvas import DPI, subplots
from splitlab.dp.survey import PUBLIC, REAL
from splitlab.figures import STYLE, show_images

COLOURS = {"attention": "#D55E00", "lora": "#0072B2", "unet": "#009E73", "blocks": "#CC79A7", "transformers": "#E69F00"}


@style.context(["default", STYLE])  # in this house's style, whatever the user's is
def draw_dp_figures(table: pd.DataFrame, pictures: Mapping[str, Tensor], *, out: Path) -> list[Path]:
    """Draw `curve.png` and `samples.png` below `out`; equal inputs give equal bytes.

    Args:
        table: of `splitlab.dp.survey.COLUMNS`.
        pictures: label -> images `[n, 3, h, w]` in [-1, 1], one row each.
        out: folder to write; it is made.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = {"curve": draw_curve(table), "samples": show_images(pictures)}
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI, metadata={"Software": None})
    return paths


def draw_curve(table: pd.DataFrame) -> Figure:
    """Draw accuracy and Fréchet distance by ε, per trainable set: mean over seeds, bars from the least to the most."""
    figure, grid = subplots(1, 2, size=(11.0, 4.2))
    axes = list(grid.flat)
    finite = sorted(e for e in table["epsilon"].dropna().unique() if 0 < e < float("inf"))
    targets = {e: i for i, e in enumerate(_grouped(finite))}
    infinite = len(targets)
    for axis, column, title in (
        (axes[0], "downstream_acc", "accuracy on real digits of a classifier trained on samples"),
        (axes[1], "frechet", f"Fréchet distance ({table['features'].iloc[0]})"),
    ):
        for name, colour in COLOURS.items():
            own = table[table["trainable"] == name]
            places = own["epsilon"].map(lambda e: infinite if e == float("inf") else targets[_nearest(e, targets)])
            grouped = own.groupby(places)[column].agg(["mean", "min", "max"])
            if len(grouped):
                low, high = grouped["mean"] - grouped["min"], grouped["max"] - grouped["mean"]
                axis.errorbar(
                    grouped.index, grouped["mean"], [low, high], marker="o", capsize=3, color=colour, label=name
                )
        for name, dash in ((PUBLIC, ":"), (REAL, "--")):
            value = table[table["trainable"] == name][column].mean()
            axis.axhline(value, color="#7f7f7f", ls=dash, lw=1, label=name)
        axis.set_xticks(range(infinite + 1), [*(f"{e:.3g}" for e in targets), "∞"])
        axis.set_xlabel("ε")
        axis.set_title(title)
    axes[0].legend(fontsize=8)
    return figure


def _grouped(values: list[float]) -> list[float]:
    """Merge ε that differ by less than 5 %: runs meet their target to a part in a thousand."""
    kept: list[float] = []
    for value in values:
        if not kept or value > 1.05 * kept[-1]:
            kept.append(value)
    return kept


def _nearest(value: float, among: Mapping[float, int]) -> float:
    return min(among, key=lambda known: abs(known - value))
