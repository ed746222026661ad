"""A noised layout in place of a hint: a ring that shows three numbers, where the drawing is and how large."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.seeds import Source
from splitlab.data.image_set import ImageSet, changed
from splitlab.privacy.draws import noised
from splitlab.split.defences.borrowed_colours import FOR_SENT_HINTS
from splitlab.split.defences.record import STD, Defence, Defences, Noise

LAYOUT_SENSITIVITY = math.sqrt(3.0)
"""How far apart two layouts can be: three numbers, each in [0, 1]."""

PRIOR_MEAN, PRIOR_STD = 0.5, 0.17
"""What anybody may assume of a layout's numbers: noised layouts are drawn in towards that."""

LEAST_EXTENT = 0.05


def replace_hints(data: ImageSet, defences: Defences, draws: Sequence[Source]) -> ImageSet:
    """Replace every hint by its noised layout."""
    return changed(data, hints=laid_out(data.need_hints(), defences.hint_layout_noise, draws))


def layout(hints: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3"]:
    """Reduce hints (white on black, in [-1, 1]) to three numbers in [0, 1]: where the drawing is, and how large.

    Centre of its brightness (x, y) and twice the root mean square distance from it, as shares of the picture's side: of
    a whole ring, centre and diameter. A black hint counts as evenly bright.
    """
    brightness = ((hints.mean(1) + 1.0) / 2.0).clamp_min(0.0).double() + 1e-9
    weight = brightness / brightness.sum((1, 2), keepdim=True)
    rows, columns = _places(hints.shape[2]), _places(hints.shape[3])
    x, y = (weight * columns).sum((1, 2)), (weight * rows[:, None]).sum((1, 2))
    square = (columns - x[:, None, None]).square() + (rows[:, None] - y[:, None, None]).square()
    extent = 2 * (weight * square).sum((1, 2)).sqrt()
    return torch.stack([x, y, extent], 1).clamp(0.0, 1.0).float()


def shrinkage(noise: float) -> float:
    """Return the factor by which a noised layout is drawn in to `PRIOR_MEAN`: the linear estimate of least error."""
    return 1.0 / (1.0 + (noise / PRIOR_STD) ** 2)


def laid_out(hints: Float[Tensor, "n 3 h w"], noise: float, draws: Sequence[Source]) -> Float[Tensor, "n 3 h w"]:
    """Replace each hint by a ring that shows its layout, noised and drawn in (`shrinkage`).

    Args:
        hints: white on black, in [-1, 1].
        noise: standard deviation of Gaussian noise on each of a layout's three numbers.
        draws: one generator per hint.
    """
    numbers = torch.stack([noised(row, noise, draw) for row, draw in zip(layout(hints), draws, strict=True)])
    return rings(PRIOR_MEAN + shrinkage(noise) * (numbers - PRIOR_MEAN), hints.shape[-1])


def sent_layout(hints: Float[Tensor, "n 3 h w"], noise: float) -> Float[Tensor, "n 3"]:
    """Read the noised layout off hints that `laid_out` drew: what they say of the private one, and nothing else."""
    return PRIOR_MEAN + (layout(hints) - PRIOR_MEAN) / shrinkage(noise)


def rings(numbers: Float[Tensor, "n 3"], size: int) -> Float[Tensor, "n 3 s s"]:
    """Draw layouts as white rings on black, a thirty-second of the side wide, soft-edged."""
    x, y, extent = numbers.clamp_min(0.0).T[..., None, None]
    places = _places(size).float()
    distance = ((places - x).square() + (places[:, None] - y).square()).sqrt()
    off = (distance - extent.clamp_min(LEAST_EXTENT) / 2).abs() * 32
    brightness = (1.5 - off).clamp(0.0, 1.0)
    return (2 * brightness - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def _places(size: int) -> Float[Tensor, " s"]:
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


DEFENCES = (
    Defence(
        "hint_layout_noise",
        off=0.0,
        says="once per image, replace its hint by a ring that shows the hint's layout, three numbers in [0, 1], under "
        "Gaussian noise of that standard deviation",
        label="noised layout for a hint, std {:g}",
        place=3,
        touches=("smashed",),
        replaces=replace_hints,
        adds=Noise(lambda defences: defences.hint_layout_noise),
        must=STD,
        excludes=(
            ("hint_noise", "coarse_hints"),
            "hint_layout_noise protects the hint by itself: leave out hint_noise and coarse_hints, or it",
        ),
        refuses_run=FOR_SENT_HINTS,
        usual=(0.1, 0.2, 0.5),
    ),
)
