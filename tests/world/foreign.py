"""Clients of other code bases: their gradients, and attacks on them by `attack_gradient` alone."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from splitlab import attack_gradient
from splitlab.study.update_scores import matched
from world import tiny
from world.lookalikes import SIZE
from world.tiny import ALPHAS

TOLD = {"size": SIZE, "alphas_cumprod": ALPHAS}
"""What `attack_gradient` has to be told of a `ConvTimeNet`."""

Predict = Callable[[nn.Module, Tensor, Tensor], Tensor]


def images(n: int, *shape: int) -> Tensor:
    channels, height, width = shape or (3, SIZE, SIZE)
    shapes = torch.nn.functional.interpolate(tiny.small_set(n, seed=3).images, size=(height, width), mode="area")
    return shapes.repeat(1, 2, 1, 1)[:, :channels]


def made(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


def gradient(model: nn.Module, clean: Tensor, times: list[int], run: Predict) -> tuple[dict[str, Tensor], Tensor]:
    """Return a client's gradient as any training loop makes it, and its noise."""
    noise, t = torch.randn(clean.shape, generator=tiny.draw(5)), torch.tensor(times)
    alphas = ALPHAS[t][:, None, None, None]
    loss = (run(model, alphas.sqrt() * clean + (1 - alphas).sqrt() * noise, t) - noise).square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}, noise


def psnr_db(found: Tensor, truth: Tensor) -> float:
    error = (matched(found, truth, len(truth)) - truth).square().mean((1, 2, 3)).max()
    return float(-10 * torch.log10(error / 4))


def run(model: nn.Module, noisy: Tensor, t: Tensor) -> Tensor:
    return model(noisy, t.float())["sample"]


def attacked(shared: Any, model: nn.Module, **told: Any) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = attack_gradient(shared, model=model, **(TOLD | told))
    return found, " ".join(str(entry.message) for entry in caught)
