"""Which gradients are products of a layer's input and of the signal that comes back to its output? Tried, not assumed.

A convolution may standardise its weight first, attention may use a layer's weight without calling the layer, two layers
may share one weight: then the product is not the gradient. Both are computed once, at random inputs, and compared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from splitlab.federated.attacks.batched_gradients import Tape, has_products, layer_of
from splitlab.federated.attacks.patches import Forward

TOLERANCE = 1e-3
"""A product that differs from the gradient by more than this, relatively, is another thing."""

NOTHING = 1e-5
"""Below this share of the largest tensor's length, a gradient is taken for rounding."""


def products(model: nn.Module, names: Sequence[str], forward: Forward, probe: Tensor) -> frozenset[str]:
    """Return those of the parameters `names` whose gradient is the product of their layer's input and signal.

    Args:
        model: the attacked model, its parameters frozen.
        names: of its parameters.
        forward: runs the model on noisy inputs and returns its prediction.
        probe: noisy inputs `[1, c, h, w]`, random, so that nothing agrees by chance.
    """
    owners = {name: name.rpartition(".")[0] for name in names}
    candidates = [name for name, owner in owners.items() if has_products(model.get_submodule(owner))]
    parameters = [model.get_parameter(name) for name in candidates]
    for parameter in parameters:
        parameter.requires_grad_(True)
    prediction = forward(probe)
    signal = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1))
    right = torch.autograd.grad(prediction, parameters, signal, materialize_grads=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
    made = _made(Tape(model, candidates), forward, probe, signal)
    floor = NOTHING * max((float(value.norm()) for value in right), default=0.0)
    return frozenset(
        name
        for name, value in zip(candidates, right, strict=True)
        if name in made
        and made[name].shape == value.shape
        and float((made[name] - value).norm()) <= TOLERANCE * float(value.norm()) + floor
    )


def _made(tape: Tape, forward: Forward, probe: Tensor, signal: Tensor) -> dict[str, Tensor]:
    """Return the products, by parameter; none of a layer that was called in another way than its kind is."""
    with tape:
        prediction = forward(probe)
    outputs = [output for _, _, output in tape.calls]
    signals = torch.autograd.grad(prediction, outputs, signal, materialize_grads=True) if outputs else ()
    made: dict[str, Tensor] = {}
    for (owner, inputs, _), back in zip(tape.calls, signals, strict=True):
        try:
            with torch.no_grad():
                parts = layer_of(tape.modules[owner], inputs, back, 1).gradients()
        except (RuntimeError, IndexError):  # shapes that are no such layer's
            continue
        for kind, value in parts.items():
            name = f"{owner}.{kind}"
            made[name] = made[name] + value[0] if name in made else value[0]
    return made
