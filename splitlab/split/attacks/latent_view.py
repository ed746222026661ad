"""What is left between the attacker and the latents once everything that is known has been taken off."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from splitlab.split.defences import unseen_variance
from splitlab.split.defences.matched import feature_scale, label_share, noise_variance, signal_level
from splitlab.split.messages import Knowledge, Observation, stack

FLOOR = 0.03
"""Least standard deviation of a view: rounding to fp16, amplified by 1 / sqrt(ᾱ_T), stays below."""


def labelled(observations: Sequence[Observation], knowledge: Knowledge) -> Observation:
    """Stack messages; where the client kept the noise but returned its loss's gradient, solve that for the noise.

    U-shaped split: the loss is the mean of (k noise_pred - noise)² over a message of N numbers, so
    noise = k noise_pred - N / (2 k) gradient. The server knows its own noise_pred, and k is public
    (`splitlab.split.defences.matched.label_share`).
    """
    return stack([_labelled(observation.float(), knowledge) for observation in observations])


def _labelled(seen: Observation, knowledge: Knowledge) -> Observation:
    if seen.noise is not None or seen.noise_pred_gradient is None or seen.timesteps is None:
        return seen
    noise_pred, gradient = seen.need("noise_pred"), seen.noise_pred_gradient
    k = label_share(knowledge.defences, seen.timesteps, knowledge.base.alphas_cumprod)
    return replace(seen, noise=k * noise_pred - gradient * gradient.numel() / (2 * k))


def latent_view(seen: Observation, knowledge: Knowledge) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n 1 1 1"]]:
    """Reduce each message to latents plus white Gaussian noise: return that sum and the noise's standard deviation.

    The sent map is scale (sqrt(ᾱ) latents + sqrt(1 - ᾱ) noise + σ1 n). With the label, sqrt(1 - ᾱ) noise is
    subtracted and σ1 / sqrt(ᾱ) remains, 0 without feature noise; without it, sqrt(1 - ᾱ + σ1²) / sqrt(ᾱ). Where n was
    drawn once, on the latents, σ1 takes the place of σ1 / sqrt(ᾱ). What other defences add to what is sent
    (`splitlab.split.defences.unseen_variance`) counts as white Gaussian noise of its size.

    Args:
        seen: stacked messages; needs `noisy_latents` and `timesteps`, and takes `noise` where there is one.
        knowledge: the threat model; of the defences, those on the noisy latents matter.
    """
    defences = knowledge.defences
    alphas = signal_level(defences, seen.need("timesteps"), knowledge.base.alphas_cumprod)
    noised, variance = seen.need("noisy_latents") / feature_scale(defences, alphas), torch.zeros_like(alphas)
    if seen.noise is None:
        variance = 1 - alphas
    else:
        noised = noised - (1 - alphas).sqrt() * seen.noise
    unseen = unseen_variance(defences) / feature_scale(defences, alphas) ** 2
    variance = variance + noise_variance(defences, alphas) + unseen
    return noised / alphas.sqrt(), (variance / alphas).sqrt()


def used_fields(seen: Observation, *, prompts: bool = True) -> tuple[str, ...]:
    """Name the sent fields that a latent view is taken from, and the prompt's where it is `prompts` that help, too."""
    label: tuple[str, ...] = ()
    if seen.noise is not None:
        label = ("noise",) if seen.noise_pred is None else ("noise_pred", "noise_pred_gradient")
    text = ("encoder_hidden_states",) if prompts and seen.encoder_hidden_states is not None else ()
    return ("timesteps", "noisy_latents", *label, *text)


def averaged(
    view: Float[Tensor, "n c h w"], std: Float[Tensor, "n 1 1 1"], labels: Int[Tensor, " n"], *, once: bool
) -> tuple[Float[Tensor, "m c h w"], Float[Tensor, "m 1 1 1"]]:
    """Average the views of each image, with weights 1 / std² (the least variance among unbiased estimates).

    Args:
        view, std: latents plus white Gaussian noise, and that noise's standard deviation, above 0.
        labels: which image, 0 to m - 1, each view is of.
        once: the views of one image share their noise, and none of it averages out (`Defences.per_image_noise`).
    """
    weights = 1 / std.square()
    precision = summed(weights, labels)
    counts = summed(torch.ones_like(weights), labels) if once else 1.0
    return summed(view * weights, labels) / precision, (precision / counts).rsqrt()


def summed(values: Tensor, labels: Int[Tensor, " n"]) -> Tensor:
    """Add up the rows of `values` that have one label: row i is the sum of those labelled i."""
    total = torch.zeros(int(labels.max()) + 1, *values.shape[1:], dtype=values.dtype)
    return total.index_add_(0, labels, values)


def matching_timesteps(std: Float[Tensor, "n 1 1 1"], knowledge: Knowledge) -> tuple[Tensor, Float[Tensor, "n 1 1 1"]]:
    """Return the timesteps `[n]` whose diffusion states are as noisy as latents plus noise of `std`, and their ᾱ.

    A state at t is sqrt(ᾱ_t) (latents + s n) with s² = (1 - ᾱ_t) / ᾱ_t: the public U-Net denoises the view there.
    """
    alphas = knowledge.base.alphas_cumprod
    levels = ((1 - alphas) / alphas).sqrt()
    timesteps = (levels[None].log() - std.flatten()[:, None].clamp_min(1e-6).log()).abs().argmin(1)
    return timesteps, alphas[timesteps][:, None, None, None]
