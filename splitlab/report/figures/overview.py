"""One picture of it all: what a client holds, what it sends, and what the server makes of that."""

from dataclasses import dataclass
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from splitlab.core.labels import FIELD_WORDS
from splitlab.report.figures.style import DPI, STYLE

CLIENT, SERVER, WIRE = "#0072B2", "#D55E00", "#444444"


@dataclass(frozen=True)
class Sample:
    """One sample, from the client to the attacker; images `[3, h, w]` in [-1, 1].

    Attributes:
        private, hint: what the client holds.
        received: what the server receives in place of the image, decoded: noisy latents.
        rebuilt: what an attack made of it.
        fields: the fields that were sent.
        attack: the attack, in words.
        psnr_db: how close it came.
    """

    private: Tensor
    hint: Tensor
    received: Tensor
    rebuilt: Tensor
    fields: tuple[str, ...]
    attack: str
    psnr_db: float


@style.context(["default", STYLE, {"figure.constrained_layout.use": False}])
def draw_overview(sample: Sample) -> Figure:
    """Draw the client to the left, its message in the middle, and the server with what it rebuilt to the right."""
    figure = Figure(figsize=(10.4, 3.5), dpi=DPI)
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, 10.4), ylim=(0, 3.5))
    canvas.axis("off")
    _box(canvas, (0.15, 0.2, 3.1, 3.1), CLIENT, "the client", "its images and hints never leave it")
    _box(canvas, (6.2, 0.2, 4.05, 3.1), SERVER, "the server", "trains the U-Net, and looks at what it receives")
    _picture(figure, (0.35, 0.72, 1.3), sample.private, "a private image")
    _picture(figure, (1.75, 0.72, 1.3), sample.hint, "its hint")
    _picture(figure, (6.4, 0.72, 1.3), sample.received, "what it receives")
    _picture(figure, (8.75, 0.72, 1.3), sample.rebuilt, f"what it rebuilds, {sample.psnr_db:.0f} dB")
    _arrow(canvas, (3.35, 1.4), (6.1, 1.4), WIRE)
    _arrow(canvas, (7.8, 1.4), (8.65, 1.4), SERVER)
    sent = "\n".join(FIELD_WORDS.get(name, name) for name in sample.fields)
    canvas.text(4.72, 1.55, sent, ha="center", va="bottom", fontsize=9.5, color=WIRE, linespacing=1.45)
    canvas.text(
        4.72, 1.22, "in every training step;\nnothing comes back", ha="center", va="top", fontsize=8.5, color=WIRE
    )
    canvas.text(8.2, 1.5, sample.attack, ha="center", va="bottom", fontsize=8, color=SERVER)
    return figure


def _box(canvas: Axes, place: tuple[float, float, float, float], colour: str, title: str, says: str) -> None:
    left, bottom, width, height = place
    look: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.12", "lw": 1.6, "ec": colour, "fc": colour + "10"}
    canvas.add_patch(FancyBboxPatch((left, bottom), width, height, **look))
    canvas.text(left + 0.15, bottom + height - 0.14, title, va="top", fontsize=12, color=colour, fontweight="bold")
    canvas.text(left + 0.15, bottom + height - 0.46, says, va="top", fontsize=8.5, color=WIRE)


def _picture(figure: Figure, place: tuple[float, float, float], image: Tensor, words: str) -> None:
    left, bottom, side = place
    axis = figure.add_axes((left / 10.4, bottom / 3.5, side / 10.4, side / 3.5))
    axis.imshow(((image + 1.0) / 2.0).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(words, fontsize=8.5, labelpad=4)


def _arrow(canvas: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    canvas.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, lw=1.8, color=colour))
