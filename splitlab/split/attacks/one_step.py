"""The public U-Net as a denoiser: no training, no label."""

from collections.abc import Sequence
from typing import Annotated

import torch

from splitlab.core.progress import Callback
from splitlab.split.attacks.latent_view import latent_view, used_fields
from splitlab.split.attacks.posterior import POSTERIOR, denoise
from splitlab.split.attacks.record import Attack, Option
from splitlab.split.messages import Knowledge, Observation, Reconstruction, stack


def one_step(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    batch: Annotated[int, Option("samples per U-Net call", least=1)] = 128,
) -> Reconstruction:
    """Predict the noise in the sent noisy latents with the public U-Net and subtract it (Ho et al. 2020, eq. 15).

    The `posterior` attack in one step, without the label and without calibration. Needs `noisy_latents` and
    `timesteps`; uses the prompt where one is sent.
    """
    seen = stack([o.without("noise", "noise_pred", "noise_pred_gradient") for o in observations])
    view, std = latent_view(seen, knowledge)
    latents = denoise(view, std, knowledge, text=seen.encoder_hidden_states, batch=batch, callback=callback)
    return Reconstruction(knowledge.base.decode(latents), used=used_fields(seen), n_evals=1)


ATTACKS = (
    Attack(
        one_step,
        "one-step denoising",
        rank=50,
        family=POSTERIOR,
        reason="the public denoiser removes the diffusion noise",
        colour="#E69F00",
    ),
)
