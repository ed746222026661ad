"""The learned inverse network (He et al. 2019), trained on public data through the defences that are on."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.base import Encoded, encoded, noised
from splitlab.config import Defences
from splitlab.defences import (
    Defence,
    draw_noise,
    draw_timesteps,
    protect,
    sent_timesteps,
    signal_level,
    transforms,
)
from splitlab.errors import InputError
from splitlab.types import Callback, Knowledge, Observation, Reconstruction, stack

INPUTS = ("noisy_latents", "smashed", "noise")


class InverseNetwork(nn.Module):
    """Maps the sent maps `[b, k, h, w]` and the timestep to image and hint latents, through residual blocks.

    Every block is modulated by the timestep (feature-wise affine), since the task is another one at every noise level.
    """

    def __init__(self, n_inputs: int, n_outputs: int, width: int, n_blocks: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, 2 * width * n_blocks))
        self.first = nn.Conv2d(n_inputs, width, 3, padding=1)
        self.entries = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(n_blocks))
        self.exits = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(n_blocks))
        self.last = nn.Conv2d(width, n_outputs, 3, padding=1)

    def forward(self, maps: Float[Tensor, "b k h w"], level: Float[Tensor, " b"]) -> Float[Tensor, "b o h w"]:
        """Reconstruct; `level` is the noise level in [0, 1]."""
        frequencies = 2.0 ** torch.arange(16)
        angles = math.pi * level[:, None] * frequencies
        styles = self.embed(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None].chunk(len(self.exits), 1)
        x = self.first(maps)
        for entry, leave, style in zip(self.entries, self.exits, styles, strict=True):
            scale, shift = style.chunk(2, 1)
            x = x + leave(F.silu(entry(F.silu(x)) * (1 + scale) + shift))
        return self.last(F.silu(x))


def inverse_network(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: int = 400,
    batch: int = 32,
    width: int = 48,
    n_blocks: int = 4,
    lr: float = 3e-3,
) -> Reconstruction:
    """Train a network to undo the client on public data, then apply it to what was sent.

    The attacker imitates the client it faces: same fields, same defences, its own draws of what it does not know.
    Denied `noise` (`ignore: [noise]`), this is He et al.'s attack; with it, the network has to find the
    closed form by itself.

    Args:
        observations: what was sent; needs `noisy_latents` or `smashed`, and `timesteps`.
        knowledge: the threat model.
        generator: of initialisation and training draws.
        callback: told of every step's loss.
        steps, batch, lr: of training (AdamW, cosine decay).
        width, n_blocks: of the network.
    """
    seen, base = stack(observations), knowledge.base
    inputs = [
        name for name in INPUTS if getattr(seen, name) is not None and (name != "smashed" or _imitable(knowledge))
    ]
    if not inputs:
        raise InputError("the inverse network needs noisy_latents or smashed, and neither was sent")
    timesteps = seen.need("timesteps")
    data = encoded(base, knowledge.public, cache=knowledge.cache)
    channels = data.latents.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = InverseNetwork(channels * len(inputs), 2 * channels, width, n_blocks)
    losses = _fit(network, inputs, data, knowledge, generator, callback, steps=steps, batch=batch, lr=lr)
    with torch.no_grad():
        maps = torch.cat([seen.need(name) for name in inputs], 1)
        found = torch.cat(
            [network(m, t / base.n_timesteps) for m, t in zip(maps.split(256), timesteps.split(256), strict=True)]
        )
    latents, hint_latents = found.split(channels, 1)
    return Reconstruction(
        base.decode(latents),
        base.decode(hint_latents),
        used=("timesteps", *inputs),
        objective=tuple(losses),
        n_evals=1,
    )


def _imitable(knowledge: Knowledge) -> bool:
    """Say whether the attacker can compute `smashed` itself: not where the client's part is trained in secret."""
    return knowledge.scheme == "split"


def _fit(
    network: InverseNetwork,
    inputs: Sequence[str],
    data: Encoded,
    knowledge: Knowledge,
    draw: torch.Generator,
    callback: Callback | None,
    *,
    steps: int,
    batch: int,
    lr: float,
) -> list[float]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for step in tqdm(range(steps), desc="inverse network", mininterval=2, leave=False):
        message, chosen = _imitate(data, knowledge, batch, draw)
        maps = torch.cat([message.need(name) for name in inputs], 1)
        found = network(maps, message.need("timesteps") / knowledge.base.n_timesteps)
        loss = F.mse_loss(found, torch.cat([data.latents[chosen], data.hint_latents[chosen]], 1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if callback:
            callback("inverse_network", step + 1, steps, losses[-1])
    return losses


def _imitate(data: Encoded, knowledge: Knowledge, batch: int, draw: torch.Generator) -> tuple[Observation, Tensor]:
    """Play the client on public data, with fresh draws of every secret, fixed noise included."""
    defences, alphas_cumprod = knowledge.defences, knowledge.base.alphas_cumprod
    chosen = torch.randint(len(data), (batch,), generator=draw)
    named = sent_timesteps(defences, draw_timesteps(defences, batch, alphas_cumprod, draw), alphas_cumprod)
    latents = data.latents[chosen]
    noise = draw_noise(defences, tuple(latents.shape), draw)
    noisy = noised(latents, noise, signal_level(defences, named, alphas_cumprod))
    message = Observation(-1, -1, named, noisy, data.hint_latents[chosen] + noisy, noise)
    message = protect(message, _secretless(defences), draw).float()
    if defences.fixed_noise:
        secret = torch.randn(latents.shape, generator=draw) * defences.fixed_noise
        message = replace(message, smashed=message.need("smashed") + secret)
    return message, chosen


def _secretless(defences: Defences) -> tuple[Defence, ...]:
    """Return the transforms that need no key; keys that the attacker does not know are drawn anew."""
    keyed = bool(defences.key_mixing or defences.patch_shuffle)
    return transforms(replace(defences, fixed_noise=0.0, fresh_keys=keyed), client_key=0)
