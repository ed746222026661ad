"""Values rounded to few bits."""

from dataclasses import dataclass
from typing import Annotated

from splitlab.core.config import Rule
from splitlab.core.seeds import Source
from splitlab.federated.defences.record import Defence, Gradients, UpdateDefence
from splitlab.privacy.draws import uniform

BITS = Rule(lambda value: 2 <= value <= 16, "{name} must be from 2 to 16, got {value}; for one bit use Sign")


@dataclass(frozen=True)
class Quantise(UpdateDefence):
    """Round each tensor to 2^bits - 1 levels, evenly spaced over ± its largest magnitude.

    Attributes:
        bits: 2 to 16.
        stochastic: round up or down at random, without bias (Alistarh et al. 2017), instead of to the nearest.
    """

    bits: Annotated[int, BITS] = 8
    stochastic: bool = False


def rounded(values: Gradients, levels: Quantise, generator: Source) -> Gradients:
    """Round tensor by tensor."""
    result = {}
    for name, value in values.items():
        step = value.abs().amax() / (2 ** (levels.bits - 1) - 1)
        steps = value / step.clamp_min(1e-30)
        if levels.stochastic:
            steps = (steps + uniform(value.shape, generator)).floor()
        result[name] = steps.round() * step
    return result


DEFENCES = (
    Defence(
        "bits",
        Quantise,
        "rounded to {:g} bits",
        rank=40,
        effects=("rounded",),
        level=lambda level: Quantise(int(level)),
        protect=rounded,
    ),
)
