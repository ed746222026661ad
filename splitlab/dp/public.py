"""Where private fine-tuning starts: the base, fine-tuned on public images first, which spends no privacy."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from splitlab.core.errors import InputError
from splitlab.core.seeds import generator
from splitlab.data.image_set import ImageSet, digest

HANDLES = 3
"""Displacements per axis that a warp interpolates between."""


def warped(images: Float[Tensor, "n c h w"], *, std: float, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Bend images smoothly, each its own way (Simard et al. 2003, elastic distortions, on a grid of 3 x 3 handles).

    Args:
        images: pictures; what lies outside repeats their border.
        std: standard deviation of the handles' displacement, as a share of half the image's edge; 0: no bending.
        generator: of the displacements.

    Raises:
        InputError: a negative or infinite `std`.
    """
    if not 0 <= std < float("inf"):
        raise InputError(f"the std of a warp must be 0 or more and finite, got {std}")
    n, *_, height, width = images.shape
    handles = std * torch.randn((n, 2, HANDLES, HANDLES), generator=generator)
    bend = F.interpolate(handles, size=(height, width), mode="bicubic", align_corners=True)
    straight = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, straight + bend.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def warped_copies(data: ImageSet, copies: int, *, std: float, seed: int = 0) -> ImageSet:
    """Return `copies` warped copies of a data set, one after the other; hints stay as they are.

    Public images are cheap and private ones are not: the more hands the public model has seen, the less is left for
    the private data to teach under noise.

    Raises:
        InputError: no copies, or a `std` that is no number of 0 or more.
    """
    if copies < 1:
        raise InputError(f"copies must be 1 or more, got {copies}")
    bent = [warped(data.images, std=std, generator=generator(seed, "warp", number)) for number in range(copies)]
    return ImageSet(
        torch.cat(bent),
        None if data.hints is None else data.hints.repeat(copies, 1, 1, 1),
        data.prompts * copies,
        data.sources * copies,
        digest({"data": data.digest, "copies": copies, "std": std, "seed": seed, "handles": HANDLES}),
    )
