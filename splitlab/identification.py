"""Is a private sample recognised from image and hint together? Scoring only: it needs the truth."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def identified_by_both(
    images: Float[Tensor, "n c h w"],
    hints: Float[Tensor, "n d h w"],
    image_gallery: Float[Tensor, "m c h w"],
    hint_gallery: Float[Tensor, "m d h w"],
    line_up: Int[Tensor, "n k"],
) -> Bool[Tensor, " n"]:
    """Say whether the first of each line-up is the one nearest to what was found, in image and hint together.

    Nearest in the sum of the two squared errors, each over the mean that it has for the sample's own image or hint: the
    one that was found more exactly decides (errors Gaussian, of that size; an attacker measures it on public data). A
    tie is a miss. It is what somebody does who holds both reconstructions.

    Args:
        images, hints: what an attack found.
        image_gallery, hint_gallery: the private images and hints.
        line_up: positions in the galleries, the own one first (`splitlab.metrics.line_ups`).
    """
    total = torch.zeros(line_up.shape, dtype=torch.float64)
    for found, gallery in ((images, image_gallery), (hints, hint_gallery)):
        errors = torch.cdist(found.flatten(1).double(), gallery.flatten(1).double()).square().gather(1, line_up)
        total += errors / errors[:, 0].mean().clamp_min(1e-12)
    return total[:, 0] < total[:, 1:].min(1).values


def identified_by_likelihood(
    views: Sequence[tuple[Float[Tensor, "n c h w"], Float[Tensor, " n"], Float[Tensor, "m _ c h w"]]],
    line_up: Int[Tensor, "n k"],
) -> Bool[Tensor, " n"]:
    """Say whether the first of each line-up is the likeliest source of what was sent: the ceiling for every attack.

    Nobody who has to choose among a line-up, all as likely before, can be right more often (Bayes' rule errs least).
    It is the attacker who holds the private candidates themselves, so it bounds the catalogue from above.

    Args:
        views: (what is left of the messages, the standard deviations of its white noise, what every private sample
            would leave without noise, `[m, r, c, h, w]`), for image and hint. With r > 1, a sample leaves one of r
            variants, as likely each, the same for all views (or r = 1 where a view does not depend on it).
        line_up: positions of private samples, the own one first.
    """
    total = torch.zeros(*line_up.shape, 1, dtype=torch.float64)
    for view, std, private in views:
        flat = private.flatten(0, 1).flatten(1).double()
        squares = torch.cdist(view.flatten(1).double(), flat).square().unflatten(1, private.shape[:2])
        chosen = squares.gather(1, line_up[..., None].expand(-1, -1, private.shape[1]))
        total = total - chosen / (2 * std.double().square()[:, None, None])
    likelihood = total.logsumexp(2)
    return likelihood[:, 0] > likelihood[:, 1:].max(1).values
