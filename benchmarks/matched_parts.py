"""What only the experiments on matched clients use: secret colours, asking for noised layouts, the attacks' ceiling."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from splitlab.core.seeds import Key, source
from splitlab.data.image_set import ImageSet, changed
from splitlab.privacy.draws import integers
from splitlab.split.defences.hint_layout_noise import PRIOR_MEAN, PRIOR_STD, layout, rings, shrinkage

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


def identified_by_likelihood(
    views: Sequence[tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"], Float[Tensor, "m _ c h w"]]],
    gallery_indices: Int[Tensor, "n k"],
) -> Bool[Tensor, " n"]:
    """Say whether the first of each gallery is the likeliest source of what was sent: the ceiling for every attack.

    Nobody who has to choose among a gallery, all as likely before, can be right more often (Bayes' rule errs least).
    It is the attacker who holds the private candidates themselves, so it bounds the catalogue from above.

    Args:
        views: (what is left of the messages, the standard deviations of its white noise, what every private sample
            would leave without noise, `[m, r, c, h, w]`), for image and hint. With r > 1, a sample leaves one of r
            variants, as likely each, the same for all views (or r = 1 where a view does not depend on it).
        gallery_indices: positions of private samples, the own one first.
    """
    total = torch.zeros(*gallery_indices.shape, 1, dtype=torch.float64)
    for view, std, private in views:
        flat = private.flatten(0, 1).flatten(1).double()
        squares = torch.cdist(view.flatten(1).double(), flat).square().unflatten(1, private.shape[:2])
        chosen = squares.gather(1, gallery_indices[..., None].expand(-1, -1, private.shape[1]))
        total = total - chosen / (2 * std.double().square()[:, None, None])
    likelihood = total.logsumexp(2)
    return likelihood[:, 0] > likelihood[:, 1:].max(1).values
