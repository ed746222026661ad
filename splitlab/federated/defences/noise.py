"""Gaussian noise on the finished update."""

from dataclasses import dataclass
from typing import Annotated

from splitlab.core.config import Level, one_of
from splitlab.core.seeds import Source
from splitlab.federated.defences.record import Defence, Gradients, UpdateDefence, length
from splitlab.privacy.draws import noised


@dataclass(frozen=True)
class GaussianNoise(UpdateDefence):
    """Add independent Gaussian noise.

    Attributes:
        rel: its standard deviation over the RMS of what it is added to.
        per: "tensor": the RMS of each parameter's own gradient, so that all lose equally; "update": one RMS and one
            standard deviation for all parameters.
    """

    rel: Level
    per: Annotated[str, one_of(("tensor", "update"))] = "tensor"


def add(values: Gradients, levels: GaussianNoise, generator: Source) -> Gradients:
    """Add the noise, tensor by tensor."""
    whole = length(values) / sum(value.numel() for value in values.values()) ** 0.5
    noisy = {}
    for name, value in values.items():
        rms = value.square().mean().sqrt() if levels.per == "tensor" else whole
        noisy[name] = noised(value, levels.rel * rms, generator)
    return noisy


DEFENCES = (
    Defence(
        "noise", GaussianNoise, "Gaussian noise, {:g} of the gradient's RMS", rank=10, effects=("noised",), protect=add
    ),
)
