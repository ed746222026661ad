"""The public U-Net as a denoiser: no training, no label."""

from collections.abc import Sequence

import torch

from splitlab.types import Callback, Knowledge, Observation, Reconstruction, stack


@torch.no_grad()
def one_step(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    batch: int = 128,
) -> Reconstruction:
    """Predict the noise in the sent noisy latents with the public U-Net and subtract it (Ho et al. 2020, eq. 15).

    Needs `noisy_latents` and `timesteps`; uses the prompt where one is sent, and no label.
    """
    seen, base = stack(observations), knowledge.base
    noisy_latents, timesteps = seen.need("noisy_latents"), seen.need("timesteps")
    used = [name for name in ("timesteps", "noisy_latents", "encoder_hidden_states") if name in seen.tensors]
    text = seen.encoder_hidden_states
    if text is None:
        text = torch.zeros(len(timesteps), *base.text_shape)
    images = []
    for part in torch.arange(len(timesteps)).split(batch):
        noise_pred = base.unet(noisy_latents[part], timesteps[part], encoder_hidden_states=text[part]).sample
        images.append(base.decode(base.denoised(noisy_latents[part], noise_pred, timesteps[part])))
        if callback:
            callback("one_step", len(images) * batch, len(timesteps), 0.0)
    return Reconstruction(torch.cat(images), used=tuple(used), n_evals=1)
