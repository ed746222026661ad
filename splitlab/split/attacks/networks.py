"""Networks that attackers train: how they are begun and fitted, and the one that inverse networks are."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core.progress import Callback

Rate = Callable[[int], float]
"""`step -> learning rate`."""


@contextmanager
def initialised(generator: torch.Generator) -> Iterator[None]:
    """Draw the initial weights of what is built inside from `generator`; torch's global state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        yield


def fit(
    network: nn.Module,
    loss_of: Callable[[], Tensor],
    what: str,
    callback: Callback | None,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    max_norm: float = 1.0,
    rate: Rate | None = None,
) -> list[float]:
    """Train by AdamW, in one cycle of the learning rate (Smith & Topin 2018) if in no other; return the losses.

    Args:
        network: what is trained, in place.
        loss_of: draws a batch and returns its loss.
        what: the attack, for the callback.
        callback: told of every step's loss.
        steps: 2 or more, unless there is a `rate`.
        lr: highest learning rate.
        weight_decay: AdamW's.
        max_norm: that gradients are clipped to.
        rate: takes the place of the cycle.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    rises = 2 / steps if 2 < steps < 20 else 0.1  # the rate rises over two steps at least; of two, over none
    cycle = None if rate else torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rises)
    losses: list[float] = []
    for step in tqdm(range(steps), desc=what.replace("_", " "), mininterval=2, leave=False):
        if rate:
            optimizer.param_groups[0]["lr"] = rate(step)
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        if cycle:
            cycle.step()
        losses.append(loss.item())
        if callback:
            callback(what, step + 1, steps, losses[-1])
    return losses


class InverseNetwork(nn.Module):
    """Maps `[b, k, h, w]` and the noise level to image and hint latents, through residual blocks.

    Every block is modulated by the level (feature-wise affine), since the task is another one at every noise level,
    and by a context vector `[b, n_context]` where there is one. With `n_places` = h w, information also goes
    between all positions after the first block (the mixing of positions in Tolstikhin et al. 2021).
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        width: int,
        n_blocks: int,
        *,
        n_frequencies: int = 16,
        n_context: int = 0,
        n_places: int = 0,
    ):
        super().__init__()
        self.n_frequencies = n_frequencies
        self.embed = nn.Sequential(
            nn.Linear(2 * n_frequencies, width), nn.SiLU(), nn.Linear(width, 2 * width * n_blocks)
        )
        self.first = nn.Conv2d(n_inputs, width, 3, padding=1)
        self.entries = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(n_blocks))
        self.exits = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(n_blocks))
        self.last = nn.Conv2d(width, n_outputs, 3, padding=1)
        self.context = nn.Linear(n_context, 2 * width * n_blocks) if n_context else None
        self.norm = self.mix = None
        if n_places:
            self.norm = nn.GroupNorm(1, width)
            self.mix = nn.Sequential(nn.Linear(n_places, 2 * n_places), nn.SiLU(), nn.Linear(2 * n_places, n_places))

    def forward(
        self,
        maps: Float[Tensor, "b k h w"],
        level: Float[Tensor, " b"],
        context: Float[Tensor, "b e"] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Reconstruct; `level` is the noise level in [0, 1]."""
        frequencies = 2.0 ** torch.arange(self.n_frequencies)
        angles = math.pi * level[:, None] * frequencies
        style = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        if self.context is not None and context is not None:
            style = style + self.context(context)
        styles = style[..., None, None].chunk(len(self.exits), 1)
        x = self.first(maps)
        for number, (entry, leave, modulation) in enumerate(zip(self.entries, self.exits, styles, strict=True)):
            scale, shift = modulation.chunk(2, 1)
            x = x + leave(F.silu(entry(F.silu(x)) * (1 + scale) + shift))
            if number == 0 and self.norm is not None and self.mix is not None:
                x = x + self.mix(self.norm(x).flatten(2)).view_as(x)
        return self.last(F.silu(x))
