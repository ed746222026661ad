"""What an attacker measures on public data before it answers: the errors of its estimates, and how bold to be."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.progress import Callback
from splitlab.diffusion.base import Encoded, encoded
from splitlab.split.attacks.closed_form import hint_latents, public_hints
from splitlab.split.attacks.latent_view import latent_view
from splitlab.split.attacks.simulated_client import imitate_known
from splitlab.split.messages import Knowledge, Observation, senders

N_PUBLIC = 256
"""Public samples on which estimates are calibrated."""

HINT_FLOOR = 0.1
"""Least standard deviation at which coarse hints are compared with public ones, which are few."""

LEARNABLE = ("smashed", "noise", "encoder_hidden_states")
"""Fields that help and that a client may not have sent."""

SHARPNESS = (1.0, 2.0, 4.0, 64.0)
"""Powers of public samples' weights that are tried: from the mean of all that is likely to the likeliest one alone."""

GALLERY = 100
"""Public samples among which the attacker tries to recognise its own."""


class CalibrationSet:
    """Public messages sent as the real ones were: what an estimate achieves on them, the attacker can measure."""

    def __init__(
        self,
        seen: Observation,
        observations: Sequence[Observation],
        knowledge: Knowledge,
        generator: torch.Generator,
        *,
        n: int = N_PUBLIC,
    ):
        self.data: Encoded = encoded(knowledge.base, knowledge.public, cache=knowledge.cache)
        self.knowledge, self.generator = knowledge, generator
        rounds = -(-n // len(self.data))
        orders = [torch.randperm(len(self.data), generator=generator) for _ in range(rounds)]
        self.chosen = torch.cat(orders)[:n]
        self.sizes = senders(observations).unique(return_counts=True)[1].tolist()
        self.lacks = [name for name in LEARNABLE if getattr(seen, name) is None]
        self.message, self.known = self.send(self.chosen)
        self.latents = self.data.latents[self.chosen]
        self.text = self.message.encoder_hidden_states
        self.view, self.std = latent_view(self.message, self.known)

    def send(self, chosen: Tensor) -> tuple[Observation, Knowledge]:
        """Send the public samples `chosen` once; the message lacks what the real ones lack."""
        message, known = imitate_known(self.data, self.knowledge, self.sizes, chosen, self.generator)
        return message.without(*self.lacks), known

    @cached_property
    def raw_hints(self) -> Tensor | None:
        """The hint latents that the closed form finds in the simulated messages, within the public range."""
        return self.clamp(hint_latents(self.message, [self.message], self.known))

    def clamp(self, raw: Tensor | None) -> Tensor | None:
        """Cut hint latents to the range that public ones have at each position; those noised on purpose stay."""
        if raw is None or self.known.defences.hint_noise:
            return raw
        public = self.public_hints
        return torch.minimum(torch.maximum(raw, public.amin(0)), public.amax(0))

    @cached_property
    def public_hints(self) -> Tensor:
        """All public hint latents as the closed form would find them but for noise."""
        return public_hints(self.data.hint_latents, self.known)

    def hint_std(self) -> float:
        """Root mean square error of the closed form's hint latents, within the public range."""
        raw = self.raw_hints
        if raw is None:
            return 0.0
        return float((raw - self.public_hints[self.chosen]).square().mean().sqrt())

    def hints(
        self, raw: Tensor | None, counts: Tensor | None = None, *, ruled_out: Tensor | None = None
    ) -> Tensor | None:
        """Smooth the closed form's hints where they are noisy or coarse.

        Args:
            raw: `[n, c, h, w]` hint latents, or None.
            counts: `[n]` of how many messages each is the mean.
            ruled_out: `[n]` the public hints that they stem from, where the attacker plays the client.
        """
        defences = self.known.defences
        if raw is None or not (defences.independent_draws or defences.hint_noise or defences.coarse_hints):
            return raw
        counts = torch.ones(len(raw)) if counts is None else counts
        if not defences.independent_draws:
            return self._guess(raw, counts, ruled_out, self._best_guess)
        std = self.hint_std() / counts.sqrt()
        cut = self.clamp(raw)
        return wiener(torch.as_tensor(cut), std[:, None, None, None], self.data.hint_latents)

    def _guess(self, raw: Tensor, counts: Tensor, ruled_out: Tensor | None, rule: str) -> Tensor:
        if rule == "raw":
            return raw
        std = max(self.known.defences.hint_noise, HINT_FLOOR) / counts.sqrt()
        if rule == "wiener":
            return wiener(raw, std[:, None, None, None], self.data.hint_latents)
        weights = public_posterior([(raw, std, self.public_hints)], ruled_out=ruled_out)
        return (weights @ self.data.hint_latents.flatten(1)).view_as(raw)

    @cached_property
    def _best_guess(self) -> str:
        """What to make of noised hints: whichever errs least on the simulated ones."""
        raw = torch.as_tensor(self.raw_hints)
        truth = self.data.hint_latents[self.chosen]
        rules = ("raw", "posterior") if self.known.defences.coarse_hints else ("raw", "wiener", "posterior")
        guesses = {rule: self._guess(raw, torch.ones(len(raw)), self.chosen, rule) for rule in rules}
        return min(guesses, key=lambda rule: float((guesses[rule] - truth).square().mean()))


def public_posterior(
    clues: Sequence[tuple[Float[Tensor, "n ..."], Float[Tensor, " n"], Float[Tensor, "m ..."]]],
    *,
    ruled_out: Tensor | None = None,
    sharpness: float = 1.0,
) -> Float[Tensor, "n m"]:
    """Return how likely each public sample is to be the one behind each message, if it were one of them (Bayes).

    Args:
        clues: (views, standard deviations of their white noise, what public samples would show without it).
        ruled_out: `[n]` samples that are not it, each for one message; None: none.
        sharpness: exponent of the likelihood; large: the likeliest sample takes all.
    """
    total = sum(
        torch.cdist(views.flatten(1), public.flatten(1)).square() / (-2 * std.square()[:, None])
        for views, std, public in clues
    )
    logits = sharpness * torch.as_tensor(total)
    if ruled_out is not None:
        logits = logits.scatter(1, ruled_out[:, None], -math.inf)
    return logits.softmax(1)


class Calibration:
    """Shrinks estimates to the mean public latents by the factor that pays at their noise level.

    The factor is the slope of the regression of truth on estimate, in bins of equal size over the levels, 0 to 1.

    Args:
        std: noise levels of the public samples' views.
        estimates, truth: `[m, c, h, w]`: what was made of the views, and the latents.
        bins: over the levels.
    """

    def __init__(
        self,
        std: Float[Tensor, "m 1 1 1"],
        estimates: Tensor,
        truth: Tensor,
        *,
        bins: int = 8,
    ):
        self.mean = truth.mean(0, keepdim=True)
        order = std.flatten().argsort()
        self.levels, self.slopes, self.errors = [], [], []
        for part in order.tensor_split(bins):
            centred, wanted = (estimates[part] - self.mean).double(), (truth[part] - self.mean).double()
            slope = float((centred * wanted).sum() / centred.square().sum().clamp_min(1e-12))
            slope = min(max(slope, 0.0), 1.0)
            self.levels.append(float(std.flatten()[part].clamp_min(1e-6).log().mean()))
            self.slopes.append(slope)
            self.errors.append(float((slope * centred - wanted).square().mean().sqrt()))

    def __call__(self, std: Float[Tensor, "n 1 1 1"], estimates: Tensor) -> Tensor:
        """Shrink."""
        return self.mean + self._at(std, self.slopes) * (estimates - self.mean)

    def error(self, std: Float[Tensor, "n 1 1 1"]) -> Float[Tensor, "n 1 1 1"]:
        """Return the root mean square error that shrunk estimates had at these levels."""
        return self._at(std, self.errors)

    def _at(self, std: Tensor, values: Sequence[float]) -> Tensor:
        """Interpolate linearly over log std."""
        levels, table = torch.tensor(self.levels), torch.tensor(values)
        place = std.flatten().clamp_min(1e-6).log()
        right = torch.searchsorted(levels, place).clamp(1, len(levels) - 1)
        low, high = levels[right - 1], levels[right]
        share = ((place - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        return torch.lerp(table[right - 1], table[right], share)[:, None, None, None]


def wiener(
    views: Float[Tensor, "n c h w"], std: Float[Tensor, "n 1 1 1"], public: Float[Tensor, "m c h w"], *, rank: int = 512
) -> Float[Tensor, "n c h w"]:
    """Return the linear least-squares estimate of latents from views with white noise of `std` (Wiener filter).

    In the public data's principal components, of variance λ, each coordinate shrinks by λ / (λ + std²).
    """
    mean, directions, variances = principal(public, rank=rank)
    coordinates = (views.flatten(1) - mean) @ directions
    shrunk = coordinates * variances / (variances + std.flatten()[:, None].square().clamp_min(1e-12))
    return (mean + shrunk @ directions.T).view_as(views)


def principal(public: Float[Tensor, "m c h w"], *, rank: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean `[d]`, principal directions `[d, r]` and variances `[r]` of the first 4 `rank` public latents."""
    flat = public[: 4 * rank].flatten(1)
    mean = flat.mean(0)
    _, scales, rows = torch.linalg.svd(flat - mean, full_matrices=False)
    return mean, rows[:rank].T, scales[:rank].square() / max(len(flat) - 1, 1)


def choose_sharpness(
    recognised: Callable[[float], Tensor], what: str, callback: Callback | None
) -> tuple[float, tuple[float, ...]]:
    """Choose the power of `SHARPNESS` under which most public samples are recognised; return it and all the shares.

    Args:
        recognised: power -> which simulated messages' samples are recognised in their galleries `[n]`, bool.
        what: the attack, for the callback.
        callback: told of every power's share.
    """
    shares: list[float] = []
    for power in SHARPNESS:
        shares.append(float(recognised(power).float().mean()))
        if callback:
            callback(what, len(shares), len(SHARPNESS), shares[-1])
    return SHARPNESS[shares.index(max(shares))], tuple(shares)
