"""The learned inverse network (He et al. 2019), trained on public data through the defences that are on."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.data.image_set import digest
from splitlab.diffusion.base import encoded
from splitlab.split.attacks.calibration import Calibration, CalibrationSet
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view, used_fields
from splitlab.split.attacks.networks import InverseNetwork, fit, initialised
from splitlab.split.attacks.posterior import denoise
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.attacks.simulated_client import imitable, imitate
from splitlab.split.defences.matched import signal_level
from splitlab.split.messages import Knowledge, Observation, Reconstruction

INPUTS = ("noisy_latents", "smashed", "noise")

MOST_PLACES = 1024
"""Latents of more positions are not mixed over all of them at once: that layer grows with their square."""

LEAST_ERROR = 0.01
"""Errors of latents below this are none: fp16 and the autoencoder err more."""

Steps = Annotated[int, Option("training steps (AdamW, one cycle)", least=2)]
Batch = Annotated[int, Option("samples per training step", least=1)]
Width = Annotated[int, Option("channels of the network", least=1)]
Blocks = Annotated[int, Option("residual blocks of the network", least=1)]
Rate = Annotated[float, Option("highest learning rate", above=0)]
Pool = Annotated[int, Option("imitated samples that the form with a prior is trained on", least=2)]


@dataclass(frozen=True)
class _Options:
    steps: int
    batch: int
    width: int
    n_blocks: int
    lr: float
    weight_decay: float


def inverse_network(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    prior: Annotated[bool, Option("start from the closed form and the public U-Net: adaptive_network")] = False,
    steps: Steps = 400,
    batch: Batch = 32,
    width: Width = 48,
    n_blocks: Blocks = 4,
    lr: Rate = 3e-3,
    pool: Pool = 2560,
) -> Reconstruction:
    """Train a network to undo the client on public data, then apply it to what was sent.

    The attacker imitates the client it faces: same fields, same defences, its own draws of what it does not know.
    Denied `noise` (`ignore: [noise]`), this is He et al.'s attack; with it, the network has to find the
    closed form by itself. Denied `defences`, it is trained on an undefended client: their attacker, who does not adapt.
    Every step imitates new messages. Needs `timesteps`, and `noisy_latents` or `smashed`.
    """
    seen, base = labelled(observations, knowledge), knowledge.base
    options = _Options(steps, batch, width, n_blocks, lr, weight_decay=0.1 if prior else 1e-4)
    if prior:
        return _improved(seen, observations, knowledge, generator, callback, options, pool)
    inputs = [name for name in INPUTS if getattr(seen, name) is not None and (name != "smashed" or imitable(knowledge))]
    if "noisy_latents" not in inputs and "smashed" not in inputs:
        raise InputError("the inverse network needs noisy_latents or smashed, and neither was sent")
    timesteps, data = seen.need("timesteps"), encoded(base, knowledge.public, cache=knowledge.cache)
    channels = data.latents.shape[1]
    path = _cached(knowledge, inputs, options, generator)
    network = _network(channels * len(inputs), 2 * channels, options, generator)

    # Step 1: learn the inverse on messages of an imitated client (He et al. 2019).
    def loss() -> Tensor:
        message, chosen = imitate(data, knowledge, options.batch, generator)
        maps = torch.cat([message.need(name) for name in inputs], 1)
        answer = network(maps, message.need("timesteps") / base.n_timesteps)
        return F.mse_loss(answer, torch.cat([data.latents[chosen], data.hint_latents[chosen]], 1))

    losses = _fit(network, loss, callback, options, path)

    # Step 2: apply it to the real ones.
    maps = torch.cat([seen.need(name) for name in inputs], 1).split(256)
    with torch.no_grad():
        levels = (timesteps / base.n_timesteps).split(256)
        latents, hints = torch.cat([network(m, t) for m, t in zip(maps, levels, strict=True)]).split(channels, 1)
    solved = () if seen.noise_pred is None or seen.noise is None else ("noise_pred", "noise_pred_gradient")
    used = ("timesteps", *(name for name in inputs if name != "noise" or not solved), *solved)
    return Reconstruction(base.decode(latents), base.decode(hints), used=used, objective=tuple(losses), n_evals=1)


def adaptive_network(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: Steps = 300,
    batch: Batch = 32,
    width: Width = 48,
    n_blocks: Blocks = 2,
    lr: Rate = 3e-3,
    pool: Pool = 2560,
) -> Reconstruction:
    """Train a network to improve on algebra and the public diffusion model: the strongest form of `inverse_network`.

    It starts where they end: its inputs are what follows from the message in closed form (`Clues`), and it learns, on a
    pool of imitated messages, what the denoised view and the solved hints still lack. Needs `noisy_latents` and
    `timesteps`.
    """
    seen, options = labelled(observations, knowledge), _Options(steps, batch, width, n_blocks, lr, weight_decay=0.1)
    return _improved(seen, observations, knowledge, generator, callback, options, pool)


def _network(
    n_inputs: int, n_outputs: int, options: _Options, generator: torch.Generator, **more: int
) -> InverseNetwork:
    with initialised(generator):
        return InverseNetwork(n_inputs, n_outputs, options.width, options.n_blocks, **more)


def _fit(
    network: InverseNetwork,
    loss_of: Callable[[], Tensor],
    callback: Callback | None,
    options: _Options,
    path: Path | None,
) -> list[float]:
    """Train, or read what was trained before."""
    if path and path.exists():
        tensors, meta = checkpoint.load(path, remedy=checkpoint.CACHED)
        network.load_state_dict(tensors)
        return list(meta["losses"])  # type: ignore[call-overload]
    cycle = {"steps": options.steps, "lr": options.lr, "weight_decay": options.weight_decay}
    losses = fit(network, loss_of, "inverse_network", callback, **cycle)  # type: ignore[arg-type]
    if path:
        checkpoint.save(path, network.state_dict(), {"losses": losses})
    return losses


def _cached(knowledge: Knowledge, inputs: Sequence[str], options: _Options, generator: torch.Generator) -> Path | None:
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

    def __init__(self, simulated: CalibrationSet, knowledge: Knowledge):
        self.simulated, self.knowledge = simulated, knowledge
        self.estimate = denoise(simulated.view, simulated.std, knowledge, text=simulated.text)
        self.calibration = Calibration(simulated.std, self.estimate, simulated.latents)
        self.hint_truth = simulated.data.hint_latents[simulated.chosen]

    def simulated_clues(self) -> Clues:
        """Return the clues in the imitated messages."""
        s = self.simulated
        raw = hint_latents(s.message, [s.message], s.known)
        return self._clues(s.message, s.view, s.std, self.estimate, raw, s.known, ruled_out=s.chosen)

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
        ruled_out: Tensor | None = None,
    ) -> Clues:
        latents = self.calibration(std, estimate)
        alphas = signal_level(knowledge.defences, seen.need("timesteps"), knowledge.base.alphas_cumprod)
        flat = torch.ones_like(view[:, :1])
        log_std = std.clamp_min(1e-3).log()
        maps = [view / (1 + std.square()).sqrt(), latents, flat * log_std / 3, flat * alphas.sqrt()]
        hints, hint_error = None, torch.zeros_like(std)
        if raw is not None:
            hints = torch.as_tensor(self.simulated.hints(self.simulated.clamp(raw), ruled_out=ruled_out))
            hint_error = hint_error + self.hint_error
            noise = knowledge.defences.hint_noise
            maps += [raw / (2 * math.sqrt(1 + noise**2)) if noise else raw.clamp(-8, 8) / 2, hints]
        text = None if seen.encoder_hidden_states is None else seen.encoder_hidden_states.flatten(1)
        level = (log_std.flatten() + 7) / 11
        return Clues(torch.cat(maps, 1), level, text, latents, hints, self.calibration.error(std), hint_error)

    @cached_property
    def hint_error(self) -> float:
        """Root mean square error of the estimated hints on imitated messages."""
        hints = torch.as_tensor(self.simulated.hints(self.simulated.raw_hints, ruled_out=self.simulated.chosen))
        return float((hints - self.hint_truth).square().mean().sqrt())


def _improved(
    seen: Observation,
    observations: Sequence[Observation],
    knowledge: Knowledge,
    generator: torch.Generator,
    callback: Callback | None,
    options: _Options,
    pool: int,
) -> Reconstruction:
    """Learn what the closed form and the public U-Net leave to be learned."""
    base = knowledge.base
    for name in ("noisy_latents", "timesteps"):
        seen.need(name)
    if not imitable(knowledge):
        seen = seen.without("smashed")

    # Step 1: estimate the samples behind imitated messages, and what those estimates lack, in units of their errors.
    path = _cached(knowledge, list(seen.tensors), options, generator)
    simulated = CalibrationSet(seen, observations, knowledge, generator, n=pool)
    detective = _Detective(simulated, knowledge)
    clues = detective.simulated_clues()
    latent_scale, hint_scale = (e.clamp_min(LEAST_ERROR) for e in (clues.latent_error, clues.hint_error))
    lacking = (simulated.latents - clues.latents) / latent_scale
    if clues.hints is not None:
        lacking = torch.cat([lacking, (detective.hint_truth - clues.hints) / hint_scale], 1)

    # Step 2: learn that, from an output of zero (compare Karras et al. 2022, eq. 7), on all samples but an eighth.
    network = _residual_network(clues, lacking.shape[1], options, generator)
    n_trained = len(lacking) - max(len(lacking) // 8, 1)

    def loss() -> Tensor:
        chosen = torch.randint(n_trained, (options.batch,), generator=generator)
        part = clues[chosen]
        return F.mse_loss(network(part.maps, part.level, part.text), lacking[chosen])

    losses = _fit(network, loss, callback, options, path)

    # Step 3: correct the estimates by as much of its output as pays on that eighth.
    rest = torch.arange(n_trained, len(lacking))
    gains = _gains(_run(network, clues[rest]), lacking[rest], simulated.latents.shape[1])
    latents, hints = _corrected(network, detective.clues(seen, observations), gains)
    used = used_fields(seen) if hints is None else (*used_fields(seen), "smashed")
    pictures = None if hints is None else base.decode(hints)
    return Reconstruction(base.decode(latents), pictures, used=used, objective=tuple(losses), n_evals=2)


def _residual_network(clues: Clues, n_outputs: int, options: _Options, generator: torch.Generator) -> InverseNetwork:
    n_context = 0 if clues.text is None else clues.text.shape[1]
    places = clues.maps[0, 0].numel()
    more = {"n_frequencies": 4, "n_context": n_context, "n_places": places if places <= MOST_PLACES else 0}
    network = _network(clues.maps.shape[1], n_outputs, options, generator, **more)
    nn.init.zeros_(network.last.weight)
    nn.init.zeros_(torch.as_tensor(network.last.bias))
    return network


@torch.no_grad()
def _run(network: InverseNetwork, clues: Clues) -> Tensor:
    parts = [clues[chosen] for chosen in torch.arange(len(clues.level)).split(256)]
    return torch.cat([network(part.maps, part.level, part.text) for part in parts])


def _gains(outputs: Tensor, lacking: Tensor, channels: int) -> list[float]:
    """Return by how much of the network's output, 0 to 1, to correct latents and hints: the best on samples kept back.

    So a network that has only learned its training samples by heart does no harm.
    """
    pairs = zip(outputs.split(channels, 1), lacking.split(channels, 1), strict=True)
    return [min(max(float((f * w).sum() / f.square().sum().clamp_min(1e-12)), 0.0), 1.0) for f, w in pairs]


def _corrected(network: InverseNetwork, clues: Clues, gains: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    outputs = _run(network, clues).split(clues.latents.shape[1], 1)
    latents = clues.latents + gains[0] * clues.latent_error.clamp_min(LEAST_ERROR) * outputs[0]
    if clues.hints is None:
        return latents, None
    return latents, clues.hints + gains[1] * clues.hint_error.clamp_min(LEAST_ERROR) * outputs[1]


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
        shows_hints=True,
    ),
    Attack(
        adaptive_network,
        "adaptive inverse network",
        rank=61,
        family=NETWORK,
        reason="a network trained through the defence on public images, with the public denoiser, undoes it",
    ),
)
