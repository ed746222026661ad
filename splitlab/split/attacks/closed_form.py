"""S1's server is sent the label of its loss, the noise. With it, image and hint follow by algebra alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.progress import Callback
from splitlab.core.seeds import generator as splitlab_generator
from splitlab.diffusion.base import encoded
from splitlab.diffusion.controlnet import coarse_gain, coarsened, low_frequencies, symsigmoid_inverse
from splitlab.diffusion.controlnet import symsigmoid as activation
from splitlab.split.attacks.latent_view import labelled, latent_view, used_fields
from splitlab.split.attacks.record import Attack, Family
from splitlab.split.config import Defences
from splitlab.split.messages import Knowledge, Observation, Reconstruction, senders


def closed_form(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
) -> Reconstruction:
    """Solve for image and hint, exactly up to the floating-point format on the wire.

    latents = (noisy_latents - sqrt(1 - ᾱ_t) noise) / sqrt(ᾱ_t)  (Ho et al. 2020, eq. 4, solved for x_0), with the noise
    as sent or, in a U-shaped split, solved for from the returned gradient (`labelled`); feature noise stays in.
    hint_latents = activation⁻¹(smashed - fixed_noise) - noisy_latents, with each client's fixed noise estimated from
    all its messages (`estimate_fixed_noise`). Hints need no label; they are solved for where the cut lies before
    anything trainable (`split`, `u_shaped`). Without any label only the hints are recovered.
    """
    seen, base = labelled(observations, knowledge), knowledge.base
    raw_hints = hint_latents(seen, observations, knowledge)
    hints = None if raw_hints is None else base.decode(raw_hints)
    if seen.noise is None and hints is not None:
        return Reconstruction(hints=hints, used=("noisy_latents", "smashed"), n_evals=1)
    seen.need("noise")
    images, used = base.decode(latent_view(seen, knowledge)[0]), used_fields(seen, prompts=False)
    return Reconstruction(images, hints, used=used if hints is None else (*used, "smashed"), n_evals=1)


def hint_latents(
    seen: Observation, observations: Sequence[Observation], knowledge: Knowledge
) -> Float[Tensor, "n c h w"] | None:
    """Solve for the hints' latents: activation⁻¹(smashed - fixed_noise) - noisy_latents; None where that is no use.

    Hint noise stays in, and where hints were made coarse, what was kept of them is returned (`public_hints`).
    """
    if knowledge.scheme not in ("split", "u_shaped") or seen.smashed is None or seen.noisy_latents is None:
        return None
    noisy_latents, fixed_noise = seen.noisy_latents, torch.zeros_like(seen.smashed)
    if knowledge.defences.fixed_noise:
        data = encoded(knowledge.base, knowledge.public, cache=knowledge.cache)
        public = coarsened(noised_hints(data.hint_latents, knowledge.defences), knowledge.defences.coarse_hints)
        sender = senders(observations)
        for client in sender.unique().tolist():
            sent = sender == client
            fixed_noise[sent] = estimate_fixed_noise(
                seen.smashed[sent],
                noisy_latents[sent],
                public,
                symsigmoid=knowledge.defences.symsigmoid,
                span=4.0 * knowledge.defences.fixed_noise,
            )
    activated = seen.smashed - fixed_noise
    raw = (symsigmoid_inverse(activated) if knowledge.defences.symsigmoid else activated) - noisy_latents
    kept = knowledge.defences.coarse_hints
    return low_frequencies(raw, kept) / coarse_gain(raw.shape, kept) if kept else raw


def noised_hints(hints: Float[Tensor, "m c h w"], defences: Defences) -> Float[Tensor, "m c h w"]:
    """Noise public hint latents as clients do theirs, to know how sent ones are distributed; always alike."""
    if not defences.hint_noise:
        return hints
    return hints + defences.hint_noise * torch.randn(hints.shape, generator=splitlab_generator("public hints"))


def public_hints(hints: Float[Tensor, "m c h w"], knowledge: Knowledge) -> Float[Tensor, "m c h w"]:
    """Return public hint latents as `hint_latents` would find them but for the noise."""
    kept = knowledge.defences.coarse_hints
    return low_frequencies(hints, kept) if kept else hints


def estimate_fixed_noise(
    smashed: Float[Tensor, "n c h w"],
    noisy_latents: Float[Tensor, "n c h w"],
    public_hints: Float[Tensor, "m c h w"],
    *,
    symsigmoid: bool,
    span: float,
    levels: int = 5,
    points: int = 41,
) -> Float[Tensor, "c h w"]:
    """Estimate the tensor f that one client adds to every activation, position by position, by maximum likelihood.

    A value of f turns message i into the hint latent x_i(f) = activation⁻¹(smashed_i - f) - noisy_latents_i, so
    log p(smashed_i | f) = log p(x_i(f)) - log activation'(x_i(f) + noisy_latents_i), with the density p of hint
    latents at that position read off public data. The maximum is found on grids that narrow down.

    Args:
        smashed: one client's activations.
        noisy_latents: its noisy latents, sample by sample.
        public_hints: latents of public hints.
        symsigmoid: whether the activation is on.
        span: f is sought in [-span, span].
        levels: how often the grid is narrowed, each time to three of its cells.
        points: grid points per level.
    """
    density = _LogDensity(public_hints)
    estimate, width = torch.zeros(smashed.shape[1:]), span
    for _ in range(levels):
        offsets = torch.linspace(-width, width, points)
        scores = []
        for offset in offsets:
            inner = _inverse_table(smashed - (estimate + offset)) if symsigmoid else smashed - (estimate + offset)
            score = density(inner - noisy_latents)
            if symsigmoid:
                score = score - _log_slope(inner)
            scores.append(score.sum(0))
        estimate = estimate + offsets[torch.stack(scores).argmax(0)]
        width *= 3.0 / (points - 1)
    return estimate


class _LogDensity:
    """Logarithm of a smoothed histogram per position, with a floor for what the public data do not show."""

    def __init__(self, samples: Float[Tensor, "m c h w"], bins: int = 1024):
        flat = samples.flatten(1).T.contiguous()
        self.low, high = flat.amin() - 0.5, flat.amax() + 0.5
        self.scale = (bins - 1) / (high - self.low)
        cells = ((flat - self.low) * self.scale).round().long()
        counts = torch.zeros(len(flat), bins).scatter_add_(1, cells, torch.ones_like(flat))
        kernel = torch.exp(-0.5 * (torch.arange(-8, 9) / 2.5).square())
        smooth = torch.nn.functional.conv1d(counts[:, None], (kernel / kernel.sum())[None, None], padding=8)[:, 0]
        self.table = (0.98 * smooth / flat.shape[1] + 0.02 / bins).log()

    def __call__(self, values: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Interpolate linearly between bins."""
        place = ((values - self.low) * self.scale).clamp(0, self.table.shape[1] - 1.001).flatten(1).T
        left = place.floor()
        lower, upper = (self.table.gather(1, (left + step).long()) for step in (0, 1))
        return torch.lerp(lower, upper, place - left).T.reshape(values.shape)


_REACH = 12.0
_ROOTS = torch.linspace(0.0, float(activation(torch.tensor(_REACH)).sqrt()), 8_001)
_INVERSE = symsigmoid_inverse(_ROOTS.double().square()).float()


def _inverse_table(y: Tensor) -> Tensor:
    """Invert the activation by linear interpolation in sqrt(|y|), in which it is nearly straight: for a grid search.

    Absolute error below 1e-5 up to |x| = 12; beyond, 12 is returned.
    """
    place = (y.abs().sqrt() * ((len(_ROOTS) - 1) / _ROOTS[-1])).clamp_max(len(_ROOTS) - 1.001)
    left = place.floor()
    index = left.long()
    return torch.lerp(_INVERSE[index], _INVERSE[index + 1], place - left).copysign(y)


def _log_slope(x: Tensor) -> Tensor:
    """Return log of the activation's derivative, floored where rounding to fp16 hides it."""
    sigmoid = torch.sigmoid(x.abs())
    return (2 * sigmoid - 1 + 2 * x.abs() * sigmoid * (1 - sigmoid)).clamp_min(0.03).log()


ALGEBRA = Family(
    "Closed form, and the U-shaped split",
    "What the server is sent determines the latents by algebra. In a U-shaped split the client keeps the loss "
    "and the noise, but the gradient that it returns tells the noise: the server knows its own prediction.",
)

ATTACKS = (
    Attack(
        closed_form,
        "closed form",
        rank=10,
        family=ALGEBRA,
        reason="the label is sent and the message holds nothing else that hides the latents",
        moral="**The reason is the protocol,** not a clever attacker: the server computes the loss, so it is *sent the "
        "noise*, and noisy latents minus known noise are latents. None of S1's defences touches the noise.",
        colour="#D55E00",
        shows_hints=True,
    ),
)
