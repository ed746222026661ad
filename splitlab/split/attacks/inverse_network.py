"""The learned inverse network (He et al. 2019), trained on public data through the defences that are on."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.data.image_set import digest
from splitlab.diffusion.base import encoded
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view
from splitlab.split.attacks.networks import InverseNetwork
from splitlab.split.attacks.posterior import Calibration, CalibrationSet, denoise, used_fields
from splitlab.split.attacks.record import Attack, Family
from splitlab.split.attacks.simulated_client import imitable, imitate
from splitlab.split.defences.matched import signal_level
from splitlab.split.messages import Knowledge, Observation, Reconstruction

INPUTS = ("noisy_latents", "smashed", "noise")


MOST_PLACES = 1024
"""Latents of more positions are not mixed over all of them at once: that layer grows with their square."""


def inverse_network(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    prior: bool = False,
    steps: int = 400,
    batch: int = 32,
    width: int = 48,
    n_blocks: int = 4,
    lr: float = 3e-3,
    pool: int = 2560,
) -> Reconstruction:
    """Train a network to undo the client on public data, then apply it to what was sent.

    The attacker imitates the client it faces: same fields, same defences, its own draws of what it does not know.
    Denied `noise` (`ignore: [noise]`), this is He et al.'s attack; with it, the network has to find the
    closed form by itself. Denied `defences`, it is trained on an undefended client: their attacker, who does not adapt.

    With `prior`, the network starts where algebra and the public diffusion model end: its inputs are what follows
    from the message in closed form (`Clues`), and it learns what the denoised view and the solved hints still lack.

    Args:
        observations: what was sent; needs `timesteps`, and `noisy_latents` or `smashed`; with `prior`, `noisy_latents`.
        knowledge: the threat model.
        generator: of initialisation and training draws.
        callback: told of every step's loss (none where `knowledge.cache` holds the network).
        prior: improve on the closed form and the public U-Net, instead of starting from nothing.
        steps, batch, lr: of training (AdamW, one cycle).
        width, n_blocks: of the network.
        pool: with `prior`: imitated samples to train on (without, every step imitates new ones).

    Raises:
        InputError: a field that it needs was not sent.
    """
    seen = labelled(observations, knowledge)
    if prior:
        options = _Options(steps, batch, width, n_blocks, lr, pool, weight_decay=0.1)
        return _improved(seen, observations, knowledge, generator, callback, options)
    return _plain(seen, knowledge, generator, callback, _Options(steps, batch, width, n_blocks, lr))


def adaptive_network(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: int = 300,
    batch: int = 32,
    width: int = 48,
    n_blocks: int = 2,
    lr: float = 3e-3,
    pool: int = 2560,
) -> Reconstruction:
    """Run `inverse_network` with `prior`: the strongest form; arguments and errors as there."""
    seen = labelled(observations, knowledge)
    options = _Options(steps, batch, width, n_blocks, lr, pool, weight_decay=0.1)
    return _improved(seen, observations, knowledge, generator, callback, options)


@dataclass(frozen=True)
class _Options:
    steps: int
    batch: int
    width: int
    n_blocks: int
    lr: float
    pool: int = 0
    weight_decay: float = 1e-4


def _network(
    n_inputs: int, n_outputs: int, options: _Options, generator: torch.Generator, **more: int
) -> InverseNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return InverseNetwork(n_inputs, n_outputs, options.width, options.n_blocks, **more)


def _plain(
    seen: Observation, knowledge: Knowledge, generator: torch.Generator, callback: Callback | None, options: _Options
) -> Reconstruction:
    """He et al.: from the sent maps to image and hint, everything learned."""
    base = knowledge.base
    inputs = [name for name in INPUTS if getattr(seen, name) is not None and (name != "smashed" or imitable(knowledge))]
    if "noisy_latents" not in inputs and "smashed" not in inputs:
        raise InputError("the inverse network needs noisy_latents or smashed, and neither was sent")
    timesteps = seen.need("timesteps")
    data = encoded(base, knowledge.public, cache=knowledge.cache)
    channels = data.latents.shape[1]
    kept = _kept(knowledge, inputs, options, generator)
    network = _network(channels * len(inputs), 2 * channels, options, generator)

    def loss() -> Tensor:
        message, chosen = imitate(data, knowledge, options.batch, generator)
        maps = torch.cat([message.need(name) for name in inputs], 1)
        found = network(maps, message.need("timesteps") / base.n_timesteps)
        return F.mse_loss(found, torch.cat([data.latents[chosen], data.hint_latents[chosen]], 1))

    losses = _fit(network, loss, callback, options, kept)
    with torch.no_grad():
        maps = torch.cat([seen.need(name) for name in inputs], 1)
        found = torch.cat(
            [network(m, t / base.n_timesteps) for m, t in zip(maps.split(256), timesteps.split(256), strict=True)]
        )
    latents, hints = found.split(channels, 1)
    solved = () if seen.noise_pred is None or seen.noise is None else ("noise_pred", "noise_pred_gradient")
    used = ("timesteps", *(name for name in inputs if name != "noise" or not solved), *solved)
    return Reconstruction(base.decode(latents), base.decode(hints), used=used, objective=tuple(losses), n_evals=1)


def _fit(
    network: InverseNetwork,
    loss_of: Callable[[], Tensor],
    callback: Callback | None,
    options: _Options,
    kept: Path | None,
) -> list[float]:
    """Train by AdamW under one cycle of the learning rate (Smith & Topin 2018), or read what was trained before."""
    if kept and kept.exists():
        tensors, meta = checkpoint.load(kept, remedy=checkpoint.CACHED)
        network.load_state_dict(tensors)
        return list(meta["losses"])  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    losses = []
    for step in tqdm(range(options.steps), desc="inverse network", mininterval=2, leave=False):
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if callback:
            callback("inverse_network", step + 1, options.steps, losses[-1])
    if kept:
        checkpoint.save(kept, network.state_dict(), {"losses": losses})
    return losses


def _kept(knowledge: Knowledge, inputs: Sequence[str], options: _Options, generator: torch.Generator) -> Path | None:
    """Name the file of a network that does not depend on the defences, by all that determines it; else None.

    Only an attacker who was denied them trains the same network again for every defence.
    """
    if knowledge.cache is None or "defences" not in knowledge.ignored:
        return None
    facts = {
        "base": knowledge.base.digest,
        "public": knowledge.public.digest,
        "defences": knowledge.defences,
        "scheme": knowledge.scheme,
        "inputs": sorted(inputs),
        "options": options,
        "draw": hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest(),
        "torch": torch.__version__,
    }
    return knowledge.cache / f"inverse-{digest(facts)[:16]}.safetensors"


@dataclass(frozen=True)
class Clues:
    """What follows from messages in closed form.

    Attributes:
        maps: `[n, k, h, w]`: the latent view over sqrt(1 + std²), the calibrated one-step posterior mean, the raw hints
            and the estimated ones (where the cut allows), log std and sqrt(ᾱ).
        level: `[n]` log std, brought to [0, 1].
        text: `[n, e]` flattened text embeddings, or None.
        latents, hints: the estimates to improve on `[n, c, h, w]`; hints None where there are none.
        latent_error, hint_error: `[n, 1, 1, 1]`: their root mean square errors on public data.
    """

    maps: Tensor
    level: Tensor
    text: Tensor | None
    latents: Tensor
    hints: Tensor | None
    latent_error: Tensor
    hint_error: Tensor

    def __getitem__(self, chosen: Tensor) -> "Clues":
        return Clues(*(None if value is None else value[chosen] for value in vars(self).values()))  # type: ignore[arg-type]


class _Detective:
    """Finds clues in messages; what it needs to know of the estimates' errors it learns on imitated ones."""

    def __init__(self, calibration_set: CalibrationSet, knowledge: Knowledge):
        self.calibration_set, self.knowledge = calibration_set, knowledge
        self.estimate = denoise(calibration_set.view, calibration_set.std, knowledge, text=calibration_set.text)
        self.calibration = Calibration(calibration_set.std, self.estimate, calibration_set.latents)
        self.hint_truth = calibration_set.data.hint_latents[calibration_set.chosen]

    def simulated(self) -> Clues:
        """Return the clues in the imitated messages."""
        r = self.calibration_set
        raw = hint_latents(r.message, [r.message], r.known)
        return self._clues(r.message, r.view, r.std, self.estimate, raw, r.known, own=r.chosen)

    def clues(self, seen: Observation, observations: Sequence[Observation]) -> Clues:
        """Return the clues in the real messages."""
        view, std = latent_view(seen, self.knowledge)
        estimate = denoise(view, std, self.knowledge, text=seen.encoder_hidden_states)
        raw = hint_latents(seen, observations, self.knowledge)
        return self._clues(seen, view, std, estimate, raw, self.knowledge)

    def _clues(
        self,
        seen: Observation,
        view: Tensor,
        std: Tensor,
        estimate: Tensor,
        raw: Tensor | None,
        knowledge: Knowledge,
        own: Tensor | None = None,
    ) -> Clues:
        latents = self.calibration(std, estimate)
        alphas = signal_level(knowledge.defences, seen.need("timesteps"), knowledge.base.alphas_cumprod)
        flat = torch.ones_like(view[:, :1])
        log_std = std.clamp_min(1e-3).log()
        maps = [view / (1 + std.square()).sqrt(), latents, flat * log_std / 3, flat * alphas.sqrt()]
        hints, hint_error = None, torch.zeros_like(std)
        if raw is not None:
            hints = torch.as_tensor(self.calibration_set.hints(self.calibration_set.clamp(raw), own=own))
            hint_error = hint_error + self.hint_error
            noise = knowledge.defences.hint_noise
            maps += [raw / (2 * math.sqrt(1 + noise**2)) if noise else raw.clamp(-8, 8) / 2, hints]
        text = None if seen.encoder_hidden_states is None else seen.encoder_hidden_states.flatten(1)
        level = (log_std.flatten() + 7) / 11
        return Clues(torch.cat(maps, 1), level, text, latents, hints, self.calibration.error(std), hint_error)

    @cached_property
    def hint_error(self) -> float:
        """Root mean square error of the estimated hints on imitated messages."""
        r = self.calibration_set
        found = torch.as_tensor(r.hints(r.raw_hints, own=r.chosen))
        return float((found - self.hint_truth).square().mean().sqrt())


LEAST_ERROR = 0.01
"""Errors of latents below this are none: fp16 and the autoencoder err more."""


def _improved(
    seen: Observation,
    observations: Sequence[Observation],
    knowledge: Knowledge,
    generator: torch.Generator,
    callback: Callback | None,
    options: _Options,
) -> Reconstruction:
    """Learn what the closed form and the public U-Net leave to be learned.

    The network's output, times the error that the estimate has at its noise level (compare Karras et al. 2022, eq. 7),
    is added to the estimate; it starts at zero.
    """
    base = knowledge.base
    for name in ("noisy_latents", "timesteps"):
        seen.need(name)
    if not imitable(knowledge):
        seen = seen.without("smashed")
    kept = _kept(knowledge, list(seen.tensors), options, generator)
    calibration_set = CalibrationSet(seen, observations, knowledge, generator, n=options.pool)
    detective = _Detective(calibration_set, knowledge)
    known = detective.simulated()
    latent_scale, hint_scale = (e.clamp_min(LEAST_ERROR) for e in (known.latent_error, known.hint_error))
    wanted = (calibration_set.latents - known.latents) / latent_scale
    if known.hints is not None:
        wanted = torch.cat([wanted, (detective.hint_truth - known.hints) / hint_scale], 1)
    n_context = 0 if known.text is None else known.text.shape[1]
    places = known.maps[0, 0].numel()
    more = {"n_frequencies": 4, "n_context": n_context, "n_places": places if places <= MOST_PLACES else 0}
    network = _network(known.maps.shape[1], wanted.shape[1], options, generator, **more)
    nn.init.zeros_(network.last.weight)
    nn.init.zeros_(torch.as_tensor(network.last.bias))

    n_trained = len(wanted) - max(len(wanted) // 8, 1)

    def loss() -> Tensor:
        chosen = torch.randint(n_trained, (options.batch,), generator=generator)
        part = known[chosen]
        return F.mse_loss(network(part.maps, part.level, part.text), wanted[chosen])

    losses = _fit(network, loss, callback, options, kept)
    rest = torch.arange(n_trained, len(wanted))
    gains = _gains(_run(network, known[rest]), wanted[rest], calibration_set.latents.shape[1])
    latents, hints = _apply(network, detective.clues(seen, observations), gains)
    used = used_fields(seen) if hints is None else (*used_fields(seen), "smashed")
    pictures = None if hints is None else base.decode(hints)
    return Reconstruction(base.decode(latents), pictures, used=used, objective=tuple(losses), n_evals=2)


@torch.no_grad()
def _run(network: InverseNetwork, clues: Clues) -> Tensor:
    parts = [clues[chosen] for chosen in torch.arange(len(clues.level)).split(256)]
    return torch.cat([network(part.maps, part.level, part.text) for part in parts])


def _gains(found: Tensor, wanted: Tensor, channels: int) -> list[float]:
    """Return by how much of the network's output, 0 to 1, to correct latents and hints: the best on samples kept back.

    So a network that has only learned its training samples by heart does no harm.
    """
    pairs = zip(found.split(channels, 1), wanted.split(channels, 1), strict=True)
    return [min(max(float((f * w).sum() / f.square().sum().clamp_min(1e-12)), 0.0), 1.0) for f, w in pairs]


def _apply(network: InverseNetwork, clues: Clues, gains: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    found = _run(network, clues).split(clues.latents.shape[1], 1)
    latents = clues.latents + gains[0] * clues.latent_error.clamp_min(LEAST_ERROR) * found[0]
    if clues.hints is None:
        return latents, None
    return latents, clues.hints + gains[1] * clues.hint_error.clamp_min(LEAST_ERROR) * found[1]


NETWORK = Family(
    "Inverse network",
    "A network learns, on public images sent through an imitation of the client, to undo the client (He et al. "
    "2019). The adaptive form is trained through the defence that is on, and starts from what algebra and the "
    "public denoiser give.",
)

ATTACKS = (
    Attack(
        inverse_network,
        "inverse network",
        rank=60,
        family=NETWORK,
        reason="a network trained through the defence on public images undoes it",
        colour="#0072B2",
    ),
    Attack(
        adaptive_network,
        "adaptive inverse network",
        rank=61,
        family=NETWORK,
        reason="a network trained through the defence on public images, with the public denoiser, undoes it",
    ),
)
