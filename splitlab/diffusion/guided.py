"""Generation that follows the hint more closely than the ControlNet was taught to: guidance along the control."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import LatentHintControlNet, predict_noise


@torch.no_grad()
def generate_guided(
    base: Base,
    controlnet: LatentHintControlNet,
    prompts: Sequence[str],
    hints: Float[Tensor, "n 3 s s"],
    *,
    control: float,
    generator: torch.Generator,
    steps: int = 25,
    guidance_scale: float = 2.0,
    batch: int = 64,
) -> Float[Tensor, "n 3 s s"]:
    """Generate one image per (prompt, hint) under classifier-free guidance along prompt and control, each by its own.

    noise_pred = e(∅) + guidance_scale (e(prompt) - e(∅)) + control (e(prompt, hint) - e(prompt)): Ho & Salimans (2022)
    with two conditions, as Brooks et al. (2023, eq. 3) combine them. A ControlNet that learned from noised hints models
    p(image | noised hint); the likelihood of the hint to the power `control` is as if its noise were smaller by
    sqrt(control). It is computed from the trained weights alone and costs no privacy.

    Args:
        base: the public models.
        controlnet: trained with latent hints; with hidden prompts, the third term is without prompt.
        prompts: what to show.
        hints: in [-1, 1]; as in training, so where layouts were noised, `splitlab.split.surrogates.asked_layout`.
        control: 0: no control, 1: as learned.
        generator: of the initial latents.
        steps: denoising steps of the base's scheduler.
        guidance_scale: weight of the prompt.
        batch: images at a time.

    Returns images in [-1, 1].
    """
    scheduler = base.pipeline.scheduler
    images = []
    for start in range(0, len(prompts), batch):
        text = base.encode_prompts(prompts[start : start + batch])
        empty = base.encode_prompts([""]).expand_as(text)
        hint_latents = base.encode(hints[start : start + batch])
        latents = torch.randn(hint_latents.shape, generator=generator) * scheduler.init_noise_sigma
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            noise_pred = _noise_pred(
                base,
                controlnet,
                latents,
                timestep.expand(len(latents)),
                (text, empty),
                hint_latents,
                control,
                guidance_scale,
            )
            latents = scheduler.step(noise_pred, timestep, latents).prev_sample
        images.append(base.decode(latents))
    return torch.cat(images)


def _noise_pred(
    base: Base,
    controlnet: LatentHintControlNet,
    latents: Tensor,
    timesteps: Tensor,
    texts: tuple[Tensor, Tensor],
    hint_latents: Tensor,
    control: float,
    guidance_scale: float,
) -> Tensor:
    text, empty = texts
    plain = base.unet(latents, timesteps, encoder_hidden_states=empty).sample
    prompted = base.unet(latents, timesteps, encoder_hidden_states=text).sample
    noise_pred: Tensor = plain + guidance_scale * (prompted - plain)
    if not control:
        return noise_pred
    known, alone = text, prompted
    if controlnet.config.hide_prompts:
        known = torch.zeros_like(text)
        alone = base.unet(latents, timesteps, encoder_hidden_states=known).sample
    residuals = controlnet(latents, timesteps, known, controlnet_cond=hint_latents)
    return noise_pred + control * (predict_noise(base.unet, latents, timesteps, known, residuals) - alone)
