"""The matched client: it names the timestep that its noised message then has, so that the public U-Net still fits it.

It sends (noisy_latents + σ1 n) / sqrt(1 + σ1²), n ~ N(0, 1), and the timestep s of the noise level that this has:
ᾱ_s = ᾱ / (1 + σ1²). With `per_image_noise` it is (sqrt(ᾱ) (latents + σ1 n) + sqrt(1 - ᾱ) noise) / sqrt(1 + ᾱ σ1²), and
ᾱ_s = ᾱ / (1 + ᾱ σ1²).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from splitlab.diffusion.base import noised as diffused
from splitlab.split.defences.record import Defence, Defences


def noise_variance(defences: Defences, alphas: Tensor) -> Tensor | float:
    """Return the variance of the feature noise in the noised latents, before scaling: σ1², or ᾱ σ1² if drawn once.

    What is drawn once per image is added to its latents and so is scaled with them.
    """
    return alphas * defences.feature_noise**2 if defences.per_image_noise else defences.feature_noise**2


def sent_timesteps(
    defences: Defences, timesteps: Int[Tensor, " b"], alphas_cumprod: Float[Tensor, " T"]
) -> Int[Tensor, " b"]:
    """Return the timesteps that messages name: the matched client's are those whose ᾱ is nearest ᾱ_t / (1 + v).

    v is the feature noise's variance, σ1² (`noise_variance`).
    """
    if not defences.matched:
        return timesteps
    alphas = alphas_cumprod[timesteps]
    wanted = alphas / (1 + noise_variance(defences, alphas))
    return (alphas_cumprod[None] - wanted[:, None]).abs().argmin(1)


def signal_level(
    defences: Defences, sent: Int[Tensor, " b"], alphas_cumprod: Float[Tensor, " T"]
) -> Float[Tensor, "b 1 1 1"]:
    """Return ᾱ of the noised latents before feature noise, from the timestep that the message names; public."""
    alphas = alphas_cumprod[sent]
    if defences.matched and defences.per_image_noise:
        alphas = (alphas / (1 - alphas * defences.feature_noise**2).clamp_min(1e-6)).clamp_max(1.0)
    elif defences.matched:
        alphas = (alphas * (1 + defences.feature_noise**2)).clamp_max(1.0)
    return alphas[:, None, None, None]


def feature_scale(
    defences: Defences, alphas: Float[Tensor, "b 1 1 1"] | None = None
) -> Float[Tensor, "b 1 1 1"] | float:
    """Return what the noised features are multiplied by: 1 / sqrt(1 + σ1²) for the matched client, else 1.

    `alphas`: ᾱ before feature noise (`signal_level`); needed with `per_image_noise` only, where it is 1 / sqrt(1 + ᾱ
    σ1²).
    """
    if not defences.matched:
        return 1.0
    if defences.per_image_noise:
        return 1 / (1 + torch.as_tensor(alphas) * defences.feature_noise**2).sqrt()
    return 1 / math.sqrt(1 + defences.feature_noise**2)


def label_share(
    defences: Defences, sent: Int[Tensor, " b"], alphas_cumprod: Float[Tensor, " T"]
) -> Float[Tensor, "b 1 1 1"]:
    """Return k, the share of a message's noise that its label covers: the loss is |k noise_pred - noise|².

    k² = (1 - ᾱ) / (1 - ᾱ + v) for the matched client, v its feature noise's variance σ1² (`noise_variance`): with that
    factor the minimiser is the denoiser of what was sent. 1 for every other client.
    """
    alphas = signal_level(defences, sent, alphas_cumprod)
    if not defences.matched:
        return torch.ones_like(alphas)
    return ((1 - alphas) / (1 - alphas + noise_variance(defences, alphas))).sqrt()


def noisy_state(
    defences: Defences, latents: Tensor, noise: Tensor, sent: Int[Tensor, " b"], alphas_cumprod: Float[Tensor, " T"]
) -> Float[Tensor, "b c h w"]:
    """Noise latents for a message that names the timesteps `sent`, before any transform.

    Noise that was drawn once is in the latents already, so the matched client's scaling (`feature_scale`) is done here.
    """
    alphas = signal_level(defences, sent, alphas_cumprod)
    state = diffused(latents, noise, alphas)
    return state * feature_scale(defences, alphas) if defences.per_image_noise else state


HOW = "independent_draws and matched say how feature_noise is added: give it, or leave them out"

DEFENCES = (
    Defence(
        "matched",
        off=False,
        says="scale the noised message and name the timestep it then has, so that the public U-Net still fits it",
        label="matched client",
        place=50,
        touches=("timesteps", "noisy_latents", "smashed"),
        needs=(("feature_noise",), HOW),
        excludes=(("independent_draws",), "matched needs one draw over all fields: leave out independent_draws"),
    ),
)
