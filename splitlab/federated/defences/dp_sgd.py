"""DP-SGD's clipping and noise, as a federated client applies them to its one step."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from splitlab.core.config import Level, Positive
from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.federated.client import share_each
from splitlab.federated.defences.record import Client, Defence, UpdateDefence, length, protected
from splitlab.federated.update import Update
from splitlab.privacy.draws import noised


@dataclass(frozen=True)
class PerExample(UpdateDefence):
    """DP-SGD: clip each example's gradient, add noise to the sum, divide by the batch size (Abadi et al. 2016, alg. 1).

    Attributes:
        max_grad_norm: L2 bound C of one example's gradient over all shared parameters.
        noise_multiplier: standard deviation of the noise on the sum, in units of C.
    """

    max_grad_norm: Positive
    noise_multiplier: Level = 0.0


def dp_sgd(examples: Sequence[Update], levels: PerExample, *, generator: Source) -> Update:
    """Combine the updates of single examples as DP-SGD does; norms in float64, so that no clipped one exceeds C."""
    total: dict[str, Tensor] = {}
    # Clip each example's gradient to norm C, and add them up.
    for example in examples:
        values = {name: value.double() for name, value in example.gradients.items()}
        factor = min(1.0, levels.max_grad_norm / max(float(length(values)), 1e-300))
        total = {name: total.get(name, 0.0) + factor * value for name, value in values.items()}
    # Add noise of standard deviation σC to the sum, and divide by the batch size.
    std = levels.noise_multiplier * levels.max_grad_norm
    noisy = {name: noised(value, std, generator) for name, value in total.items()}
    return protected(examples[0], {name: value / len(examples) for name, value in noisy.items()}, levels)


def shared(client: Client, levels: PerExample, generator: Source) -> Update:
    """Send the batch's clipped and noised gradient.

    Raises:
        InputError: it is no gradient of one step that is to be sent.
    """
    if client.arguments.get("kind", "gradient") != "gradient":
        raise InputError("per-example clipping is defined on the gradient of one step; use kind='gradient'")
    return dp_sgd(share_each(client.model, client.truth, **client.arguments), levels, generator=generator)


DEFENCES = (
    Defence(
        "dp_sgd",
        PerExample,
        "DP-SGD's clipping and noise, σ {:g}",
        rank=60,
        effects=("rescaled", "noised"),
        level=lambda level: PerExample(1.0, level),
        share=shared,
    ),
)
