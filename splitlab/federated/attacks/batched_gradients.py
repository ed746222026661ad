"""Parameter gradients of many updates from one batched forward and backward pass, and how they change with the inputs.

As in Goodfellow 2015 and Opacus: a layer's weight gradient is made of its input and of the signal that comes back to
its output, so that one batched pass serves all updates and a batched matrix product per layer tells them apart. Nothing
is differentiated with respect to a parameter, and no graph runs through the gradients: what a distance says about
them is handed back to inputs and signals by the same products. What belongs to no such layer, as an embedding or a lone
scale, is differentiated twice by autograd, update by update.

Which gradients are such products is tried, not assumed: a convolution may standardise its weight first, attention may
use a layer's weight without calling the layer, two layers may share one weight.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.federated.attacks.patches import Forward, Geometry, geometry, is_supported

TOLERANCE = 1e-3
"""A product that differs from the gradient by more than this, relatively, is another thing."""

NOTHING = 1e-5
"""Below this share of the largest tensor's length, a gradient is taken for rounding."""


class Tape:
    """Records inputs and outputs of the modules that own the parameters `names` while it is entered.

    Args:
        model: the attacked model, its parameters frozen.
        names: parameters that are `products` of their layer.
        others: further parameters.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], others: Sequence[str] = ()):
        self.names, self.others = list(names), {name: model.get_parameter(name) for name in others}
        self.modules = {owner: model.get_submodule(owner) for owner in {name.rpartition(".")[0] for name in names}}
        self.calls: list[tuple[str, Tensor, Tensor]] = []
        self.layers: list[tuple[str, _Linear | _Convolution | _Norm]] = []
        self.others_gradients: dict[str, Tensor] = {}

    def __enter__(self) -> "Tape":
        self.calls = []
        self._handles = [module.register_forward_hook(self._note(owner)) for owner, module in self.modules.items()]
        for parameter in self.others.values():
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, owner: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or not inputs:  # no layer, whatever the shape of its weight
                return output
            if not output.requires_grad:  # depends on no candidate, as the time embedding
                output = output.detach().requires_grad_(True)
            self.calls.append((owner, inputs[0], output))
            return output

        return hook

    def gradients(self, prediction: Tensor, signal: Tensor, *, batch: int) -> dict[str, Tensor]:
        """Return each update's parameter gradients `[u, ...]` given dL/dprediction `[u batch, c, h, w]`."""
        outputs = [output for _, _, output in self.calls]
        signals = torch.autograd.grad(prediction, outputs, signal, create_graph=True, materialize_grads=True)
        self.layers = [
            (owner, layer_of(self.modules[owner], inputs, back, batch))
            for (owner, inputs, _), back in zip(self.calls, signals, strict=True)
        ]
        self.others_gradients = self._twice(prediction, signal, batch)
        gradients = {name: value.detach() for name, value in self.others_gradients.items()}
        with torch.no_grad():
            for owner, layer in self.layers:
                for kind, value in layer.gradients().items():
                    name = f"{owner}.{kind}"
                    if name in self.names:
                        gradients[name] = gradients[name] + value if name in gradients else value
        return gradients

    def _twice(self, prediction: Tensor, signal: Tensor, batch: int) -> dict[str, Tensor]:
        """Return the gradients of `others` `[u, ...]`, differentiable."""
        if not self.others:
            return {}
        rows = []
        for number in range(len(signal) // batch):
            mask = torch.zeros_like(signal)
            mask[number * batch : (number + 1) * batch] = 1.0
            values = list(self.others.values())
            rows.append(
                torch.autograd.grad(prediction, values, mask * signal, create_graph=True, materialize_grads=True)
            )
        for parameter in self.others.values():
            parameter.requires_grad_(False)
        return {name: torch.stack(parts) for name, parts in zip(self.others, zip(*rows, strict=True), strict=True)}

    def pull(self, slopes: Mapping[str, Tensor], z: Tensor) -> Tensor:
        """Return the derivative by `z` of whatever has the derivatives `slopes` by the gradients last returned."""
        ends: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for owner, layer in self.layers:
                ends += layer.pull(slopes.get(f"{owner}.weight"), slopes.get(f"{owner}.bias"))
        ends += [(value, slopes[name]) for name, value in self.others_gradients.items()]
        self.layers, self.others_gradients = [], {}
        ends = [(tensor, slope) for tensor, slope in ends if tensor.requires_grad]
        return torch.autograd.grad([tensor for tensor, _ in ends], z, [slope for _, slope in ends])[0]


class _Linear:
    """A linear layer or a convolution of 1x1: its input `[u, p, d]`, its signal `[u, p, o]`, p over batch and places.

    Args:
        module: the layer.
        inputs: what it was given, images of one update next to each other.
        back: the signal that came back to its output, of which the gradients are made.
        batch: images per update.
    """

    def __init__(self, module: nn.Module, inputs: Tensor, back: Tensor, batch: int):
        self.module, self.inputs, self.back, self.batch = module, inputs, back, batch
        self.axis = 1 if geometry(module) else -1
        self.seen, self.signals = self._rows(inputs), self._rows(back)

    def gradients(self) -> dict[str, Tensor]:
        weight = torch.bmm(self.signals.mT, self.seen)
        return {"weight": weight.reshape(-1, *_weight(self.module).shape), "bias": self.signals.sum(1)}

    def pull(self, weight: Tensor | None, bias: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        ends = []
        if weight is not None:
            weight = weight.flatten(2)
            ends.append((self.back, self._unrows(torch.bmm(self.seen, weight.mT), self.back)))
            ends.append((self.inputs, self._unrows(torch.bmm(self.signals, weight), self.inputs)))
        if bias is not None:
            ends.append((self.back, self._unrows(bias[:, None].expand_as(self.signals), self.back)))
        return ends

    def _rows(self, value: Tensor) -> Tensor:
        """Return `[u, p, channels]`, free of the graph."""
        value = value.detach().movedim(self.axis, -1)
        return value.reshape(len(value) // self.batch, -1, value.shape[-1])

    def _unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return rows in the shape that they were made from."""
        return rows.reshape(like.movedim(self.axis, -1).shape).movedim(-1, self.axis)


class _Convolution:
    """A convolution, by the library's own convolutions update by update: they beat products of unfolded patches."""

    def __init__(self, module: nn.Module, shape: Geometry, inputs: Tensor, back: Tensor, batch: int):
        self.weight, self.shape, self.inputs, self.back = _weight(module), shape, inputs, back
        self.pairs = list(zip(inputs.detach().split(batch), back.detach().split(batch), strict=True))

    def gradients(self) -> dict[str, Tensor]:
        weights = [self._backward(seen, signal, self.weight, 1) for seen, signal in self.pairs]
        return {"weight": torch.stack(weights), "bias": torch.stack([s.sum((0, 2, 3)) for _, s in self.pairs])}

    def pull(self, weight: Tensor | None, bias: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        ends, shape = [], self.shape
        if weight is not None:
            biases = [None] * len(weight) if bias is None else bias
            with_weight = zip(self.pairs, weight, biases, strict=True)
            parts = [
                F.conv2d(seen, kernel, offset, shape.stride, shape.padding, shape.dilation)
                for (seen, _), kernel, offset in with_weight
            ]
            ends.append((self.back, torch.cat(parts)))
            if self.inputs.requires_grad:
                pairs = zip(self.pairs, weight, strict=True)
                parts = [self._backward(seen, signal, kernel, 0) for (seen, signal), kernel in pairs]
                ends.append((self.inputs, torch.cat(parts)))
        elif bias is not None:
            each = bias.repeat_interleave(len(self.back) // len(bias), 0)
            ends.append((self.back, each[:, :, None, None].expand_as(self.back)))
        return ends

    def _backward(self, seen: Tensor, signal: Tensor, weight: Tensor, which: int) -> Tensor:
        """Return the derivative by the input (0) or by the weight (1)."""
        shape, mask = self.shape, [which == 0, which == 1, False]
        how = (shape.stride, shape.padding, shape.dilation, False, [0, 0], 1)
        derivative: Tensor = torch.ops.aten.convolution_backward(signal, seen, weight, None, *how, mask)[which]
        return derivative


class _Norm:
    """A group or layer norm: its weight meets the normalised input, channel by channel."""

    def __init__(self, module: nn.GroupNorm | nn.LayerNorm, inputs: Tensor, back: Tensor, batch: int):
        self.back, self.batch = back, batch
        self.axis = 1 if isinstance(module, nn.GroupNorm) else -1
        if isinstance(module, nn.GroupNorm):
            self.normed = F.group_norm(inputs, module.num_groups, eps=module.eps)
        else:
            self.normed = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)

    def gradients(self) -> dict[str, Tensor]:
        return {"weight": self._sums(self.back * self.normed), "bias": self._sums(self.back)}

    def pull(self, weight: Tensor | None, bias: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        ends = []
        if weight is not None:
            weight = self._spread(weight)
            ends = [(self.normed, weight * self.back), (self.back, weight * self.normed)]
        return ends if bias is None else [*ends, (self.back, self._spread(bias).expand_as(self.back))]

    def _sums(self, value: Tensor) -> Tensor:
        value = value.movedim(self.axis, -1)
        return value.reshape(len(value) // self.batch, -1, value.shape[-1]).sum(1)

    def _spread(self, value: Tensor) -> Tensor:
        """Return `[u, channels]` as factors of the activations of all images."""
        each = value.repeat_interleave(self.batch, 0)
        shape = [len(each), *[1] * (self.back.ndim - 1)]
        shape[self.axis] = each.shape[1]
        return each.reshape(shape)


def layer_of(module: nn.Module, inputs: Tensor, back: Tensor, batch: int) -> "_Linear | _Convolution | _Norm":
    """Return how a module that `has_products` makes its gradient of an input and a signal."""
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return _Norm(module, inputs, back, batch)
    shape = geometry(module)
    point = shape and (max(shape.kernel), max(shape.stride), max(shape.padding)) == (1, 1, 0)
    return (
        _Convolution(module, shape, inputs, back, batch)
        if shape and not point
        else _Linear(module, inputs, back, batch)
    )


def has_products(module: nn.Module) -> bool:
    """Say whether the gradient of a module's weight may be a product that `layer_of` knows."""
    return is_supported(module) or isinstance(module, nn.GroupNorm | nn.LayerNorm)


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


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
