"""What all image inversions share: the updates and what is known, in the shapes they compute with, and their result."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from splitlab.errors import InputError
from splitlab.federated import ControlledUNet, InversionKnowledge, Update, check_update, plain_attention, predict
from splitlab.types import Callback

STRIP = (1, 3, 10, 30, 60, 100, 150, 200, 300, 400, 600, 800, 1000, 1500, 2000, 3000, 5000)
"""After how many evaluations an inversion keeps a picture of its progress."""


@dataclass(frozen=True)
class Inversion:
    """What an inversion made of updates, sample by sample, in the order of the updates.

    Attributes:
        images: `[n, 3, h, w]` in [-1, 1]; latents are decoded.
        clean: `[n, c, h, w]`: what the model was trained on, as reconstructed: pixels or latents, not clamped.
        objective: the attack's own objective as it went on, a mean over the updates.
        final: `[u]`: the objective of each update at its end.
        n_evals: evaluations of the objective per update.
        cpu_s: CPU seconds for all updates.
        history: `(n_evals, images)` on the way.
        timesteps: `[n]` int64, as used or found.
        noise: `[n, c, h, w]`, as used or found; None if the attack has no opinion.
        prompts: n prompts, where the attack finds some.
    """

    images: Tensor
    clean: Tensor
    objective: tuple[float, ...]
    final: Tensor
    n_evals: int
    cpu_s: float
    history: tuple[tuple[int, Tensor], ...] = ()
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    prompts: tuple[str, ...] = ()


class Problem:
    """Updates of one model and batch size, with what is known about their samples.

    Facts in `knowledge` are in the order of the samples: `[updates * batch, ...]`. The model is a frozen copy, with
    attention that can be differentiated twice.

    Args:
        updates: one update, or several to be inverted side by side.
        knowledge: the threat model.

    Raises:
        InputError: the updates do not fit the model or each other, or the facts do not fit the updates.
    """

    def __init__(self, updates: Update | Sequence[Update], knowledge: InversionKnowledge):
        self.updates = (updates,) if isinstance(updates, Update) else tuple(updates)
        if not self.updates:
            raise InputError("no update to invert; give at least one")
        first = self.updates[0]
        for number, update in enumerate(self.updates):
            check_update(update, knowledge.model, where=f"update {number}")
            if (update.size, update.objective, sorted(update.gradients)) != (
                first.size,
                first.objective,
                sorted(first.gradients),
            ):
                raise InputError(f"update {number} differs from the first in size, objective or parameters: split them")
        self.knowledge, self.objective = knowledge, first.objective
        self.model = plain_attention(copy.deepcopy(knowledge.model)).requires_grad_(False).eval()
        self.gradients = [update.mean_gradient() for update in self.updates]
        self.batch = knowledge.batch_size or self._count_samples()
        channels = _config(self.model, "in_channels")
        self.shape = (channels, first.size, first.size)
        self.n_samples = len(self.updates) * self.batch
        self.text, self.hint_latents = self._fact("text"), self._fact("hint_latents")

    @property
    def is_rescaled(self) -> bool:
        """Whether the client's defence, which is public, may have shortened the update."""
        return any(word in self.updates[0].defence for word in ("Clip", "PerExample", "Sign"))

    @property
    def withholds(self) -> bool:
        """Whether the client's defence, which is public, zeroes entries of the update."""
        return any(word in self.updates[0].defence for word in ("TopK", "Soteria"))

    @property
    def is_inexact(self) -> bool:
        """Whether rounding or a defence, which is public, keeps the update from being a float32 gradient."""
        update = self.updates[0]
        rounded = any(value.dtype != torch.float32 for value in update.gradients.values())
        return rounded or update.kind != "gradient" or update.defence != "none"

    def _count_samples(self) -> int:
        for name in ("timesteps", "noise"):
            value = getattr(self.knowledge, name)
            if value is not None:
                return max(1, len(value) // len(self.updates))
        return 1

    def _fact(self, name: str) -> Tensor | None:
        value: Tensor | None = getattr(self.knowledge, name)
        if value is not None and len(value) != self.n_samples:
            raise InputError(
                f"knowledge.{name} has {len(value)} entries for {len(self.updates)} update(s) of {self.batch}: "
                f"give {self.n_samples}"
            )
        return value

    def need(self, name: str) -> Tensor:
        """Return a fact that the attack cannot do without.

        Raises:
            InputError: it is not granted.
        """
        value = self._fact(name)
        if value is None:
            raise InputError(f"this attack needs knowledge.{name}, which is not granted; use one that does without")
        return value

    @property
    def timesteps(self) -> Int[Tensor, " n"]:
        """The samples' timesteps."""
        return self.need("timesteps")

    @property
    def unknowns(self) -> int:
        """Numbers in one clean sample."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def rates(self, timesteps: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """Return sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), each `[n, 1, 1, 1]`."""
        alphas = self.knowledge.alphas_cumprod.float()[timesteps][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def predict(
        self, noisy: Float[Tensor, "m c h w"], timesteps: Int[Tensor, " m"], samples: Int[Tensor, " m"]
    ) -> Float[Tensor, "m c h w"]:
        """Call the model on inputs that stand for the samples numbered `samples`."""
        text = None if self.text is None else self.text[samples]
        hints = None if self.hint_latents is None else self.hint_latents[samples]
        return predict(self.model, noisy, timesteps, text, hints)

    def unmix(
        self, noisy: Float[Tensor, "n c h w"], target: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"]
    ) -> tuple[Tensor, Tensor]:
        """Return the clean samples and the noise that a noisy input and its training target are made of.

        Ho et al. 2020, eq. 4; for v-prediction Salimans & Ho 2022, appendix D.
        """
        signal, sigma = self.rates(timesteps)
        if self.objective == "epsilon":
            return (noisy - sigma * target) / signal, target
        return signal * noisy - sigma * target, sigma * noisy + signal * target

    def without_noise(self, noisy: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean samples, given their noise (Ho et al. 2020, eq. 4)."""
        signal, sigma = self.rates(timesteps)
        return (noisy - sigma * noise) / signal

    @torch.no_grad()
    def images(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 s s"]:
        """Return clean samples as images in [-1, 1]."""
        if self.knowledge.base is not None and self.shape[0] != 3:
            return self.knowledge.base.decode(clean)
        return clean.clamp(-1.0, 1.0)


def _config(model: nn.Module, name: str) -> int:
    inner: Any = model.unet if isinstance(model, ControlledUNet) else model
    return int(inner.config[name])


class Recorder:
    """Keeps the pictures and the objective of an inversion, and tells the callback."""

    def __init__(self, problem: Problem, what: str, total: int, callback: Callback | None):
        self.problem, self.what, self.total, self.callback = problem, what, total, callback
        self.began = time.process_time()
        self.history: list[tuple[int, Tensor]] = []
        self.objective: list[float] = []
        self.n_evals = 0

    def tell(self, value: float, clean: Tensor | None = None) -> None:
        """Count one evaluation; `clean` is looked at only now and then."""
        self.n_evals += 1
        self.objective.append(value)
        if clean is not None and self.n_evals in STRIP:
            self.history.append((self.n_evals, self.problem.images(clean.detach().float())))
        if self.callback:
            self.callback(self.what, self.n_evals, self.total, value)

    @property
    def cpu_s(self) -> float:
        """CPU seconds since the beginning."""
        return time.process_time() - self.began

    def finish(self, clean: Tensor, final: Tensor, timesteps: Tensor | None, noise: Tensor | None) -> Inversion:
        """Return the result."""
        clean, images = clean.detach(), self.problem.images(clean.detach())
        history = (*self.history, (self.n_evals, images))
        return Inversion(
            images, clean, tuple(self.objective), final, self.n_evals, self.cpu_s, history, timesteps, noise
        )
