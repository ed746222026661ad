"""Parameter gradients of many updates from one batched forward and backward pass, differentiable in the inputs.

As in Goodfellow 2015 and Opacus: a layer's weight gradient is made of its input and of the signal that comes back to
its output, so that one batched pass serves all updates and a batched matrix product per layer tells them apart. Nothing
is differentiated with respect to a parameter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.errors import InputError
from splitlab.inversion.patches import is_supported, patches


class Tape:
    """Records inputs and outputs of the modules that own the parameters `names` while it is entered.

    Raises:
        InputError: a parameter belongs to a module of a kind that the tape cannot differentiate.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.names = list(names)
        self.modules = {owner: model.get_submodule(owner) for owner in {name.rpartition(".")[0] for name in names}}
        for owner, module in self.modules.items():
            if not (is_supported(module) or isinstance(module, nn.GroupNorm | nn.LayerNorm)):
                raise InputError(
                    f"parameter of {owner or 'the model'}: a {type(module).__name__} is not supported; "
                    "share only linear layers, zero-padded convolutions of one group, group and layer norms"
                )
        self.calls: list[tuple[str, Tensor, Tensor]] = []

    def __enter__(self) -> "Tape":
        self.calls = []
        self._handles = [module.register_forward_hook(self._note(owner)) for owner, module in self.modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, owner: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # depends on no candidate, as the time embedding
                output = output.detach().requires_grad_(True)
            self.calls.append((owner, inputs[0], output))
            return output

        return hook

    def gradients(self, prediction: Tensor, signal: Tensor, *, batch: int) -> dict[str, Tensor]:
        """Return each update's parameter gradients `[u, ...]` given dL/dprediction `[u batch, c, h, w]`."""
        outputs = [output for _, _, output in self.calls]
        signals = torch.autograd.grad(prediction, outputs, signal, create_graph=True, materialize_grads=True)
        found: dict[str, Tensor] = {}
        for (owner, inputs, _), back in zip(self.calls, signals, strict=True):
            for kind, value in _of_layer(self.modules[owner], inputs, back, batch).items():
                name = f"{owner}.{kind}"
                if name in self.names:
                    found[name] = found[name] + value if name in found else value
        return found


def _of_layer(module: nn.Module, inputs: Tensor, back: Tensor, batch: int) -> dict[str, Tensor]:
    """Return a layer's gradients, summed over each update's samples and positions."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        if isinstance(module, nn.Conv2d):
            back = back.flatten(2).mT
        back = back.reshape(len(inputs) // batch, -1, module.weight.shape[0])
        seen = patches(module, inputs)
        weight = back.mT @ seen.reshape(len(back), -1, seen.shape[-1])
        return {"weight": weight.reshape(len(back), *module.weight.shape), "bias": back.sum(1)}
    if isinstance(module, nn.GroupNorm):
        plain = F.group_norm(inputs, module.num_groups, eps=module.eps)
        pairs = {"weight": back * plain, "bias": back}
        sums = {name: value.flatten(2).sum(2) for name, value in pairs.items()}
    else:
        assert isinstance(module, nn.LayerNorm)
        plain = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        width = inputs.shape[-1]
        pairs = {"weight": back * plain, "bias": back}
        sums = {name: value.reshape(len(inputs), -1, width).sum(1) for name, value in pairs.items()}
    return {name: value.reshape(-1, batch, value.shape[1]).sum(1) for name, value in sums.items()}
