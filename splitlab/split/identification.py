"""Is a private sample recognised from image and hint together? Scoring only: it needs the truth."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from splitlab.data.image_set import ImageSet
from splitlab.split.config import Defences
from splitlab.split.defences.borrowed_colours import discs
from splitlab.split.defences.random_symmetry import every_turn


def identified_by_both(
    images: Float[Tensor, "n c h w"],
    hints: Float[Tensor, "n d h w"],
    image_gallery: Float[Tensor, "m c h w"],
    hint_gallery: Float[Tensor, "m d h w"],
    gallery_indices: Int[Tensor, "n k"],
    *,
    random_symmetry: bool = False,
) -> Bool[Tensor, " n"]:
    """Say whether the first of each gallery is the one nearest to what was found, in image and hint together.

    Nearest in the sum of the two squared errors, each over the mean that it has for the sample's own image or hint: the
    one that was found more exactly decides (errors Gaussian, of that size; an attacker measures it on public data). A
    tie is a miss. It is what somebody does who holds both reconstructions.

    Args:
        images, hints: what an attack found.
        image_gallery, hint_gallery: the private images and hints.
        gallery_indices: positions in the galleries, the own one first (`splitlab.diffusion.metrics.draw_galleries`).
        random_symmetry: samples were sent turned, nobody knows how: a candidate is compared in all turns; the nearest
            counts.
    """
    total: Tensor | float = 0.0
    for found, gallery in ((images, image_gallery), (hints, hint_gallery)):
        errors = gallery_errors(found, gallery, gallery_indices, random_symmetry=random_symmetry)
        total = total + errors / errors[:, :, 0].min(0).values.mean().clamp_min(1e-12)
    return _first_is_nearest(torch.as_tensor(total))


def gallery_errors(
    found: Float[Tensor, "n c h w"],
    gallery: Float[Tensor, "m c h w"],
    gallery_indices: Int[Tensor, "n k"],
    *,
    random_symmetry: bool,
) -> Float[Tensor, "r n k"]:
    """Return the squared error of what was found to every candidate of its gallery, in r turns of it (else r = 1)."""
    flat, variants = found.flatten(1).double(), every_turn(gallery) if random_symmetry else gallery[None]
    squares = (torch.cdist(flat, variant.flatten(1).double()).square() for variant in variants)
    return torch.stack([square.gather(1, gallery_indices) for square in squares])


def _first_is_nearest(errors: Float[Tensor, "r n k"]) -> Bool[Tensor, " n"]:
    nearest = errors.min(0).values
    return nearest[:, 0] < nearest[:, 1:].min(1).values


def identified_as_sent(
    images: Float[Tensor, "n 3 h w"] | None,
    hints: Float[Tensor, "n 3 h w"] | None,
    private: ImageSet,
    prompts: Sequence[str],
    gallery_indices: Int[Tensor, "n k"],
    defences: Defences,
) -> dict[str, Bool[Tensor, " n"]]:
    """Say who is recognised, every candidate compared as its client could have sent it (`defences.disguised`).

    Args:
        images, hints: what an attack found; None: nothing.
        private: the clients' data.
        prompts: what each message's prompt named. Where colours were borrowed, what was found and every candidate are
            compared as places between ground and disc (`discs`).
        gallery_indices: positions in `private`, the own one first.
        defences: where they turn, a candidate is compared in all turns.

    Returns `image`, `hint` and `both`, as far as they were found.
    """
    gallery, random_symmetry = private.images, defences.random_symmetry
    if images is not None and defences.borrowed_colours:
        images, gallery = discs(images, prompts), discs(gallery, private.prompts)
    known = {}
    if images is not None:
        known["image"] = _first_is_nearest(
            gallery_errors(images, gallery, gallery_indices, random_symmetry=random_symmetry)
        )
    if hints is not None:
        known["hint"] = _first_is_nearest(
            gallery_errors(hints, private.need_hints(), gallery_indices, random_symmetry=random_symmetry)
        )
    if images is not None and hints is not None:
        known["both"] = identified_by_both(
            images, hints, gallery, private.need_hints(), gallery_indices, random_symmetry=random_symmetry
        )
    return known
