"""Signs alone."""

from dataclasses import dataclass

from splitlab.core.seeds import Source
from splitlab.federated.defences.record import Defence, Gradients, UpdateDefence


@dataclass(frozen=True)
class Sign(UpdateDefence):
    """Replace each value by its sign times its tensor's mean magnitude (Bernstein et al. 2018)."""


def signs(values: Gradients, levels: Sign, generator: Source) -> Gradients:
    """Replace tensor by tensor."""
    return {name: value.sign() * value.abs().mean() for name, value in values.items()}


DEFENCES = (
    Defence(
        "sign", Sign, "signs alone", rank=50, effects=("rescaled", "rounded"), level=lambda level: Sign(), protect=signs
    ),
)
