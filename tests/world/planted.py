"""DP-SGD with one mistake each, as it is made in practice: what an audit, or a test, must catch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from splitlab.privacy.mechanisms import Gradients, clipped_sum, private_gradient, release


def unclipped(model: nn.Module, inputs: tuple[Tensor, ...], **how: Any) -> Gradients:
    """Clipping forgotten: the noise is as large as if there had been any."""
    total = clipped_sum(model, inputs, max_grad_norm=1e12, multiplicity=how["multiplicity"]).total
    return release(
        total,
        how["max_grad_norm"],
        how["noise_multiplier"],
        expected_batch=how["expected_batch"],
        generator=how["generator"],
    )


def noise_over_batch(model: nn.Module, inputs: tuple[Tensor, ...], **how: Any) -> Gradients:
    """Noise added to the mean as if it were the sum, and so divided by B once too often."""
    less = {"noise_multiplier": how["noise_multiplier"] / how["expected_batch"]}
    return private_gradient(model, inputs, **how | less)


def unfolded(model: nn.Module, inputs: tuple[Tensor, ...], **how: Any) -> Gradients:
    """Each of an image's K draws clipped by itself: together they move the sum by K times the clip norm."""
    return private_gradient(model, inputs, **how | {"multiplicity": 1})


def whole_batch(n: int, rate: float, *, generator: torch.Generator) -> Tensor:
    """Sampling ignored: all samples in every batch, charged as if sampled at `rate`."""
    return torch.arange(n)


VARIANTS: dict[str, dict[str, Callable[..., Any]]] = {
    "correct": {},
    "no clipping": {"mechanism": unclipped},
    "noise / B": {"mechanism": noise_over_batch},
    "K unfolded": {"mechanism": unfolded},
    "sampling ignored": {"sampler": whole_batch},
}
