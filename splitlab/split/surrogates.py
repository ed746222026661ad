"""What a client puts in place of images and hints before anything is encoded: other colours, a noised layout."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key, Source, source
from splitlab.data.colours import COLOURS, are_shapes, rgb, split_prompt
from splitlab.data.image_set import ImageSet, changed
from splitlab.privacy.draws import integers, noised
from splitlab.split.config import Defences

LAYOUT_SENSITIVITY = math.sqrt(3.0)
"""How far apart two layouts can be: three numbers, each in [0, 1]."""

PRIOR_MEAN, PRIOR_STD = 0.5, 0.17
"""What anybody may assume of a layout's numbers: noised layouts are drawn in towards that."""

LEAST_CONTRAST = 0.25 * math.sqrt(3.0)
"""Distance in RGB between borrowed colours: that of the shapes themselves."""

LEAST_EXTENT = 0.05

SYMMETRIES = 8
"""Of the square: four quarter turns, and the same in a mirror."""


def disguises(defences: Defences) -> bool:
    """Say whether these defences change images or hints before they are encoded."""
    return defences.borrowed_colours or defences.random_symmetry or defences.hint_layout_noise > 0


def disguised(data: ImageSet, defences: Defences, *, key: Key) -> ImageSet:
    """Return a data set as its client uses it: every image and hint is replaced once, whatever is sent of it later.

    Args:
        data: the client's own images, hints and prompts.
        defences: `borrowed_colours`, `hint_layout_noise` and `random_symmetry` count; without any, `data` is returned.
        key: what the draws follow from.

    Raises:
        InputError: colours are to be borrowed and the prompts do not name any.
    """
    if not disguises(defences):
        return data
    draws = [source("disguise", key, index) for index in range(len(data))]
    new: dict[str, Any] = {}
    hints = data.need_hints()
    if defences.borrowed_colours:
        if not are_shapes(data.prompts):
            raise InputError(
                "borrowed_colours needs prompts '<colour> circle with <colour> background', which say what to "
                "recolour; these are others: switch it off"
            )
        prompts = tuple(borrowed_prompt(draw) for draw in draws)
        new |= {"images": in_colours(data.images, data.prompts, prompts), "prompts": prompts}
    if defences.random_symmetry:
        turns = [int(integers(0, SYMMETRIES, (1,), draw)) for draw in draws]
        images = new.get("images", data.images)
        new["images"] = torch.stack([turn(one, by) for one, by in zip(images, turns, strict=True)])
        new["hints"] = hints = torch.stack([turn(one, by) for one, by in zip(hints, turns, strict=True)])
    if defences.hint_layout_noise:
        new["hints"] = laid_out(hints, defences.hint_layout_noise, draws)
    return changed(data, **new)


def turn(pictures: Float[Tensor, "*n h w"], by: int) -> Float[Tensor, "*n h w"]:
    """Turn square pictures by symmetry `by` of the square: 0 to 3 quarter turns, from 4 on mirrored before."""
    return (pictures.flip(-1) if by >= SYMMETRIES // 2 else pictures).rot90(by % 4, (-2, -1))


def every_turn(pictures: Float[Tensor, "m c h w"]) -> Float[Tensor, "r m c h w"]:
    """Return square pictures in all `SYMMETRIES`."""
    return torch.stack([turn(pictures, by) for by in range(SYMMETRIES)])


def borrowed_prompt(draw: Source) -> str:
    """Draw a shapes prompt of two public colours, at least `LEAST_CONTRAST` apart, that says nothing of any image."""
    names = list(COLOURS)
    while True:
        disc, ground = (names[int(integers(0, len(names), (1,), draw))] for _ in range(2))
        if math.dist(rgb(disc), rgb(ground)) >= LEAST_CONTRAST:
            return f"{disc} circle with {ground} background"


def in_colours(
    images: Float[Tensor, "n 3 h w"], prompts: Sequence[str], new: Sequence[str]
) -> Float[Tensor, "n 3 h w"]:
    """Recolour shapes in [-1, 1] from the two colours that `prompts` name to those that `new` name.

    A pixel keeps its place between the two, in [0, 1] from ground to disc (`discs`): nothing else of it is kept.
    """
    disc, ground = colours_of(new)
    return ground + discs(images, prompts) * (disc - ground)


def discs(images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "n 1 h w"]:
    """Return each pixel's place between ground (0) and disc (1), from the colours that the prompt names."""
    disc, ground = colours_of(prompts)
    towards = disc - ground
    place = ((images - ground) * towards).sum(1, keepdim=True) / towards.square().sum(1, keepdim=True)
    return place.clamp(0.0, 1.0)


def colours_of(prompts: Sequence[str]) -> tuple[Float[Tensor, "n 3 1 1"], Float[Tensor, "n 3 1 1"]]:
    """Return the disc's and the ground's colours, in [-1, 1], that shapes prompts name."""
    pairs = [[rgb(name) for name in split_prompt(prompt)] for prompt in prompts]
    values = torch.tensor(pairs)[..., None, None] * 2.0 - 1.0
    return values[:, 0], values[:, 1]


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


def asked_layout(hints: Float[Tensor, "n 3 h w"], noise: float, *, control: float) -> Float[Tensor, "n 3 h w"]:
    """Return the hints by which a ControlNet that learned from noised layouts is to be asked for these discs.

    It learned p(disc | noised layout y), a Gaussian around the drawn-in layout if layouts are, before noise, of mean μ
    and variance s². Guidance g along the control (`splitlab.diffusion.guided`) makes it p(disc) (p(disc | y) /
    p(disc))^g, of mean x for y = μ + (x - μ) (1 + noise² / (g s²)): so far out a layout is asked for, then drawn in as
    in training.

    Args:
        hints: of what is wanted; white on black, in [-1, 1].
        noise: standard deviation of the noise in training; 0: hints as they are.
        control: guidance along the control; below 1 as at 1.
    """
    if not noise:
        return hints
    further = 1.0 + (noise / PRIOR_STD) ** 2 / max(control, 1.0)
    numbers = PRIOR_MEAN + shrinkage(noise) * further * (layout(hints) - PRIOR_MEAN)
    return rings(numbers, hints.shape[-1])


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
