"""What a client does to a message before it leaves: pure transforms, folded left to right.

A defence is public; what it draws and the client's key are not. Each names the fields it may change, and a test holds
it to that. The timestep floor, the norm bound and noise drawn once per image are no transforms of a message: they
decide what it is computed from, before there is one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key, Source, source
from splitlab.diffusion.base import noised as diffused
from splitlab.diffusion.controlnet import coarsened, symsigmoid
from splitlab.privacy.draws import integers, noised, normal, permutation, uniform
from splitlab.split.config import Defences
from splitlab.split.messages import Observation

Transform = Callable[[Observation, Source], Observation]

FEATURES = ("noisy_latents", "smashed")
"""The fields that depend on the private image and that the label does not cover."""


@dataclass(frozen=True)
class Defence:
    """A transform of messages and the observation fields that it may change."""

    name: str
    touches: tuple[str, ...]
    apply: Transform


def draw_timesteps(
    defences: Defences, batch: int, alphas_cumprod: Float[Tensor, " T"], draw: Source
) -> Int[Tensor, " b"]:
    """Draw timesteps uniformly from [timestep_floor, T) (S1's timestep sampling policy).

    The matched client stops where the message's own noise level would exceed the schedule's. Samples that are mixed
    with one another share a timestep.

    Raises:
        InputError: the floor leaves no timestep.
    """
    last = len(alphas_cumprod)
    if defences.matched:
        last = int((alphas_cumprod / (1 + noise_variance(defences, alphas_cumprod)) >= alphas_cumprod[-1]).sum())
    if defences.timestep_floor >= last:
        raise InputError(f"timestep_floor {defences.timestep_floor} leaves none of the {last} timesteps: lower it")
    group = defences.key_mixing or 1
    drawn = integers(defences.timestep_floor, last, (math.ceil(batch / group),), draw)
    return drawn.repeat_interleave(group)[:batch]


def noise_variance(defences: Defences, alphas: Tensor) -> Tensor | float:
    """Return the variance of the feature noise in the noised latents, before scaling: σ1², or ᾱ σ1² if drawn once.

    What is drawn once per image is added to its latents and so is scaled with them.
    """
    return alphas * defences.feature_noise**2 if defences.per_image_noise else defences.feature_noise**2


def bounded(defences: Defences, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scale latents down to `latent_norm` where their L2 norm exceeds it."""
    if not defences.latent_norm:
        return latents
    norms = torch.linalg.vector_norm(latents.flatten(1), dim=1).clamp_min(1e-12)
    return latents * (defences.latent_norm / norms).clamp_max(1.0)[:, None, None, None]


def noised_per_image(
    defences: Defences,
    latents: Float[Tensor, "b c h w"],
    hint_latents: Float[Tensor, "b c h w"],
    draws: Sequence[Source],
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Bound latents and hint latents; with `per_image_noise`, noise them by one generator per image.

    All that the server will ever be sent of an image and its hint is computed from what this returns.
    """
    latents, hint_latents = bounded(defences, latents), bounded(defences, hint_latents)
    if not defences.per_image_noise:
        return latents, hint_latents
    std = torch.tensor([defences.feature_noise, defences.hint_noise])[:, None, None, None]
    pairs = zip(torch.stack([latents, hint_latents], 1), draws, strict=True)
    both = torch.stack([noised(pair, std, draw) for pair, draw in pairs])
    return both[:, 0], both[:, 1]


def noisy_state(
    defences: Defences, latents: Tensor, noise: Tensor, sent: Int[Tensor, " b"], alphas_cumprod: Float[Tensor, " T"]
) -> Float[Tensor, "b c h w"]:
    """Noise latents for a message that names the timesteps `sent`, before any transform.

    Noise that was drawn once is in the latents already, so the matched client's scaling (`feature_scale`) is done here.
    """
    alphas = signal_level(defences, sent, alphas_cumprod)
    state = diffused(latents, noise, alphas)
    return state * feature_scale(defences, alphas) if defences.per_image_noise else state


def draw_noise(defences: Defences, shape: tuple[int, ...], draw: Source) -> Float[Tensor, "b c h w"]:
    """Draw the diffusion noise of a batch; samples that are mixed with one another share it."""
    group = defences.key_mixing or 1
    drawn = normal((math.ceil(shape[0] / group), *shape[1:]), draw)
    return drawn.repeat_interleave(group, 0)[: shape[0]]


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
    """Return ᾱ of the noised latents before feature noise, from the timestep that the message names; public.

    The matched client sends (noisy_latents + σ1 n) / sqrt(1 + σ1²), n ~ N(0, 1), and the timestep s of the noise
    level that this has: ᾱ_s = ᾱ / (1 + σ1²). With `per_image_noise` it is (sqrt(ᾱ) (latents + σ1 n) + sqrt(1 - ᾱ)
    noise) / sqrt(1 + ᾱ σ1²), and ᾱ_s = ᾱ / (1 + ᾱ σ1²).
    """
    alphas = alphas_cumprod[sent]
    if defences.matched and defences.per_image_noise:
        alphas = (alphas / (1 - alphas * defences.feature_noise**2).clamp_min(1e-6)).clamp_max(1.0)
    elif defences.matched:
        alphas = (alphas * (1 + defences.feature_noise**2)).clamp_max(1.0)
    return alphas[:, None, None, None]


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


def fixed_noise_tensor(defences: Defences, shape: tuple[int, ...], client_key: Key) -> Tensor:
    """Return a client's secret tensor `[c, h, w]`, the same for every message it ever sends."""
    return normal(shape, source("fixed noise", client_key)) * defences.fixed_noise


def mixing_key(n: int, draw: Source) -> Float[Tensor, "n n"]:
    """Draw a row-stochastic matrix, its rows uniform on the simplex (Dirichlet with all parameters 1)."""
    weights = -uniform((n, n), draw).clamp_min(1e-9).log()
    return weights / weights.sum(1, keepdim=True)


def transforms(defences: Defences, *, client_key: Key) -> tuple[Defence, ...]:
    """Return the transforms that `defences` switches on, in the order in which a client applies them."""
    floats = (*FEATURES, "noise", "encoder_hidden_states")
    anew = not defences.per_image_noise
    shared = defences.feature_noise and anew and not defences.independent_draws
    chain: list[tuple[object, str, tuple[str, ...], Transform]] = [
        (defences.hint_noise and anew, "hint_noise", ("smashed",), _hint_noise(defences)),
        (defences.coarse_hints, "coarse_hints", ("smashed",), _coarse_hints(defences)),
        (shared, "feature_noise", FEATURES, _one_draw(defences)),
        (defences.symsigmoid, "symsigmoid", ("smashed",), _symsigmoid),
        (defences.independent_draws, "independent_draws", FEATURES, _own_draws(defences)),
        (defences.fixed_noise, "fixed_noise", ("smashed",), _add_fixed_noise(defences, client_key)),
        (defences.key_mixing, "key_mixing", FEATURES, _mix(defences, client_key)),
        (defences.patch_shuffle, "patch_shuffle", (*FEATURES, "noise"), _shuffle(defences, client_key)),
        (defences.hide_prompts, "hide_prompts", ("encoder_hidden_states",), _hide_prompts),
        (defences.half, "half", ("timesteps", *floats), _half),
    ]
    return tuple(Defence(name, touches, apply) for active, name, touches, apply in chain if active)


def protect(message: Observation, chain: tuple[Defence, ...], draw: Source) -> Observation:
    """Fold `chain` over a message."""
    for defence in chain:
        message = defence.apply(message, draw)
    return message


def _one_draw(defences: Defences) -> Transform:
    """Noise the noisy latents; what is added to them is added to `smashed`, which was computed from them."""

    def add(message: Observation, draw: Source) -> Observation:
        clean, smashed = message.need("noisy_latents"), message.need("smashed")
        sent = noised(clean, defences.feature_noise, draw) * feature_scale(defences)
        return replace(message, noisy_latents=sent, smashed=smashed + (sent.to(smashed) - clean.to(smashed)))

    return add


def _hint_noise(defences: Defences) -> Transform:
    """Noise `smashed` alone, before anything else is done to it: its share of the noisy latents stays as it is sent."""

    def add(message: Observation, draw: Source) -> Observation:
        return replace(message, smashed=noised(message.need("smashed"), defences.hint_noise, draw))

    return add


def _coarse_hints(defences: Defences) -> Transform:
    def coarsen(message: Observation, draw: Source) -> Observation:
        noisy_latents = message.need("noisy_latents")
        hints = message.need("smashed") - noisy_latents
        return replace(message, smashed=coarsened(hints, defences.coarse_hints) + noisy_latents)

    return coarsen


def _own_draws(defences: Defences) -> Transform:
    def add(message: Observation, draw: Source) -> Observation:
        fields = {name: message.need(name) for name in FEATURES}
        sent = {name: noised(value, defences.feature_noise, draw) for name, value in fields.items()}
        return message.changed(**sent)

    return add


def _symsigmoid(message: Observation, draw: Source) -> Observation:
    return replace(message, smashed=symsigmoid(message.need("smashed")))


def _add_fixed_noise(defences: Defences, client_key: Key) -> Transform:
    def add(message: Observation, draw: Source) -> Observation:
        smashed = message.need("smashed")
        noise = fixed_noise_tensor(defences, tuple(smashed.shape[1:]), client_key)
        return replace(message, smashed=smashed + noise)

    return add


def _mix(defences: Defences, client_key: Key) -> Transform:
    def mix(message: Observation, draw: Source) -> Observation:
        n = defences.key_mixing
        if message.batch_size % n:
            raise InputError(f"key_mixing {n} does not divide a batch of {message.batch_size}: change either")
        own = mixing_key(n, source("mixing key", client_key))
        keys = [mixing_key(n, draw) if defences.fresh_keys else own for _ in range(message.batch_size // n)]
        whole, fields = torch.block_diag(*keys), {name: message.need(name) for name in FEATURES}
        return message.changed(**{k: torch.einsum("ij,jchw->ichw", whole.to(v), v) for k, v in fields.items()})

    return mix


def _shuffle(defences: Defences, client_key: Key) -> Transform:
    """Permute patches alike in all maps, the label included: the server could not train otherwise."""

    def shuffle(message: Observation, draw: Source) -> Observation:
        side, latents = defences.patch_shuffle, message.need("noisy_latents")
        n, (height, width) = len(latents), latents.shape[2:]
        if height % side or width % side:
            raise InputError(f"patch_shuffle {side} does not divide latents of {height}x{width}: give a divisor")
        places = height * width // side**2
        keys = draw if defences.fresh_keys else source("patch key", client_key)
        order = torch.stack([permutation(places, keys) for _ in range(n if defences.fresh_keys else 1)])
        order = order.expand(n, -1)
        maps = {name: getattr(message, name) for name in (*FEATURES, "noise")}
        moved = {k: from_patches(to_patches(v, side), order, side) for k, v in maps.items() if v is not None}
        return message.changed(**moved)

    return shuffle


def to_patches(maps: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n p d"]:
    """Cut maps into their (h / side)(w / side) square patches, row by row, each flattened."""
    return torch.nn.functional.unfold(maps, side, stride=side).transpose(1, 2)


def from_patches(patches: Float[Tensor, "n p d"], order: Int[Tensor, "n p"], side: int) -> Float[Tensor, "n c h w"]:
    """Put patches together again to square maps, patch `order[i, j]` of sample i at place j."""
    moved = patches.gather(1, order[..., None].expand_as(patches)).transpose(1, 2)
    length = round(math.sqrt(patches.shape[1])) * side
    return torch.nn.functional.fold(moved, length, side, stride=side)


def _hide_prompts(message: Observation, draw: Source) -> Observation:
    return replace(message, encoder_hidden_states=None)


def _half(message: Observation, draw: Source) -> Observation:
    return message.map(lambda value: value.half() if value.is_floating_point() else value.to(torch.int16))
