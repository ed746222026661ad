"""An update no longer than a bound."""

from dataclasses import dataclass

from splitlab.core.config import Positive
from splitlab.core.seeds import Source
from splitlab.federated.defences.record import Defence, Gradients, UpdateDefence, length


@dataclass(frozen=True)
class Clip(UpdateDefence):
    """Scale the whole update down to L2 norm `max_norm` if it is longer."""

    max_norm: Positive


def shorten(values: Gradients, levels: Clip, generator: Source) -> Gradients:
    """Scale all values by one factor."""
    factor = min(1.0, levels.max_norm / max(float(length(values)), 1e-300))
    return {name: value * factor for name, value in values.items()}


DEFENCES = (Defence("clip", Clip, "clipped to norm {:g}", rank=20, effects=("rescaled",), protect=shorten),)
