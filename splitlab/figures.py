"""Pictures, drawn from saved artefacts and plain tensors only."""

from collections.abc import Mapping

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor


def show_images(rows: Mapping[str, Tensor], *, scale: float = 0.9) -> Figure:
    """Draw one labelled row of images `[n, 3, h, w]` in [-1, 1] per entry."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(scale * columns + 2.2, scale * len(rows)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(((image + 1.0) / 2.0).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        line[0].text(-0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    return figure
