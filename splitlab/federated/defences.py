"""What a federated client can do to its update before it leaves, as pure functions. None modifies its input.

A defence is a frozen config. Those in `ON_UPDATES` need only the finished update and go through `protect`; the others
need the client's batch or other clients, and `share_protected` does everything from the batch on. Defences are public,
with their levels, and named in the update; what they draw is not. Sharing fewer parameters (attention or LoRA only) is
`trainable` of `splitlab.federated.client.share`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from splitlab.core.config import Count, Level, Positive, Rule, Settings, Share, one_of
from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.federated.client import share, share_each, training_loss
from splitlab.federated.update import Update, UpdateTruth
from splitlab.privacy.draws import integers, noised, uniform

BITS = Rule(lambda value: 2 <= value <= 16, "{name} must be from 2 to 16, got {value}; for one bit use Sign")


class UpdateLevels(Settings):
    """The levels of a defence; an error names it."""

    def __post_init__(self) -> None:
        """Refuse levels that mean nothing."""
        try:
            super().__post_init__()
        except InputError as error:
            raise InputError(f"{type(self).__name__}: {error}") from None


@dataclass(frozen=True)
class GaussianNoise(UpdateLevels):
    """Add independent Gaussian noise.

    Attributes:
        rel: its standard deviation over the RMS of what it is added to.
        per: "tensor": the RMS of each parameter's own gradient, so that all lose equally; "update": one RMS and one
            standard deviation for all parameters.
    """

    rel: Level
    per: Annotated[str, one_of(("tensor", "update"))] = "tensor"


@dataclass(frozen=True)
class Clip(UpdateLevels):
    """Scale the whole update down to L2 norm `max_norm` if it is longer."""

    max_norm: Positive


@dataclass(frozen=True)
class TopK(UpdateLevels):
    """Keep the `fraction` of all values of the update that is largest in magnitude, zero the rest (Lin et al. 2018)."""

    fraction: Share


@dataclass(frozen=True)
class Quantise(UpdateLevels):
    """Round each tensor to 2^bits - 1 levels, evenly spaced over ± its largest magnitude.

    Attributes:
        bits: 2 to 16.
        stochastic: round up or down at random, without bias (Alistarh et al. 2017), instead of to the nearest.
    """

    bits: Annotated[int, BITS] = 8
    stochastic: bool = False


@dataclass(frozen=True)
class Sign:
    """Replace each value by its sign times its tensor's mean magnitude (Bernstein et al. 2018)."""


@dataclass(frozen=True)
class PerExample(UpdateLevels):
    """DP-SGD: clip each example's gradient, add noise to the sum, divide by the batch size (Abadi et al. 2016, alg. 1).

    Attributes:
        max_grad_norm: L2 bound C of one example's gradient over all shared parameters.
        noise_multiplier: standard deviation of the noise on the sum, in units of C.
    """

    max_grad_norm: Positive
    noise_multiplier: Level = 0.0


@dataclass(frozen=True)
class Soteria(UpdateLevels):
    """Withhold one layer's gradient where its input bounds the image most loosely (Sun et al. 2021), adapted.

    The original prunes entries of the input r of a classifier's last layer, those of the largest |r_i| / |dr_i/dx|. A
    denoiser has no such vector; here r is the input of `layer`, a channel takes the place of an entry, and Frobenius
    norms over batch and positions that of magnitudes. Only the gradient of that layer's weight changes.

    Attributes:
        fraction: of the channels to withhold.
        layer: a convolution or linear layer whose weight is shared.
    """

    fraction: Share
    layer: str = "conv_out"


@dataclass(frozen=True)
class SecureAggregation(UpdateLevels):
    """The server sees only the sum of `n_clients` updates (Bonawitz et al. 2017), here divided by their number."""

    n_clients: Count


UpdateDefence = GaussianNoise | Clip | TopK | Quantise | Sign | PerExample | Soteria | SecureAggregation


def described(defence: UpdateDefence) -> str:
    """Name a defence and its levels, as tables and updates show them."""
    levels = [f"{f.name}={getattr(defence, f.name)}" for f in fields(defence) if getattr(defence, f.name) != f.default]
    return " ".join([type(defence).__name__, *levels])


def protect(update: Update, defence: UpdateDefence, *, generator: Source) -> Update:
    """Apply a defence that needs only the update; the result has the same names, shapes and types.

    Raises:
        InputError: the defence needs the client's batch or other clients.
    """
    if type(defence) not in ON_UPDATES:
        raise InputError(f"{type(defence).__name__} needs more than the finished update; use share_protected")
    values = {name: value.float() for name, value in update.gradients.items()}
    return _sent(update, ON_UPDATES[type(defence)](values, defence, generator), defence)


def share_protected(
    model: nn.Module,
    truth: UpdateTruth,
    defence: UpdateDefence,
    *,
    generator: Source,
    others: Sequence[UpdateTruth] = (),
    **arguments: Any,
) -> Update:
    """Be a client with a defence: what `share` would send, protected.

    Args:
        model: the model as the server sent it.
        truth: the client's batch.
        defence: any of this module's.
        generator: of the defence's draws, from a key that the server does not know.
        others: the batches of the other clients, for secure aggregation.
        arguments: as for `share`.

    Raises:
        InputError: as `share`; per-example clipping of anything but a gradient; not n_clients - 1 others.
    """
    if isinstance(defence, PerExample):
        if arguments.get("kind", "gradient") != "gradient":
            raise InputError("per-example clipping is defined on the gradient of one step; use kind='gradient'")
        return dp_sgd(share_each(model, truth, **arguments), defence, generator=generator)
    if isinstance(defence, SecureAggregation):
        if len(others) != defence.n_clients - 1:
            raise InputError(f"{defence.n_clients} clients: give the batches of {defence.n_clients - 1} others")
        return aggregate([share(model, batch, **arguments) for batch in (truth, *others)])
    update = share(model, truth, **arguments)
    if isinstance(defence, Soteria):
        known = {key: arguments[key] for key in ("alphas_cumprod", "objective") if key in arguments}
        return withhold(update, defence, soteria_scores(model, truth, defence.layer, generator=generator, **known))
    return protect(update, defence, generator=generator)


def dp_sgd(examples: Sequence[Update], defence: PerExample, *, generator: Source) -> Update:
    """Combine the updates of single examples as DP-SGD does; norms in float64, so that no clipped one exceeds C."""
    total: dict[str, Tensor] = {}
    for example in examples:
        values = {name: value.double() for name, value in example.gradients.items()}
        factor = min(1.0, defence.max_grad_norm / max(float(_norm(values)), 1e-300))
        total = {name: total.get(name, 0.0) + factor * value for name, value in values.items()}
    std = defence.noise_multiplier * defence.max_grad_norm
    noisy = {name: noised(value, std, generator) for name, value in total.items()}
    return _sent(examples[0], {name: value / len(examples) for name, value in noisy.items()}, defence)


def aggregate(updates: Sequence[Update]) -> Update:
    """Return the mean of several clients' updates, all that secure aggregation shows the server.

    Raises:
        InputError: they are not of one model, kind and set of parameters.
    """
    first = updates[0]
    for other in updates[1:]:
        if replace(other, gradients={}) != replace(first, gradients={}) or set(other.gradients) != set(first.gradients):
            raise InputError("secure aggregation: the updates are not of one model, kind and set of parameters")
    mean = {name: torch.stack([u.gradients[name].float() for u in updates]).mean(0) for name in first.gradients}
    return _sent(first, mean, SecureAggregation(len(updates)))


def soteria_scores(
    model: nn.Module,
    truth: UpdateTruth,
    layer: str,
    *,
    generator: Source,
    alphas_cumprod: Tensor,
    objective: str = "epsilon",
) -> Float[Tensor, " c"]:
    """Return |r_i| / |dr_i/dx| for each input channel i of `layer`, the Jacobian's norm by one random projection each.

    Raises:
        InputError: the model has no such layer.
    """
    if layer not in dict(model.named_modules()):
        raise InputError(f"Soteria: the model has no layer {layer!r}; name a convolution or linear layer of it")
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    clean = truth.clean.clone().requires_grad_(True)
    one = truth.timesteps.ndim == 1
    noise, timesteps = (truth.noise, truth.timesteps) if one else (truth.noise[0], truth.timesteps[0])
    try:
        training_loss(
            model,
            clean,
            timesteps,
            noise,
            truth.text,
            truth.hint_latents,
            alphas_cumprod=alphas_cumprod,
            objective=objective,
        )
    finally:
        hook.remove()
    features = seen[0] if seen[0].ndim == 4 else seen[0].mT
    signs = integers(0, 2, features.shape, generator) * 2.0 - 1.0
    scores = []
    for channel in range(features.shape[1]):
        projected = (features[:, channel] * signs[:, channel]).sum()
        (jacobian,) = torch.autograd.grad(projected, clean, retain_graph=True)
        scores.append(features[:, channel].detach().norm() / jacobian.norm().clamp_min(1e-30))
    return torch.stack(scores)


def withhold(update: Update, defence: Soteria, scores: Float[Tensor, " c"]) -> Update:
    """Zero the gradient of the layer's weight for the input channels of the highest scores.

    Raises:
        InputError: the update has no gradient of that layer's weight.
    """
    name = f"{defence.layer}.weight"
    if name not in update.gradients:
        raise InputError(f"Soteria: the update has no gradient of {name}; share it, or name another layer")
    kept = torch.ones(len(scores))
    kept[scores.argsort(descending=True)[: round(defence.fraction * len(scores))]] = 0.0
    value = update.gradients[name]
    mask = kept.view(1, -1, *[1] * (value.ndim - 2))
    return _sent(update, update.gradients | {name: value * mask.to(value.dtype)}, defence)


def _gaussian(values: dict[str, Tensor], defence: Any, generator: Source) -> dict[str, Tensor]:
    count = sum(value.numel() for value in values.values())
    whole = _norm(values) / count**0.5
    noisy = {}
    for name, value in values.items():
        rms = value.square().mean().sqrt() if defence.per == "tensor" else whole
        noisy[name] = noised(value, defence.rel * rms, generator)
    return noisy


def _clip(values: dict[str, Tensor], defence: Any, generator: Source) -> dict[str, Tensor]:
    factor = min(1.0, defence.max_norm / max(float(_norm(values)), 1e-300))
    return {name: value * factor for name, value in values.items()}


def _top_k(values: dict[str, Tensor], defence: Any, generator: Source) -> dict[str, Tensor]:
    flat = torch.cat([value.flatten() for value in values.values()])
    kept = torch.zeros_like(flat)
    best = flat.abs().topk(max(1, round(defence.fraction * len(flat)))).indices
    kept[best] = flat[best]
    parts = kept.split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


def _quantise(values: dict[str, Tensor], defence: Any, generator: Source) -> dict[str, Tensor]:
    rounded = {}
    for name, value in values.items():
        step = value.abs().amax() / (2 ** (defence.bits - 1) - 1)
        levels = value / step.clamp_min(1e-30)
        if defence.stochastic:
            levels = (levels + uniform(value.shape, generator)).floor()
        rounded[name] = levels.round() * step
    return rounded


def _sign(values: dict[str, Tensor], defence: Any, generator: Source) -> dict[str, Tensor]:
    return {name: value.sign() * value.abs().mean() for name, value in values.items()}


ON_UPDATES: dict[type, Callable[[dict[str, Tensor], Any, Source], dict[str, Tensor]]] = {
    GaussianNoise: _gaussian,
    Clip: _clip,
    TopK: _top_k,
    Quantise: _quantise,
    Sign: _sign,
}
"""Defences that need only the finished update."""


def _sent(update: Update, values: dict[str, Tensor], defence: UpdateDefence) -> Update:
    """Return the update with new values, of the types it had, and the defence named."""
    named = described(defence) if update.defence == "none" else f"{update.defence}, {described(defence)}"
    cast = {name: value.to(update.gradients[name].dtype) for name, value in values.items()}
    return replace(update, gradients=cast, defence=named)


def _norm(values: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.double().square().sum() for value in values.values()]).sum().sqrt()
