"""A secret symmetry of the square per image: what is sent says no more than up to eight places."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.seeds import Source
from splitlab.data.image_set import ImageSet, changed
from splitlab.privacy.draws import integers
from splitlab.split.defences.borrowed_colours import FOR_SENT_HINTS
from splitlab.split.defences.record import FEATURES, Defence, Defences

SYMMETRIES = 8
"""Of the square: four quarter turns, and the same in a mirror."""


def turn_each(data: ImageSet, defences: Defences, draws: Sequence[Source]) -> ImageSet:
    """Turn every image and its hint alike."""
    turns = [int(integers(0, SYMMETRIES, (1,), draw)) for draw in draws]
    images, hints = (
        torch.stack([turn(picture, by) for picture, by in zip(pictures, turns, strict=True)])
        for pictures in (data.images, data.need_hints())
    )
    return changed(data, images=images, hints=hints)


def turn(pictures: Float[Tensor, "*n h w"], by: int) -> Float[Tensor, "*n h w"]:
    """Turn square pictures by symmetry `by` of the square: 0 to 3 quarter turns, from 4 on mirrored before."""
    return (pictures.flip(-1) if by >= SYMMETRIES // 2 else pictures).rot90(by % 4, (-2, -1))


def every_turn(pictures: Float[Tensor, "m c h w"]) -> Float[Tensor, "r m c h w"]:
    """Return square pictures in all `SYMMETRIES`."""
    return torch.stack([turn(pictures, by) for by in range(SYMMETRIES)])


DEFENCES = (
    Defence(
        "random_symmetry",
        off=False,
        says="once per image, turn image and hint by one of the eight symmetries of the square, drawn at random",
        label="secretly turned",
        place=2,
        touches=FEATURES,
        replaces=turn_each,
        refuses_run=FOR_SENT_HINTS,
    ),
)
