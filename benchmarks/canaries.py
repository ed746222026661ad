"""Extraction of duplicated canaries: does a fine-tuned model generate an image that it was shown too often?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.dp.sample import Tuned, sample


@dataclass(frozen=True)
class Extraction:
    """How near a model's samples come to an image.

    Attributes:
        extracted: share of the samples that are copies: their distance ratio is below 1.
        ratio: smallest distance ratio of all samples.
        image: `[3, h, w]` the sample that has it.
        n: number of samples.
    """

    extracted: float
    ratio: float
    image: Tensor
    n: int


def insert(private: ImageSet, canary: ImageSet, times: int) -> ImageSet:
    """Return the private data with one canary in it `times` times.

    (ε, δ) is a guarantee per sample. What is in the data r times is a group of r, and is promised about r ε only
    (Dwork & Roth 2014, thm 2.2).

    Raises:
        InputError: it is not one image, or of another size, or `times` is negative.
    """
    if len(canary) != 1 or canary.size != private.size or times < 0:
        raise InputError(
            f"a canary is one image of the private data's size, inserted 0 or more times; got {len(canary)} of "
            f"{canary.size} pixels for data of {private.size}, {times} times"
        )
    hinted = private.hints is not None and canary.hints is not None
    both = ImageSet(
        images=torch.cat([private.images, canary.images]),
        hints=torch.cat([private.need_hints(), canary.need_hints()]) if hinted else None,
        prompts=(*private.prompts, *canary.prompts),
        sources=(*private.sources, *canary.sources),
        digest="",
    )
    return both.subset([*range(len(private)), *[len(private)] * times])


def distance_ratio(
    generated: Float[Tensor, "g 3 h w"],
    canary: Float[Tensor, "3 h w"],
    others: Float[Tensor, "m 3 h w"],
    *,
    neighbours: int = 50,
    alpha: float = 0.5,
) -> Float[Tensor, " g"]:
    """Return distance to the canary / (α mean distance to the nearest other images) (Carlini et al. 2023, sec. 4.2).

    Below 1 a sample is a copy: much nearer to the canary than samples are to images they resemble by being alike. The
    distance is Euclidean over pixels.

    Args:
        generated: samples in [-1, 1].
        canary: the image that may have been copied.
        others: images of the same kind, the canary not among them.
        neighbours: how many of the nearest others set the scale; all, if there are fewer.
        alpha: a copy must be nearer than this share of it.

    Raises:
        InputError: there are no other images, or the canary is among them.
    """
    flat, own, rest = generated.flatten(1).double(), canary.flatten().double(), others.flatten(1).double()
    if not len(rest):
        raise InputError("a distance means nothing without other images to compare it with; give some")
    if bool((rest == own).all(1).any()):
        raise InputError("the canary is among the other images, so every copy would seem ordinary; take it out")
    nearest = torch.cdist(flat, rest).topk(min(neighbours, len(rest)), dim=1, largest=False).values.mean(1)
    return (flat - own).norm(dim=1) / (alpha * nearest).clamp_min(1e-12)


def extract(
    base: Base,
    tuned: Tuned,
    canary: ImageSet,
    others: Float[Tensor, "m 3 h w"],
    *,
    generator: torch.Generator,
    n: int = 64,
    steps: int = 25,
    guidance: float = 1.0,
) -> Extraction:
    """Sample with the canary's own prompt and look for copies of it.

    To be read beside the same for an image that was never inserted: simple images are hit by chance.

    Args:
        base: the public models.
        tuned: the fine-tuned model.
        canary: one image with its prompt.
        others: see `distance_ratio`.
        generator: of the samples.
        n: how many samples.
        steps, guidance: see `splitlab.dp.sample.sample`.

    Raises:
        InputError: `canary` is not one image; see `distance_ratio`.
    """
    if len(canary) != 1:
        raise InputError(f"a canary is one image, got {len(canary)}")
    asked: Sequence[str] | int = n if tuned.conditioning == "none" else [canary.prompts[0]] * n
    images = sample(base, tuned, asked, generator=generator, steps=steps, guidance=guidance, size=canary.size)
    ratios = distance_ratio(images, canary.images[0], others)
    best = int(ratios.argmin())
    share = float((ratios < 1).double().mean())
    return Extraction(share, float(ratios[best]) if n else math.inf, images[best], n)
