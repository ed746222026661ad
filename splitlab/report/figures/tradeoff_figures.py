"""The picture of privacy against utility over all schemes."""

import re
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from splitlab.privacy.accounting import epsilon_words
from splitlab.report.figures.style import subplots
from splitlab.study.tradeoff import (
    DP_FULL,
    DP_LDM,
    DP_LORA,
    FEDERATED,
    FEDERATED_DP,
    MATCHED,
    PUBLIC_DATA,
    SPLIT,
    full_name,
)

LOOKS: dict[str, tuple[str, str, str]] = {
    SPLIT: ("o", "#D55E00", "split learning: identification by message"),
    MATCHED: ("D", "#0072B2", "split, matched client: identification by message"),
    FEDERATED: ("s", "#56B4E9", "federated: identification by update"),
    FEDERATED_DP: ("P", "#CC79A7", "federated DP-LDM: identification by share"),
    DP_LDM: ("^", "#009E73", "DP-LDM (attention only): membership"),
    DP_LORA: ("v", "#E69F00", "DP-LoRA: membership"),
    PUBLIC_DATA: ("*", "#1c2430", "trained without private data: nothing to attack"),
    DP_FULL: ("X", "#5b6675", "DP-SGD on the full U-Net: membership"),
}
"""Scheme -> marker, colour (Okabe & Ito's palette), and words for the legend."""

_INK, _SOFT, _LINE = "#1c2430", "#5b6675", "#b8c0ca"
_ROW_INCHES = 0.37
_APART = 0.01
_LOW, _HIGH = -0.14, 1.2


def draw_tradeoff(points: pd.DataFrame) -> Figure:
    """Draw what each setting leaves to the strongest attacker and of the use, photographs apart; labels at the side.

    Args:
        points: of `splitlab.study.tradeoff.COLUMNS`; those that are left out are not drawn, and undefended ones of
            split and federated training only as the corner they make.
    """
    shown = points[points["left_out"].fillna("") == ""]
    photos = shown["dataset"] == "photos"
    panels = {"drawings and digits": shown[~photos], "photographs": shown[photos]}
    panels = {title: own for title, own in panels.items() if len(own) or not len(shown)}
    heights = [_panel_inches(own) for own in panels.values()]
    figure, grid = subplots(len(panels), 1, size=(13.5, sum(heights) + 1.2 + len(panels)), height_ratios=heights)
    for axis, height, (title, own) in zip(grid[:, 0], heights, panels.items(), strict=True):
        _panel(axis, own, height=height)
        axis.set_title(
            f"{title}: utility kept (0 as without private data, 1 as without defence)", loc="left", color=_INK
        )
    axis.set_xlabel("what the strongest attacker still gets: success above chance (0: guessing, 1: always right)")
    _explain(axis, shown)
    marks = {words: mark for axis in grid[:, 0] for mark, words in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=2, fontsize=9.5)
    return figure


def _sides(shown: pd.DataFrame) -> list[pd.DataFrame]:
    """Split points into those labelled on the left and on the right; the corner of no defence has a label already."""
    return [shown[shown["leak"] < 0.5], shown[(shown["leak"] >= 0.5) & (shown["setting"] != "none")]]


def _panel_inches(shown: pd.DataFrame) -> float:
    return max(4.4, _ROW_INCHES * max(len(side) for side in _sides(shown)))


def _panel(axis: Axes, shown: pd.DataFrame, *, height: float) -> None:
    lowest = min(_LOW, float(shown["kept"].min()) - 0.08) if len(shown) else _LOW
    highest = max(_HIGH, float(shown["kept"].max()) + 0.08) if len(shown) else _HIGH
    _backdrop(axis)
    for scheme, (marker, colour, words) in LOOKS.items():
        own = shown[shown["scheme"] == scheme]
        if len(own):
            _scatter(axis, own, marker=marker, colour=colour, words=words)
    gap = (highest - lowest) * _ROW_INCHES / height
    for side, place, align in zip(_sides(shown), (-0.06, 1.06), ("right", "left"), strict=True):
        heights = spread_out(np.sort(side["kept"].to_numpy(float)), gap=gap, lowest=lowest)
        _label(axis, side.sort_values("kept", kind="stable"), heights, place=place, align=align)
    axis.set(xlim=(-0.035, 1.035), ylim=(lowest, highest))
    axis.set(xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[])
    for side_name in ("left", "bottom"):
        axis.spines[side_name].set_color(_LINE)
    axis.tick_params(color=_LINE, labelcolor=_SOFT)


def _backdrop(axis: Axes) -> None:
    """Mark the corners: nothing sent, nothing hidden, and where everybody wants to be."""
    axis.grid(visible=False)
    for at in (0.0, 1.0):
        axis.axhline(at, color=_LINE, lw=0.8, zorder=0)
        axis.axvline(at, color=_LINE, lw=0.8, zorder=0)
    for place, words in ((0.0, "0"), (0.25, "¼"), (0.5, "½"), (0.75, "¾"), (1.0, "1")):
        axis.text(0.983, place, words, color=_SOFT, fontsize=9.5, ha="right", va="center", zorder=1)
        axis.texts[-1].set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    axis.text(0.022, 0.972, "private and useful: the corner to reach", color="#00543a", fontsize=9, va="top")
    axis.texts[-1].set_fontstyle("italic")
    for x, y, words, align in (
        (0, 0, "no information:\nnothing sent, nothing learnt", "left"),
        (1, 1, "no defence", "right"),
    ):
        axis.scatter([x], [y], marker="*", s=420, color="#d9dee5", zorder=1, linewidths=0)
        shift = (0.025, -0.03, "top") if align == "left" else (-0.025, 0.07, "bottom")
        axis.text(x + shift[0], y + shift[1], words, ha=align, va=shift[2], fontsize=9, color=_INK, linespacing=1.3)


def _explain(axis: Axes, shown: pd.DataFrame) -> None:
    """Add to the legend what the smaller marks mean, where there are any."""
    if (shown["image_leak"] < shown["leak"] - _APART).any():
        axis.scatter([], [], marker="o", s=34, facecolors="white", edgecolors=_SOFT, label="by the image alone")
    if (shown["ceiling"] > shown["leak"] + _APART).any():
        words = "what no attacker exceeds: the candidates' holder, or ε"
        axis.scatter([], [], marker="|", s=80, color=_SOFT, linewidths=1.4, label=words)


def _scatter(axis: Axes, own: pd.DataFrame, *, marker: str, colour: str, words: str) -> None:
    """Draw one scheme's points, with what the image alone gives away and what no attacker can exceed."""
    own = own.sort_values("leak", kind="stable")
    for _, row in own.iterrows():
        if row["image_leak"] < row["leak"] - _APART:
            axis.plot([row["image_leak"], row["leak"]], [row["kept"]] * 2, color=colour, lw=1.3, alpha=0.55, zorder=2)
            axis.scatter(
                [row["image_leak"]], [row["kept"]], marker=marker, s=34, facecolors="white", edgecolors=colour, zorder=3
            )
        if row["ceiling"] > row["leak"] + _APART:
            axis.plot([row["leak"], row["ceiling"]], [row["kept"]] * 2, color=colour, lw=0.9, ls=(0, (1, 3)), zorder=1)
            axis.scatter([row["ceiling"]], [row["kept"]], marker="|", s=80, color=colour, linewidths=1.4, zorder=3)
    spread = own["spread"].fillna(0.0) / (own["reference"] - own["floor"])
    axis.errorbar(own["leak"], own["kept"], yerr=spread, fmt="none", ecolor=colour, elinewidth=1.2, alpha=0.6, zorder=2)
    look: dict[str, Any] = {"marker": marker, "s": 74, "color": colour, "edgecolors": "white", "linewidths": 0.8}
    axis.scatter(own["leak"], own["kept"], label=words, zorder=4, **look)


def _label(axis: Axes, rows: pd.DataFrame, heights: np.ndarray, *, place: float, align: str) -> None:
    """Write the labels of one side in a column at these heights, each led to its point."""
    edge = 0.0 if align == "right" else 1.0
    for (_, row), height in zip(rows.iterrows(), heights, strict=True):
        colour = LOOKS[row["scheme"]][1]
        axis.plot(
            [row["leak"], edge + (place - edge) * 0.6, place - (place - edge) * 0.12],
            [row["kept"], height, height],
            color=_LINE, lw=0.7, zorder=1, clip_on=False,
        )  # fmt: skip
        axis.annotate(
            _name(row), (place, height), xytext=(0, 1), textcoords="offset points", ha=align, va="bottom",
            fontsize=9, color=colour, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
        axis.annotate(
            _epsilon(row), (place, height), xytext=(0, -1), textcoords="offset points", ha=align, va="top",
            fontsize=7.6, color=_SOFT, annotation_clip=False,
        )  # fmt: skip


def _name(row: pd.Series) -> str:
    if row["scheme"] in (SPLIT, MATCHED, FEDERATED):
        return str(row["setting"])
    if row["scheme"] == PUBLIC_DATA:
        return PUBLIC_DATA
    name = full_name(row).replace("DP-SGD on the full U-Net", "full U-Net").removesuffix(", shares of one image")
    return name if row["dataset"] in ("digits", "photos") else f"{name}, {row['dataset']}"


def _epsilon(row: pd.Series) -> str:
    """Print the ε of a point, or shortly why it has none."""
    if not pd.isna(row["epsilon"]):
        unit = " per message" if row["scheme"] in (SPLIT, MATCHED) else ""
        return f"{epsilon_words(row['epsilon'], row['randomness'])}{unit}"
    why = str(row["why_no_epsilon"])
    return why if "ε = ∞" in why else f"no ε: {re.split('[;:]', why)[0].replace(' has no ε', '')}"


def spread_out(heights: np.ndarray, *, gap: float, lowest: float = -np.inf) -> np.ndarray:
    """Move ascending heights apart to at least `gap`, as little as can be (least squares), and to `lowest` or above."""
    steps = gap * np.arange(len(heights))
    apart = isotonic_regression(heights - steps).x if len(heights) else steps
    return np.maximum(apart, lowest) + steps
