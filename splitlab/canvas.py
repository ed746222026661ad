"""A blank figure that is no part of pyplot's state."""

from typing import Any

from matplotlib.figure import Figure

DPI = 110


def subplots(*shape: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure of `size` inches and its `shape` of axes."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots(*shape, squeeze=False)
