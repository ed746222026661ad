"""DP-SGD (Abadi et al. 2016, algorithm 1) in visible steps: per-sample gradients, fold, clip, sum, noise, scale.

A model is any module whose `forward(*inputs)` returns one loss per sample, and `inputs` are tensors with one row per
sample. Per-sample gradients are Opacus' (its hooks); the steps after them are written out here, because Opacus'
optimiser has no place for several draws per image, and divides its clip norm by norm + 1e-6, which is not small beside
the clip norms that diffusion models need.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.privacy.accounting import PrivacyEvent
from splitlab.privacy.draws import noised, uniform

Gradients = dict[str, Tensor]
"""Parameter name -> gradient; of per-sample gradients, the first axis is the sample."""

Inputs = tuple[Tensor, ...]

ADJACENCY = "add_remove_one"


@dataclass(frozen=True)
class Mechanism:
    """The numbers that fix a run's guarantee, worked out for its data.

    Attributes:
        noise_multiplier: σ; 0 where training is not private.
        sample_rate: of Poisson sampling.
        n: number of private samples, which counts as public.
    """

    noise_multiplier: float
    sample_rate: float
    n: int

    @property
    def expected_batch(self) -> float:
        """Mean size of a Poisson batch."""
        return self.sample_rate * self.n

    def events(self, steps: int) -> tuple[PrivacyEvent, ...]:
        """Return what `steps` steps spend; nothing where nothing protects, or nothing was done."""
        if not self.noise_multiplier or not steps:
            return ()
        return (PrivacyEvent("gaussian", self.noise_multiplier, self.sample_rate, steps, ADJACENCY),)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with requires_grad, by name.

    Raises:
        InputError: there are none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise InputError(
            f"no parameter of this {type(model).__name__} requires a gradient, so nothing would be trained"
        )
    return found


def check_layers(model: nn.Module) -> None:
    """Refuse a model whose per-sample gradients cannot be had, or are no per-sample gradients.

    Raises:
        InputError: a trained layer that Opacus has no rule for, or one that mixes the samples of a batch.
    """
    for name, layer in model.named_modules():
        own = any(p.requires_grad for p in layer.parameters(recurse=False))
        if own and type(layer) not in GradSampleHooks.GRAD_SAMPLERS:
            raise InputError(
                f"layer {name!r} ({type(layer).__name__}) is trained, and Opacus has no per-sample gradient for it; "
                "freeze it, or choose a trainable set without it"
            )
        if isinstance(layer, _BatchNorm) and (own or layer.running_mean is None):
            raise InputError(
                f"layer {name!r} ({type(layer).__name__}) mixes the samples of a batch, so that no sample's gradient "
                "is its own; use GroupNorm instead"
            )


@contextmanager
def per_sample_hooks(model: nn.Module) -> Iterator[None]:
    """Hook Opacus into the trained layers: within the block, `backward` leaves `grad_sample` on their parameters.

    Only trained layers are in train mode, which Opacus asks for; the others are not, so nothing draws dropout from
    global randomness, and nothing is checkpointed (Opacus sees no activations then).

    Raises:
        InputError: see `check_layers`.
    """
    check_layers(model)
    before = {layer: layer.training for layer in model.modules()}
    model.eval()
    for layer in before:
        layer.training = any(p.requires_grad for p in layer.parameters(recurse=False))
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.cleanup()
        for layer, mode in before.items():
            layer.training = mode


def per_sample_gradients(model: nn.Module, inputs: Inputs) -> tuple[Gradients, Float[Tensor, " b"]]:
    """Return the gradient of each sample's loss, name -> `[b, ...]`, and the losses. Call within `per_sample_hooks`.

    Raises:
        InputError: a trained parameter takes no part in the loss, or its layer sees no batch.
    """
    parameters = trainable_parameters(model)
    losses = model(*inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook")  # a first layer's input needs no gradient: as it should
        losses.sum().backward()
    gradients = {}
    for name, parameter in parameters.items():
        found = parameter.grad_sample  # type: ignore[attr-defined]
        if not isinstance(found, Tensor) or len(found) != len(losses):
            raise InputError(
                f"parameter {name!r} has no per-sample gradient for {len(losses)} samples: it takes no part in the "
                "loss, or its layer is not called once per batch with the samples first; freeze it"
            )
        gradients[name] = found
        parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
    return gradients, losses.detach()


def fold(gradients: Gradients, multiplicity: int) -> Gradients:
    """Average the gradients of `multiplicity` adjacent rows, which are draws of one image (DPDM, Dockhorn et al. 2023).

    This comes before clipping: then an image still moves the sum by the clip norm only, not by K times as much.
    """
    if multiplicity == 1:
        return gradients
    return {name: g.unflatten(0, (-1, multiplicity)).mean(1) for name, g in gradients.items()}


def norms(gradients: Gradients) -> Float[Tensor, " b"]:
    """Return each sample's gradient norm over all parameters, accumulated in float64 (float32 sums read low)."""
    squares = [g.flatten(1).double().square().sum(1) for g in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def clip_and_sum(gradients: Gradients, max_grad_norm: float) -> tuple[Gradients, Float[Tensor, " b"]]:
    """Scale every sample's gradient to a norm of at most `max_grad_norm` and add the samples up.

    Returns the sum and the norms before clipping. A sample whose gradient is not finite counts as zero, since no
    factor would bound it.
    """
    sizes = norms(gradients)
    factors = (max_grad_norm / sizes.clamp_min(1e-300)).clamp_max(1.0)
    finite = torch.isfinite(sizes)
    if not finite.all():
        factors = torch.where(finite, factors, 0.0)
        gradients = {n: torch.where(finite.view(-1, *(1,) * (g.ndim - 1)), g, 0.0) for n, g in gradients.items()}
    total = {n: (factors.to(g.dtype) @ g.flatten(1)).view(g.shape[1:]) for n, g in gradients.items()}
    return total, sizes


@dataclass(frozen=True)
class Clipped:
    """A batch's sum of clipped gradients. The sum's noise is still to come; nothing here may leave the data's owner.

    Attributes:
        total: parameter name -> sum.
        losses: `[b]` mean loss of each sample.
        norms: `[b]` gradient norm of each sample before clipping.
    """

    total: Gradients
    losses: Tensor
    norms: Tensor


def clipped_sum(
    model: nn.Module, inputs: Inputs, *, max_grad_norm: float, multiplicity: int = 1, physical_batch: int = 64
) -> Clipped:
    """Compute a logical batch's sum of clipped per-sample gradients.

    A batch may be of any size, also empty (then nothing runs forward and the sum is zero). It is worked off in chunks
    and only the sum is kept: a few lines here do what Opacus' BatchMemoryManager does, which needs Opacus' optimiser
    and data loader, and cannot keep the K draws of an image in one chunk.

    Args:
        model: `model(*inputs)` returns one loss per row; the parameters with requires_grad are trained.
        inputs: tensors of `b * multiplicity` rows, the draws of one sample adjacent.
        max_grad_norm: C, the bound on each sample's gradient norm.
        multiplicity: K, draws per sample.
        physical_batch: rows that are on their way at once, at least one sample's.

    Raises:
        InputError: see `check_layers`; rows that are no multiple of `multiplicity`.
    """
    rows = len(inputs[0])
    if rows % multiplicity:
        raise InputError(
            f"{rows} rows are no whole number of samples with {multiplicity} draws each; repeat each sample"
        )
    check_layers(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in trainable_parameters(model).items()}
    losses, sizes = [], []
    if rows:
        with per_sample_hooks(model):
            for part in chunks(rows, multiplicity, physical_batch):
                gradients, lost = per_sample_gradients(model, tuple(x[part] for x in inputs))
                clipped, size = clip_and_sum(fold(gradients, multiplicity), max_grad_norm)
                for name, value in clipped.items():
                    total[name] += value
                losses.append(lost.unflatten(0, (-1, multiplicity)).mean(1))
                sizes.append(size)
    empty = torch.zeros(0)
    return Clipped(total, torch.cat(losses or [empty]), torch.cat(sizes or [empty.double()]))


def chunks(rows: int, multiplicity: int, physical_batch: int) -> Iterator[slice]:
    """Cut rows into slices of whole samples, about `physical_batch` rows each."""
    size = max(physical_batch // multiplicity, 1) * multiplicity
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def add_noise(total: Mapping[str, Tensor], *, std: float, generator: Source) -> Gradients:
    """Add independent Gaussian noise of standard deviation `std` to every entry."""
    if std == 0:
        return dict(total)
    return {name: noised(gradient, std, generator) for name, gradient in total.items()}


def private_gradient(
    model: nn.Module,
    inputs: Inputs,
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    expected_batch: float,
    generator: Source,
    multiplicity: int = 1,
    physical_batch: int = 64,
) -> Gradients:
    """Release a batch's gradient by the Gaussian mechanism: (Σ clip(g_i, C) + N(0, (σC)²)) / expected batch size.

    It is a step of DP-SGD, and as well what a federated client shares. Dividing by the batch's own size instead of the
    expected one would let a sample's presence change more than the sum.

    Args:
        model: see `clipped_sum`.
        inputs: see `clipped_sum`; a Poisson sample of the data, which may be empty.
        max_grad_norm: C.
        noise_multiplier: σ; 0 adds no noise and gives no guarantee.
        expected_batch: sampling rate times number of samples.
        generator: of the noise. Whoever can repeat it can take the noise off again: a guarantee needs a secret key's
            (`splitlab.core.seeds.source`).
        multiplicity, physical_batch: see `clipped_sum`.

    Raises:
        InputError: see `clipped_sum`; noise without a clip norm.
    """
    if not max_grad_norm > 0 or noise_multiplier < 0 or (noise_multiplier and math.isinf(max_grad_norm)):
        raise InputError(
            f"max_grad_norm {max_grad_norm} and noise_multiplier {noise_multiplier}: the noise is scaled to the clip "
            "norm, which must be positive and finite; noise_multiplier must be 0 or more"
        )
    clipped = clipped_sum(
        model, inputs, max_grad_norm=max_grad_norm, multiplicity=multiplicity, physical_batch=physical_batch
    )
    return release(clipped.total, max_grad_norm, noise_multiplier, expected_batch=expected_batch, generator=generator)


def release(
    total: Mapping[str, Tensor],
    max_grad_norm: float,
    noise_multiplier: float,
    *,
    expected_batch: float,
    generator: Source,
) -> Gradients:
    """Noise a sum of clipped gradients and scale it: the mechanism's last two steps."""
    std = noise_multiplier * max_grad_norm if noise_multiplier else 0.0
    return {n: g / expected_batch for n, g in add_noise(total, std=std, generator=generator).items()}


def plain_gradient(
    model: nn.Module, inputs: Inputs, *, expected_batch: float, multiplicity: int = 1, physical_batch: int = 64
) -> tuple[Gradients, Float[Tensor, " b"]]:
    """Return the gradient without clipping and noise, scaled as `private_gradient`'s, and each sample's loss.

    No per-sample gradients are made: this is what training without privacy costs.
    """
    parameters = trainable_parameters(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    losses = []
    for part in chunks(len(inputs[0]), multiplicity, physical_batch):
        lost = model(*(x[part] for x in inputs))
        found = torch.autograd.grad(lost.sum(), list(parameters.values()))
        for name, gradient in zip(parameters, found, strict=True):
            total[name] += gradient / (multiplicity * expected_batch)
        losses.append(lost.detach().unflatten(0, (-1, multiplicity)).mean(1))
    return total, torch.cat(losses or [torch.zeros(0)])


def poisson_sample(n: int, rate: float, *, generator: Source) -> Int[Tensor, " b"]:
    """Draw every one of n samples independently with probability `rate`: what the accountant takes for granted."""
    return (uniform((n,), generator, dtype=torch.float64) < rate).nonzero()[:, 0]


def step(optimizer: torch.optim.Optimizer, model: nn.Module, gradient: Mapping[str, Tensor]) -> None:
    """Take one optimiser step with a released gradient."""
    for name, parameter in trainable_parameters(model).items():
        parameter.grad = gradient[name]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
