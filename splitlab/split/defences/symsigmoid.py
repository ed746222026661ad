"""S1's activation of the cut layer (Yao 2024)."""

from dataclasses import replace

from splitlab.core.seeds import Key, Source
from splitlab.diffusion.controlnet import symsigmoid
from splitlab.split.defences.record import Defence, Defences, latent_hints_only
from splitlab.split.messages import Observation


def activate(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Pass `smashed` through the activation."""
    return replace(message, smashed=symsigmoid(message.need("smashed")))


DEFENCES = (
    Defence(
        "symsigmoid",
        off=False,
        says="replace the cut-layer sum x by |x| (2 sigmoid(x) - 1)",
        label="symsigmoid activation",
        place=90,
        touches=("smashed",),
        transform=activate,
        refuses_run=latent_hints_only(
            "symsigmoid is for latent hints; split_gradients has a trained hint encoder: leave it out",
        ),
    ),
)
