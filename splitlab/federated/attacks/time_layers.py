"""Where a model takes its timesteps in: found by running it, whatever its parts are called.

The model runs on one image at several timesteps, and on another at the first of them. A layer whose input is the same
for both images and differs between the timesteps sees the timestep alone; its input, tabulated over the schedule by the
model itself, is the e(t) of `timesteps`, be it sinusoids, learnt frequencies or a table.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.core.errors import InputError
from splitlab.diffusion.denoisers import ControlledUNet, needs, predict
from splitlab.federated.attacks.patches import EnoughError, capture, watched
from splitlab.federated.client import InversionKnowledge

ENTRIES = 2**21
"""Entries of noisy inputs per batch while embeddings are tabulated."""


@dataclass(frozen=True)
class TimeLayer:
    """A layer whose input is a function of the timestep alone.

    Attributes:
        name: of the module; its weight is `name`.weight.
        like: the first layer with the same input, perhaps itself.
        is_table: whether it looks the timestep up in a table, one row for each (an `nn.Embedding`).
    """

    name: str
    like: str
    is_table: bool


class TimeProbe:
    """Finds the layers of a model that see the timestep alone, and tabulates their inputs.

    Args:
        knowledge: the model, the length of its schedule, and facts; needed ones that are not granted are put as zeros.
        shape: (channels, height, width) of its input.
    """

    def __init__(self, knowledge: InversionKnowledge, shape: tuple[int, int, int]):
        model = knowledge.model
        self.model = copy.deepcopy(model).eval() if model.training else model
        self.knowledge, self.shape, self.n_timesteps = knowledge, shape, len(knowledge.alphas_cumprod)
        self.batch = max(1, ENTRIES // math.prod(shape))
        self.tables: dict[str, Tensor] = {}

    def first(self) -> TimeLayer:
        """Return the first such layer that runs; the model runs no further.

        Raises:
            InputError: there is none.
        """
        every = torch.arange(self.n_timesteps)
        seeing = self._find(every if self.n_timesteps < self.batch else every[[0, -1]], only_first=True)
        if self.n_timesteps < self.batch:
            self.tables = {name: rows[:-1] for name, (rows, _) in seeing.items()}
        return _layers(seeing)[0]

    def all(self) -> list[TimeLayer]:
        """Return the first such layer that runs, and then all others in the order in which the model lists them."""
        seeing = _layers(self._find(torch.tensor([0, self.n_timesteps - 1]), only_first=False))
        order = [name for name, _ in self.model.named_modules()]
        return [seeing[0], *sorted(seeing[1:], key=lambda layer: order.index(layer.name))]

    @torch.no_grad()
    def inputs(self, layers: Sequence[TimeLayer], at: Tensor | None = None) -> dict[str, Tensor]:
        """Return the input of each layer at every timestep `[T, d]`, or at some; of a table `[T, 1]`, the rows seen."""
        known = self.tables if at is None else {}
        names = sorted({layer.like for layer in layers} - set(known))
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        every = torch.arange(self.n_timesteps) if at is None else at
        for times in every.split(self.batch) if names else ():
            noisy = self._images(1).expand(len(times), -1, -1, -1)
            for name, value in capture(self.model, names, self._at(times), noisy).items():
                parts[name].append(value.reshape(len(times), -1))
        tables = known | {name: torch.cat(rows) for name, rows in parts.items()}
        return {layer.name: tables[layer.like] for layer in layers}

    @torch.no_grad()
    def _find(self, times: Tensor, *, only_first: bool) -> dict[str, tuple[Tensor, bool]]:
        """Return, by layer, its input at the timesteps, then at the first again, and whether it is a table."""
        seeing: dict[str, tuple[Tensor, bool]] = {}

        def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            rows = _rows(module, inputs, output, len(times) + 1)
            if rows is None or name in seeing or not _close(rows[0], rows[-1]) or _close(rows[0], rows[-2]):
                return
            seeing[name] = rows, isinstance(module, nn.Embedding)
            if only_first:
                raise EnoughError

        layers = {name: module for name, module in self.model.named_modules() if _weight(module) is not None}
        images = self._images(2)
        with watched(layers, note, outputs=True):
            self._at(torch.cat([times, times[:1]]))(torch.cat([images[:1].expand(len(times), -1, -1, -1), images[1:]]))
        if not seeing:
            raise InputError(
                f"timesteps are not recoverable: no layer of this {type(self.model).__name__} sees the timestep alone; "
                "grant knowledge.timesteps"
            )
        return seeing

    def _images(self, n: int) -> Tensor:
        return torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(0))

    def _at(self, times: Tensor) -> Callable[[Tensor], Tensor]:
        facts = stand_in_facts(self.knowledge, self.shape, len(times))
        return lambda noisy: predict(self.model, noisy, times, **facts, call=self.knowledge.call)


def _layers(seeing: Mapping[str, tuple[Tensor, bool]]) -> list[TimeLayer]:
    alike = {name: rows for name, (rows, _) in seeing.items()}
    return [TimeLayer(name, _like(rows, alike), is_table) for name, (rows, is_table) in seeing.items()]


def stand_in_facts(knowledge: InversionKnowledge, shape: tuple[int, int, int], n: int) -> dict[str, Any]:
    """Return facts for n inputs, the same for each: the first sample's where they are granted, else zeros if needed."""
    facts: dict[str, Any] = {}
    for name in ("text", "hint_latents", "class_labels"):
        value = getattr(knowledge, name)
        if value is None and knowledge.call is None and needs(knowledge.model, name):
            value = _zeros(knowledge.model, name, shape)
        if value is not None:
            facts[name] = value[:1].expand(n, *value.shape[1:])
    return facts


def _zeros(model: nn.Module, name: str, shape: tuple[int, int, int]) -> Tensor | None:
    inner = model.unet if isinstance(model, ControlledUNet) else model
    if name == "class_labels":
        return torch.zeros(1, dtype=torch.int64)
    if name == "text":
        width = getattr(inner, "config", {}).get("cross_attention_dim")
        return torch.zeros(1, 1, width) if isinstance(width, int) else None
    if not isinstance(model, ControlledUNet):
        return None
    embedding = getattr(model.controlnet, "controlnet_cond_embedding", None)
    strides = [m.stride[0] for m in embedding.modules() if isinstance(m, nn.Conv2d)] if embedding else []
    factor = int(torch.tensor(strides).prod()) if strides else 1
    return torch.zeros(1, 3 if strides else shape[0], shape[1] * factor, shape[2] * factor)


def _rows(module: nn.Module, inputs: tuple[Any, ...], output: Any, n: int) -> Tensor | None:
    """Return the input `[n, d]` of a linear layer or 1x1 convolution of any make, or of a table; else None."""
    weight, value = _weight(module), inputs[0] if inputs else None
    if not isinstance(value, Tensor) or not isinstance(output, Tensor) or value.ndim == 0 or len(value) != n:
        return None
    rows = value.reshape(n, -1)
    if isinstance(module, nn.Embedding):
        return rows if rows.shape[1] == 1 else None
    if weight is None or rows.shape[1] != weight[0].numel() or not rows.is_floating_point():
        return None
    right = F.linear(rows, weight.flatten(1), getattr(module, "bias", None))
    return rows if output.numel() == right.numel() and _close(output.reshape(n, -1), right) else None


def _weight(module: nn.Module) -> nn.Parameter | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.ndim > 1 else None


def _close(values: Tensor, other: Tensor) -> bool:
    return bool((values - other).abs().max() <= 1e-5 * other.abs().max())


def _like(rows: Tensor, inputs: dict[str, Tensor]) -> str:
    return next(name for name, other in inputs.items() if other.shape == rows.shape and _close(rows, other))
