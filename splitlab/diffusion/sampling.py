"""The one denoising loop: every sampler is this loop, a model and a step (the pattern of k-diffusion's `sampling.py`).

What a level of noise is told by is up to model and step: a timestep, timesteps `[b]`, or a `Level`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from splitlab.core.progress import Callback
from splitlab.diffusion.base import denoised, noised

Model = Callable[[Tensor, Any], Tensor]
"""`(x, here) -> noise_pred`."""

Step = Callable[[Tensor, Tensor, Any, Any], Tensor]
"""`(x, noise_pred, here, there) -> x` at the next level; `there` is None where that is the data."""


def sample(
    model: Model,
    x: Float[Tensor, "b c h w"],
    levels: Sequence[Any] | Tensor,
    step: Step,
    *,
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """Go from noise to data.

    Args:
        model: predicts the noise.
        x: the start, at the first level.
        levels: of noise, falling; the data come after the last.
        step: goes from one to the next.
        callback: told of every step.
    """
    for number, (here, there) in enumerate(zip(levels, [*levels[1:], None], strict=True), start=1):
        x = step(x, model(x, here), here, there)
        if callback:
            callback("sample", number, len(levels), 0.0)
    return x


def guided(away: Tensor, towards: Tensor, weight: float) -> Tensor:
    """Combine noise predictions without and with a condition (Ho & Salimans 2022, eq. 6 with 1 + w = `weight`)."""
    return away + weight * (towards - away)


def scheduler_step(scheduler: SchedulerMixin) -> Step:
    """Return the step of a scheduler of diffusers, its `set_timesteps` called; it keeps to its own timesteps."""
    return lambda x, noise_pred, here, there: scheduler.step(noise_pred, here, x).prev_sample


def ddim_step(alphas_cumprod: Float[Tensor, " T"]) -> Step:
    """Return DDIM's step without fresh noise (Song et al. 2021, eq. 12), differentiable; levels are timesteps."""

    def signal(timesteps: int | Tensor | None) -> Tensor:
        return (torch.ones(1) if timesteps is None else alphas_cumprod[timesteps]).view(-1, 1, 1, 1)

    def step(x: Tensor, noise_pred: Tensor, here: int | Tensor, there: int | Tensor | None) -> Tensor:
        clean = denoised(x, noise_pred, signal(here))
        return noised(clean, noise_pred, signal(there))

    return step


class Level(NamedTuple):
    """Noise of standard deviation `std` `[b, 1, 1, 1]` on data, as in the diffusion states of `timesteps` `[b]`."""

    timesteps: Int[Tensor, " b"]
    std: Float[Tensor, "b 1 1 1"]


def level_model(unet: Module, text: Tensor, *, blank: Tensor | None = None, guidance: float = 1.0) -> Model:
    """Return a U-Net's noise prediction in data plus noise: over sqrt(1 + std²), that is a diffusion state.

    Args:
        unet: text-conditional.
        text: `[b, l, d]` what conditions it.
        blank: the text to be guided away from; None: not guided.
        guidance: its weight.
    """

    def model(x: Tensor, level: Level) -> Tensor:
        state = x / (1 + level.std.square()).sqrt()
        predicted = unet(state, level.timesteps, encoder_hidden_states=text).sample
        if blank is None:
            return predicted
        return guided(unet(state, level.timesteps, encoder_hidden_states=blank).sample, predicted, guidance)

    return model


def level_step(eta: float = 0.0, generator: torch.Generator | None = None) -> Step:
    """Return DDIM's step between `Level`s, `eta` of it fresh noise (Song et al. 2021, eq. 12 and 16, over sqrt(ᾱ)).

    From std to s: x ← clean + sqrt(s² - u²) noise_pred + u z with u² = eta² s² (1 - s² / std²), z ~ N(0, 1).
    """

    def step(x: Tensor, noise_pred: Tensor, here: Level, there: Level | None) -> Tensor:
        clean = x - here.std * noise_pred  # Ho et al. 2020, eq. 15
        if there is None:
            return clean
        variance, lower = there.std.square(), there.std
        fresh = eta * lower * (1 - variance / here.std.square()).clamp_min(0).sqrt()
        x = clean + (variance - fresh.square()).clamp_min(0).sqrt() * noise_pred
        return x + fresh * torch.randn(x.shape, generator=generator) if eta else x

    return step
