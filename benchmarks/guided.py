"""Generation that follows the hint more closely than the ControlNet was taught to: guidance along the control."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.diffusion import sampling
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
    """Generate one image in [-1, 1] per (prompt, hint), guided along prompt and control, each by its own weight.

    A ControlNet that learned from noised hints models p(image | noised hint); the likelihood of the hint to the power
    `control` is as if its noise were smaller by sqrt(control). It is computed from the trained weights alone and costs
    no privacy.

    Args:
        base: the public models.
        controlnet: trained with latent hints; with hidden prompts, the third term is without prompt.
        prompts: what to show.
        hints: in [-1, 1]; as in training, so where layouts were noised, `matched_parts.asked_layout`.
        control: 0: no control, 1: as learned.
        generator: of the initial latents.
        steps: denoising steps of the base's scheduler.
        guidance_scale: weight of the prompt.
        batch: images at a time.
    """
    scheduler = base.pipeline.scheduler
    step = sampling.scheduler_step(scheduler)
    images = []
    for start in range(0, len(prompts), batch):
        text = base.encode_prompts(prompts[start : start + batch])
        hint_latents = base.encode(hints[start : start + batch])
        latents = torch.randn(hint_latents.shape, generator=generator) * scheduler.init_noise_sigma
        scheduler.set_timesteps(steps)
        model = _model(base, controlnet, text, hint_latents, control, guidance_scale)
        images.append(base.decode(sampling.sample(model, latents, scheduler.timesteps, step)))
    return torch.cat(images)


def _model(
    base: Base,
    controlnet: LatentHintControlNet,
    text: Tensor,
    hint_latents: Tensor,
    control: float,
    guidance_scale: float,
) -> sampling.Model:
    """Return e(∅) + guidance_scale (e(prompt) - e(∅)) + control (e(prompt, hint) - e(prompt)).

    Ho & Salimans (2022) with two conditions, as Brooks et al. (2023, eq. 3) combine them.
    """
    empty = base.encode_prompts([""]).expand_as(text)
    known = torch.zeros_like(text) if controlnet.config.hide_prompts else text

    def model(latents: Tensor, timestep: Tensor) -> Tensor:
        timesteps = timestep.expand(len(latents))
        plain, prompted = (base.unet(latents, timesteps, encoder_hidden_states=t).sample for t in (empty, text))
        noise_pred = sampling.guided(plain, prompted, guidance_scale)
        if not control:
            return noise_pred
        alone = prompted if known is text else base.unet(latents, timesteps, encoder_hidden_states=known).sample
        residuals = controlnet(latents, timesteps, known, controlnet_cond=hint_latents)
        return noise_pred + control * (predict_noise(base.unet, latents, timesteps, known, residuals) - alone)

    return model
