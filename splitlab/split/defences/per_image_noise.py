"""Noise drawn once per image and used in every epoch: repetition averages nothing out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.seeds import Source
from splitlab.privacy.draws import noised
from splitlab.split.defences.latent_norm import bounded
from splitlab.split.defences.record import FEATURES, Defence, Defences


def noised_per_image(
    defences: Defences,
    latents: Float[Tensor, "b c h w"],
    hint_latents: Float[Tensor, "b c h w"],
    draws: Sequence[Source],
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Bound latents and hint latents; with `per_image_noise`, noise them by one source of draws per image.

    All that the server will ever be sent of an image and its hint is computed from what this returns.
    """
    latents, hint_latents = bounded(defences, latents), bounded(defences, hint_latents)
    if not defences.per_image_noise:
        return latents, hint_latents
    std = torch.tensor([defences.feature_noise, defences.hint_noise])[:, None, None, None]
    pairs = zip(torch.stack([latents, hint_latents], 1), draws, strict=True)
    both = torch.stack([noised(pair, std, draw) for pair, draw in pairs])
    return both[:, 0], both[:, 1]


DEFENCES = (
    Defence(
        "per_image_noise",
        off=False,
        says="draw feature and hint noise once per image, on its latents and hint latents; σ1 is then in units of the "
        "latents",
        label="noise drawn once per image",
        place=30,
        touches=FEATURES,
        needs=(
            ("feature_noise", "hint_noise"),
            "per_image_noise says how noise is drawn: give feature_noise or hint_noise, or leave it out",
        ),
        excludes=(("independent_draws",), "per_image_noise is one draw on the latents: leave out independent_draws"),
    ),
)
