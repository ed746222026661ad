"""A blank figure that is no part of pyplot's state."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

DPI = 110


def subplots(
    *shape: int, size: tuple[float, float], height_ratios: Sequence[float] | None = None
) -> tuple[Figure, Any]:
    """Return a figure of `size` inches and its `shape` of axes, rows equally high or as `height_ratios` say."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots(*shape, squeeze=False, height_ratios=height_ratios)
