"""What all image inversions share: the updates and what is known, in the shapes they compute with, and their result."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.denoisers import plain_attention, predict
from splitlab.federated.attacks.batched_gradients import products
from splitlab.federated.attacks.patches import Layer, find_layers
from splitlab.federated.attacks.shapes import input_shape
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.defences import effects
from splitlab.federated.update import Update, check_update

STRIP = (1, 3, 10, 30, 60, 100, 150, 200, 300, 400, 600, 800, 1000, 1500, 2000, 3000, 5000)
"""After how many evaluations an inversion keeps a picture of its progress."""


@dataclass(frozen=True)
class Inversion:
    """What an inversion made of updates, sample by sample, in the order of the updates.

    Attributes:
        images: `[n, 3, h, w]` in [-1, 1], or as many channels as the model's pixels have; latents are decoded, without
            a base they stay as they are.
        clean: `[n, c, h, w]`: what the model was trained on, as reconstructed: pixels or latents, not clamped.
        objective: the attack's own objective as it went on, a mean over the updates.
        final: `[u]`: the objective of each update at its end.
        n_evals: evaluations of the objective per update.
        cpu_s: CPU seconds for all updates.
        history: `(n_evals, images)` on the way.
        timesteps: `[n]` int64, as used or found.
        noise: `[n, c, h, w]`, as used or found; None if the attack has no opinion.
        prompts: n prompts, where the attack finds some.
        scale: what the client's gradient was multiplied with, negative if it points downhill: as granted, or as found;
            None if each sample has its own, or the attack is blind to it.
        class_labels: `[n]`, where they were found.
        warnings: what speaks against the result, in words; empty if nothing does.
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
    scale: float | None = None
    class_labels: Tensor | None = None
    warnings: tuple[str, ...] = ()


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
        self.effects = effects(first.defence)
        self.shape = input_shape(self.model, size=first.size, channels=knowledge.channels)
        self.n_samples = len(self.updates) * self.batch
        self.text, self.hint_latents = self._fact("text"), self._fact("hint_latents")
        self.class_labels = self._fact("class_labels")
        self.prescale = self._prescale()
        if self.prescale != 1.0:
            self.gradients = self.rescaled([self.prescale] * len(self.updates)).gradients

    def _prescale(self) -> float:
        """Return what gradients are divided by: their scale, or, if it is unknown, a power of two that brings their
        length within a factor of 64 of that at random inputs and residuals, where numbers neither vanish nor overflow.
        """
        sign = self.knowledge.sign or 1
        if self.knowledge.scale is not None:
            return self.knowledge.scale * sign
        parameters = [p for name, p in self.model.named_parameters() if name in self.gradients[0]]
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters:
            parameter.requires_grad_(True)
        prediction = self.run(torch.randn(1, *self.shape, generator=generator))
        back = torch.randn(prediction.shape, generator=generator) * 2 / self.unknowns
        usual = torch.autograd.grad(prediction, parameters, back, materialize_grads=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
        lengths = [
            torch.stack([value.double().norm() for value in values]).norm()
            for values in (self.gradients[0].values(), usual)
        ]
        ratio = float((lengths[0] / lengths[1].clamp_min(1e-30)).log2())
        return sign * (1.0 if abs(ratio) < 6 else 2.0 ** round(ratio))

    def rescaled(self, factors: Sequence[float]) -> "Problem":
        """Return a copy with each update's gradients divided by a factor."""
        other = copy.copy(self)
        pairs = zip(self.gradients, factors, strict=True)
        other.gradients = [{name: value / factor for name, value in gradient.items()} for gradient, factor in pairs]
        return other

    @property
    def is_rescaled(self) -> bool:
        """Whether the client's defence, which is public, may have shortened the update."""
        return "rescaled" in self.effects

    @property
    def withholds(self) -> bool:
        """Whether the client's defence, which is public, zeroes entries of the update."""
        return bool(self.effects & {"sparse", "withheld"})

    @property
    def is_defended(self) -> bool:
        """Whether a defence that is more than a factor leaves a part of the update unexplained."""
        return bool(self.effects - {"rescaled"})

    @property
    def is_inexact(self) -> bool:
        """Whether rounding or a defence, which is public, keeps the update from being a float32 gradient."""
        update = self.updates[0]
        rounded = any(value.dtype != torch.float32 for value in update.gradients.values())
        return rounded or update.kind != "gradient" or update.defence != "none"

    def _count_samples(self) -> int:
        for name in ("timesteps", "noise", "class_labels"):
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
        self,
        noisy: Float[Tensor, "m c h w"],
        timesteps: Int[Tensor, " m"] | Float[Tensor, " m"],
        samples: Int[Tensor, " m"],
        *,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "m c h w"]:
        """Call the model on inputs that stand for the samples numbered `samples`, perhaps with other parameters."""
        facts = (None if fact is None else fact[samples] for fact in (self.text, self.hint_latents, self.class_labels))
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return predict(self.model, noisy, timesteps, *facts, call=self.knowledge.call, parameters=parameters)

    @cached_property
    def products(self) -> frozenset[str]:
        """The shared parameters whose gradient is a product of their layer's input and signal, see `products`."""
        probe = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(0))
        return products(self.model, list(self.gradients[0]), self.run, probe)

    def layers(self) -> list[Layer]:
        """List the layers whose gradient tells of their input: products, and not zero."""
        told = [name for name in self.gradients[0] if name in self.products and self.gradients[0][name].any()]
        return find_layers(self.model, told, self.run, torch.zeros(1, *self.shape))

    def run(self, noisy: Tensor) -> Tensor:
        """Call the model on inputs that all stand for the first sample."""
        times = self.knowledge.timesteps
        times = torch.tensor([len(self.knowledge.alphas_cumprod) // 2]) if times is None else times[:1]
        return self.predict(noisy, times.expand(len(noisy)), torch.zeros(len(noisy), dtype=torch.int64))

    def unmix(
        self,
        noisy: Float[Tensor, "n c h w"],
        target: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, " n"],
        *,
        objective: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the clean samples and the noise that a noisy input and its training target are made of.

        Ho et al. 2020, eq. 4; for v-prediction Salimans & Ho 2022, appendix D.
        """
        signal, sigma = self.rates(timesteps)
        if (objective or self.objective) == "epsilon":
            return (noisy - sigma * target) / signal, target
        return signal * noisy - sigma * target, sigma * noisy + signal * target

    @property
    def is_pixels(self) -> bool:
        """Whether the model is taken to denoise pixels: one or three channels; others are latents."""
        return self.shape[0] in (1, 3)

    def without_noise(self, noisy: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean samples, given their noise (Ho et al. 2020, eq. 4)."""
        signal, sigma = self.rates(timesteps)
        return (noisy - sigma * noise) / signal

    @torch.no_grad()
    def images(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d s t"]:
        """Return clean samples as images in [-1, 1]; latents without a base to decode them as they are."""
        if self.knowledge.base is not None and not self.is_pixels:
            return self.knowledge.base.decode(clean)
        return clean.clamp(-1.0, 1.0) if self.is_pixels else clean


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

    def finish(
        self, clean: Tensor, final: Tensor, timesteps: Tensor | None, noise: Tensor | None, **further: Any
    ) -> Inversion:
        """Return the result; `further`: further fields of `Inversion`."""
        clean, images = clean.detach(), self.problem.images(clean.detach())
        history = (*self.history, (self.n_evals, images))
        return Inversion(
            images, clean, tuple(self.objective), final, self.n_evals, self.cpu_s, history, timesteps, noise, **further
        )
