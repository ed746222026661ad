"""Pictures of private fine-tuning: what each ε costs, and what the models then draw."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from splitlab.core.seeds import SECRET
from splitlab.privacy.accounting import randomness_of
from splitlab.report.figures.style import STYLE, save_figure, show_images, subplots
from splitlab.study.dp_survey import PUBLIC, REAL, START

COLOURS = {"attention": "#D55E00", "lora": "#0072B2", "unet": "#009E73", "blocks": "#CC79A7", "transformers": "#E69F00"}

CONTRAST_LINES = {PUBLIC: ":", START: "-.", REAL: "--"}


@style.context(["default", STYLE])  # in this house's style, whatever the user's is
def draw_dp_curve(table: pd.DataFrame, *, out: Path) -> Path:
    """Draw what each ε costs to `out`, a PNG; equal inputs give equal bytes. `table`: see `draw_curve`."""
    return save_figure(draw_curve(table), out)


@style.context(["default", STYLE])
def draw_dp_samples(pictures: Mapping[str, Tensor], *, out: Path) -> Path:
    """Draw label -> images `[n, 3, h, w]` in [-1, 1], one row each, to `out`, a PNG; equal inputs give equal bytes."""
    return save_figure(show_images(pictures), out)


def draw_curve(table: pd.DataFrame) -> Figure:
    """Draw accuracy, Fréchet distance and membership by ε, one row of panels per data set, one line per trainable set.

    `table` is one of `splitlab.study.dp_survey.COLUMNS`.
    Lines are means over seeds, bars go from the least to the most. A measure that a data set lacks has no panel, and
    a setting of which a seed was not measured no point.
    """
    datasets = list(table["dataset"].unique())
    figure, grid = subplots(len(datasets), 3, size=(14.0, 0.6 + 3.7 * len(datasets)))
    finite = sorted(e for e in table["epsilon"].dropna().unique() if 0 < e < float("inf"))
    targets = {e: i for i, e in enumerate(_grouped(finite))}
    for line, dataset in zip(grid, datasets, strict=True):
        own = table[table["dataset"] == dataset]
        titles = {
            "downstream_acc": "accuracy on real images,\nlearnt from generated ones",
            "frechet": f"Fréchet distance\n({own['features'].iloc[0]})",
            "mia_auc": "membership inference, AUC\n(0.5: guessing)",
        }
        for axis, (column, title) in zip(line, titles.items(), strict=True):
            if own[column].notna().any():
                _panel(axis, own, column, targets)
                axis.set_title(f"{dataset}: {title}")
            else:
                axis.axis("off")
    handles = {
        text: handle for axis in grid.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, max(1, len(handles))))
    return figure


def _panel(axis: Axes, table: pd.DataFrame, column: str, targets: Mapping[float, int]) -> None:
    """Draw one measure of one data set; ε = ∞ stands to the right of the others."""
    infinite = len(targets)
    for number, (name, colour) in enumerate(COLOURS.items()):
        own = table[table["trainable"] == name]
        places = own["epsilon"].map(lambda e: infinite if e == float("inf") else targets[_nearest(e, targets)])
        own = own[own[column].notna().groupby(places).transform("all")]  # a mean over fewer seeds is another
        grouped = own.groupby(places)[column].agg(["mean", "min", "max"])
        if len(grouped):
            low, high = grouped["mean"] - grouped["min"], grouped["max"] - grouped["mean"]
            where = [place + 0.06 * (number - 1) for place in grouped.index]
            axis.errorbar(where, grouped["mean"], [low, high], marker="o", capsize=3, color=colour, label=name)
    for name, dash in CONTRAST_LINES.items():
        value = table[table["trainable"] == name][column].mean(skipna=False)
        if not pd.isna(value):
            axis.axhline(value, color="#7f7f7f", ls=dash, lw=1.2, label=name)
    if column == "mia_auc":
        axis.axhline(0.5, color="#7f7f7f", lw=1.2, ls=(0, (1, 1)))
    axis.set_xticks(range(infinite + 1), [*(f"{e:.2g}" for e in targets), "∞"])
    runs = table[table["noise_multiplier"].gt(0)]
    axis.set(xlim=(-0.4, infinite + 0.4), xlabel="ε" if randomness_of(runs) == SECRET else "simulated ε")


def _grouped(values: list[float]) -> list[float]:
    """Merge ε that differ by less than 5 %: runs meet their target to a part in a thousand."""
    kept: list[float] = []
    for value in values:
        if not kept or value > 1.05 * kept[-1]:
            kept.append(value)
    return kept


def _nearest(value: float, among: Mapping[float, int]) -> float:
    return min(among, key=lambda known: abs(known - value))
