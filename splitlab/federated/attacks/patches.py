"""What a weight gradient says about its layer's input, whatever the loss: the input's patches span the gradient's rows.

For a convolution or a linear layer, dL/dW = Σ_p δ_p a_pᵀ over positions p, where a_p is the input patch under the
kernel and δ_p the signal that comes back. The rows of dL/dW [outputs, D] therefore lie in the span of the P patches, a
proper subspace wherever P < D; with as many outputs as patches they are the span. That holds on the coarser levels of
most U-Nets. Neither the loss, nor the noise, nor the residual appears: a noisy input that the update came from is one
whose patches fit. This asks for first derivatives only and for no more of the network than leads to the layers used.
Extends the span tests of linear layers (Petrov et al. 2024, DAGER; Dimitrov et al. 2024, SPEAR) to convolutions, whose
overlapping patches leave hardly any freedom.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Forward = Callable[[Tensor], Tensor]
"""Runs the model on noisy inputs `[m, c, h, w]` and returns its prediction."""


@dataclass(frozen=True)
class Layer:
    """A layer whose input can be tested.

    Attributes:
        name: of the module.
        order: when it runs in the forward pass.
        positions: patches per sample.
        width: D, the entries of a patch.
        outputs: rows of its weight gradient.
    """

    name: str
    order: int
    positions: int
    width: int
    outputs: int

    def is_spanned(self, batch: int) -> bool:
        """Say whether the gradient's rows span all patches of a batch: then each image can be tested by itself."""
        return batch * self.positions <= min(self.outputs, self.width - 1)

    def equations(self, batch: int) -> int:
        """How many independent equations the span test states about one image."""
        return self.positions * (self.width - batch * self.positions) if self.is_spanned(batch) else 0


class EnoughError(Exception):
    """Ends a forward pass after the last layer of interest."""


@contextmanager
def watched(modules: Mapping[str, nn.Module], note: Callable[..., None], *, outputs: bool = False) -> Iterator[None]:
    """Tell `note` the name, the module and the inputs (then the output) of each module that runs within the block.

    It may raise `EnoughError`, which ends the block there.
    """
    register = nn.Module.register_forward_hook if outputs else nn.Module.register_forward_pre_hook
    handles = [register(module, partial(note, name)) for name, module in modules.items()]
    try:
        yield
    except EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()


def capture(model: nn.Module, names: Sequence[str], forward: Forward, noisy: Tensor) -> dict[str, Tensor]:
    """Return the inputs of the modules `names`, running the model no further than the last of them."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0]
        if len(seen) == len(names):
            raise EnoughError

    with watched({name: model.get_submodule(name) for name in names}, note):
        forward(noisy)
    return seen


@dataclass(frozen=True)
class Geometry:
    """How a convolution's kernel meets its input; None in place of one: a linear layer."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def is_supported(module: nn.Module) -> bool:
    """Say whether `patches` knows the module: linear layers, and convolutions of one group padded with zeros.

    A module of another code base counts by the shape of its weight; whether it works as one is for `products` to say.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"
    if isinstance(module, nn.Linear):
        return True
    weight, is_torch = getattr(module, "weight", None), type(module).__module__.startswith("torch.")
    return isinstance(weight, nn.Parameter) and weight.ndim in (2, 4) and not is_torch


def geometry(module: nn.Module) -> Geometry | None:
    """Return the geometry of a supported module; one of another code base is taken to keep height and width."""
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str), "not is_supported"
        return Geometry(module.kernel_size, module.stride, module.padding, module.dilation)
    kernel = tuple(module.get_parameter("weight").shape[2:])
    return Geometry(kernel, (1, 1), tuple(size // 2 for size in kernel), (1, 1)) if kernel else None


def patches(module: nn.Module, inputs: Tensor) -> Float[Tensor, "m p d"]:
    """Return what the module's weight is multiplied with, position by position."""
    shape = geometry(module)
    if shape is None:
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])
    unfolded = F.unfold(inputs, shape.kernel, dilation=shape.dilation, padding=shape.padding, stride=shape.stride)
    return unfolded.transpose(1, 2)


def find_layers(
    model: nn.Module, names: Sequence[str], forward: Forward, probe: Float[Tensor, "1 c h w"]
) -> list[Layer]:
    """List the layers whose weights are among the parameters `names` and whose input depends on the image.

    Args:
        model: the attacked model.
        names: of parameters in the update that are `products` of their layer.
        forward: runs the model on a probe.
        probe: any input of the right shape.
    """
    shared = set(names)
    candidates = {
        name: module for name, module in model.named_modules() if f"{name}.weight" in shared and is_supported(module)
    }
    layers: dict[str, Layer] = {}
    again: set[str] = set()  # the gradient of a layer that runs twice mixes two inputs

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name in layers:
            again.add(name)
        elif inputs[0].requires_grad:
            _, positions, width = patches(module, inputs[0]).shape
            layers[name] = Layer(name, len(layers), positions, width, len(module.get_parameter("weight")))

    with watched(candidates, note):
        forward(probe.detach().clone().requires_grad_(True))
    return [layer for name, layer in layers.items() if name not in again]


def choose_layers(layers: Sequence[Layer], *, batch: int, unknowns: int, margin: float = 4.0) -> list[Layer]:
    """Choose the layers to test: from the first on, until they state `margin` times as many equations as unknowns.

    The earlier a layer, the less of the network is in the way. Empty if all of them together state too few.
    """
    chosen, stated = [], 0
    for layer in sorted(layers, key=lambda layer: layer.order):
        if layer.equations(batch) >= unknowns // 4:
            chosen.append(layer)
            stated += layer.equations(batch)
        if stated >= margin * unknowns:
            return chosen
    return chosen if stated >= unknowns else []


class SpanTest:
    """How far candidate inputs are from being among those that sent n updates.

    The loss is the share of the patches' energy outside of the row space of the weight gradient: 0 at each image of
    the update. A mean over layers, rows of equal weight.

    Args:
        model: the attacked model.
        layers: the layers to test, all `is_spanned`.
        gradients: n updates' gradients by parameter name.
        batch: images per update.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], gradients: Sequence[dict[str, Tensor]], *, batch: int
    ):
        self.model, self.layers = model, sorted(layers, key=lambda layer: layer.order)
        self.rows: dict[str, Tensor] = {}
        for layer in self.layers:
            weights = torch.stack([g[f"{layer.name}.weight"].flatten(1) for g in gradients]).double()
            rows = torch.linalg.svd(weights, full_matrices=False)[2]
            self.rows[layer.name] = rows[:, : batch * layer.positions].float()

    def losses(
        self,
        forward: Forward,
        noisy: Float[Tensor, "m c h w"],
        owners: Int[Tensor, " m"],
        *,
        explained: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "m l"]:
        """Return each input's loss at each layer.

        Args:
            forward: runs the model on the inputs.
            noisy: the inputs.
            owners: the number of the update that each is tested against.
            explained: by layer, orthonormal (or zero) rows `[m, k, d]` that other images of the update account for:
                energy in their span counts for nothing, so that the test does not find the same image again.
        """
        inputs = capture(self.model, [layer.name for layer in self.layers], forward, noisy)
        losses = []
        for layer in self.layers:
            rows = self.rows[layer.name][owners]
            seen = patches(self.model.get_submodule(layer.name), inputs[layer.name])
            outside = (seen - seen @ rows.mT @ rows).square().sum((1, 2))
            whole = seen.square().sum((1, 2))
            if explained is not None:
                whole = whole - (seen @ explained[layer.name].mT).square().sum((1, 2)) + 1e-4 * whole
            losses.append(outside / whole)
        return torch.stack(losses, 1)

    @torch.no_grad()
    def bases(self, forward: Forward, noisy: Float[Tensor, "m c h w"]) -> dict[str, Tensor]:
        """Return, by layer, orthonormal rows `[m, positions, d]` that span each input's patches."""
        inputs = capture(self.model, [layer.name for layer in self.layers], forward, noisy)
        axes = {}
        for layer in self.layers:
            seen = patches(self.model.get_submodule(layer.name), inputs[layer.name])
            axes[layer.name] = torch.linalg.qr(seen.double().mT)[0].mT.float()
        return axes
