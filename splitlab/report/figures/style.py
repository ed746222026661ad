"""Figures: blank ones that are no part of pyplot's state, rows of images, and files of equal bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from splitlab.core.storage import whole_file

DPI = 110
STYLE = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def subplots(
    *shape: int, size: tuple[float, float], height_ratios: Sequence[float] | None = None
) -> tuple[Figure, Any]:
    """Return a figure of `size` inches and its `shape` of axes, rows equally high or as `height_ratios` say."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots(*shape, squeeze=False, height_ratios=height_ratios)


def show_images(rows: Mapping[str, Tensor], *, scale: float = 0.9) -> Figure:
    """Draw one labelled row of images `[n, 3, h, w]` in [-1, 1] per entry."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(scale * columns + 2.2, scale * len(rows)), squeeze=False, layout="constrained"
    )
    fill(axes, rows)
    return figure


def fill(axes: Any, rows: Mapping[str, Tensor]) -> None:
    """Put one row of images per line of `axes`, its label to the left."""
    for axis in axes.flat:
        axis.axis("off")
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(((image + 1.0) / 2.0).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        line[0].text(-0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure without the versions and dates that would make equal figures differ; return `path`."""
    with whole_file(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=DPI, metadata={"Software": None})
    return path
