"""A bound on what noise hides: without one, no noise earns a privacy guarantee."""

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.split.defences.record import FEATURES, Defence, Defences


def bounded(defences: Defences, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scale latents down to `latent_norm` where their L2 norm exceeds it."""
    if not defences.latent_norm:
        return latents
    norms = torch.linalg.vector_norm(latents.flatten(1), dim=1).clamp_min(1e-12)
    return latents * (defences.latent_norm / norms).clamp_max(1.0)[:, None, None, None]


DEFENCES = (
    Defence(
        "latent_norm",
        off=0.0,
        says="L2 norm to which a sample's image latents and hint latents are scaled down, each for itself, where they "
        "exceed it",
        label="latents bounded to norm {:g}",
        place=20,
        touches=FEATURES,
        must="is a norm and must be 0 or more (0: off)",
        usual=(10.0, 5.0, 2.0, 1.0),
    ),
)
