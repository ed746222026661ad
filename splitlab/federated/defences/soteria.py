"""Soteria: one layer's gradient withheld where it says most about the image."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from splitlab.core.config import Share
from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.federated.client import training_loss
from splitlab.federated.defences.record import Client, Defence, UpdateDefence, protected
from splitlab.federated.update import Update, UpdateTruth
from splitlab.privacy.draws import integers


@dataclass(frozen=True)
class Soteria(UpdateDefence):
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
    inputs: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    clean = truth.clean.clone().requires_grad_(True)
    one_step = truth.timesteps.ndim == 1
    noise, timesteps = (truth.noise, truth.timesteps) if one_step else (truth.noise[0], truth.timesteps[0])
    facts = (truth.text, truth.hint_latents)
    try:
        training_loss(model, clean, timesteps, noise, *facts, alphas_cumprod=alphas_cumprod, objective=objective)
    finally:
        hook.remove()
    features = inputs[0] if inputs[0].ndim == 4 else inputs[0].mT
    signs = integers(0, 2, features.shape, generator) * 2.0 - 1.0
    scores = []
    for channel in range(features.shape[1]):
        projected = (features[:, channel] * signs[:, channel]).sum()
        (jacobian,) = torch.autograd.grad(projected, clean, retain_graph=True)
        scores.append(features[:, channel].detach().norm() / jacobian.norm().clamp_min(1e-30))
    return torch.stack(scores)


def withhold(update: Update, levels: Soteria, scores: Float[Tensor, " c"]) -> Update:
    """Zero the gradient of the layer's weight for the input channels of the highest scores.

    Raises:
        InputError: the update has no gradient of that layer's weight.
    """
    name = f"{levels.layer}.weight"
    if name not in update.gradients:
        raise InputError(f"Soteria: the update has no gradient of {name}; share it, or name another layer")
    kept = torch.ones(len(scores))
    kept[scores.argsort(descending=True)[: round(levels.fraction * len(scores))]] = 0.0
    value = update.gradients[name]
    mask = kept.view(1, -1, *[1] * (value.ndim - 2))
    return protected(update, update.gradients | {name: value * mask.to(value.dtype)}, levels)


def shared(client: Client, levels: Soteria, generator: Source) -> Update:
    """Send the update without what says most."""
    public = {name: value for name, value in client.arguments.items() if name in ("alphas_cumprod", "objective")}
    update = client.update()
    return withhold(
        update, levels, soteria_scores(client.model, client.truth, levels.layer, generator=generator, **public)
    )


DEFENCES = (
    Defence(
        "soteria",
        Soteria,
        "Soteria, {:g} of the last layer's channels withheld",
        rank=70,
        effects=("withheld",),
        share=shared,
    ),
)
