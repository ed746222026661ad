"""Secret colours: what a client hides that control does not need, before anything else is done."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.seeds import Key, source
from splitlab.data.image_set import ImageSet, changed
from splitlab.privacy.draws import integers

VARIANTS = tuple(itertools.product(itertools.permutations(range(3)), itertools.product((1.0, -1.0), repeat=3)))
"""The 48 symmetries of the cube of colours: an order of red, green and blue, and a sign for each."""


def recolour(images: Float[Tensor, "n 3 h w"], variant: int) -> Float[Tensor, "n 3 h w"]:
    """Return images in [-1, 1] with their colours permuted and inverted as `VARIANTS[variant]` says."""
    order, signs = VARIANTS[variant]
    return images[:, list(order)] * torch.tensor(signs).view(1, 3, 1, 1)


def recoloured(data: ImageSet, *, key: Key) -> ImageSet:
    """Return a data set whose images are each in secret colours of their own, drawn once per image from `key`.

    Where a hint goes does not depend on colours, so a ControlNet can learn it all the same; the server learns an
    image's colours up to 48 variants. Prompts, which name the true colours, are emptied. An image is not hidden by this
    from somebody who looks at it: it takes log2(48) bits from what identifies, beside noise that takes the rest.
    """
    drawn = [int(integers(0, len(VARIANTS), (1,), source("colours", key, i))) for i in range(len(data))]
    images = torch.cat([recolour(image[None], variant) for image, variant in zip(data.images, drawn, strict=True)])
    return changed(data, images=images, prompts=("",) * len(data))
