"""The scale and sign of an update, where the server is told neither: found from what noise and images look like.

A gradient of s times the mean loss gives s times the residual r, and nothing in it tells s. But noise is standard
normal: |prediction - r / s|² must be about its number of entries, which leaves a narrow range. Clients do not multiply
by any number: they sum where others average, accumulate, or leave a GradScaler's power of two. A usual factor in that
range is taken, the commoner the rather, and only without one a number in between. Signs differ in the image: with the
wrong one noise is added to it instead of taken away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlab.federated.attacks.problem import Problem
from splitlab.federated.update import Update

COSTS = (0.0, 2.0, 3.5, 5.0, 5.5)
"""What a usual factor has to make up for in log-likelihood, from the commonest rank on."""

ANY = 7.0
"""The same for a factor of no rank, which fits exactly."""

SMOOTHER = 0.5
"""A negative sign is taken if it leaves at most this share of the squared differences between neighbours."""

NEAR = 2e-3
"""Relative distance at which a scale that was fitted, the noise being known, is taken for a usual one."""

ROUND = tuple(digit * 10.0**k for k in range(-4, 4) for digit in (1, 2, 5))
"""Lengths that updates are clipped to."""

CLIPPED = 2e-5
"""Relative distance at which an update's length is taken for one of them."""

ODD = 6.0
"""Standard deviations that a sample's mean square may be off before each sample is taken to have a scale of its own."""


@dataclass(frozen=True)
class Scaling:
    """What an update was multiplied with.

    Attributes:
        factor: `[n]`: what each residual is to be multiplied with.
        scale: of the update; None if each sample has its own.
        words: what to tell the user; empty if the update is as it should be.
    """

    factor: Tensor
    scale: float | None
    words: tuple[str, ...] = ()


class _Line:
    """Noise and image of one update as functions of u = 1 / s, both straight lines."""

    def __init__(self, noise: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor]):
        (a, b), (self.clean, self.slope) = noise, clean
        self.size = a.numel()
        self.parts = [float(value) for value in (a.square().sum(), (a * b).sum(), b.square().sum())]

    def deviation(self, u: float) -> float:
        """Return how many standard deviations the noise's mean square is off."""
        aa, ab, bb = self.parts
        return ((aa - 2 * u * ab + u * u * bb) / self.size - 1) * math.sqrt(self.size / 2)

    def roots(self) -> list[float]:
        """Return where the noise's mean square is 1, or next to it, the larger first."""
        aa, ab, bb = self.parts
        root = math.sqrt(max(ab * ab - bb * (aa - self.size), 0.0))
        return [(ab + root) / max(bb, 1e-300), (ab - root) / max(bb, 1e-300)]

    def bounds(self, u: float) -> tuple[float, float]:
        """Return between which factors of u the noise's mean square is within two standard deviations of 1."""
        fitting = [u * ratio for ratio in torch.linspace(0.5, 2, 1501).tolist() if abs(self.deviation(u * ratio)) <= 2]
        return (min(fitting, key=abs), max(fitting, key=abs)) if fitting else (u, u)

    def roughness(self, u: float) -> float:
        """Return the sum of squared differences between neighbours."""
        image = self.clean + u * self.slope
        return float(sum((image.diff(dim=axis) ** 2).sum() for axis in (2, 3)))


def find_scale(problem: Problem, noisy: Tensor, prediction: Tensor, residual: Tensor, timesteps: Tensor) -> Scaling:
    """Find the scale of the updates from what was solved of them at `problem.prescale`.

    Args:
        problem: the updates; `knowledge.scale` and `sign` are what is known.
        noisy, prediction, residual: `[n, c, h, w]`, as solved.
        timesteps: `[n]`.
    """
    clean, noise = problem.unmix(noisy.double(), prediction.double(), timesteps)
    clean_1, noise_1 = problem.unmix(noisy.double(), (prediction - residual).double(), timesteps)
    lines = [(noise, noise - noise_1), (clean, clean_1 - clean)]
    factors: list[float] = []
    scales: list[float | None] = []
    words: list[str] = []
    for part in torch.arange(problem.n_samples).split(problem.batch):
        line = _Line(*((start[part], slope[part]) for start, slope in lines))
        u, usual = _choose(problem, line)
        samples = [_Line(*((start[[i]], slope[[i]]) for start, slope in lines)) for i in part.tolist()]
        oddest = max(abs(sample.deviation(u)) for sample in samples)
        if problem.knowledge.scale is None and oddest > ODD and len(samples) > 1:
            factors += [_best_root(sample, problem)[1] for sample in samples]
            scales.append(None)
            continue
        factors += [u] * len(part)
        scales.append(problem.prescale / u)
        low, high = sorted(abs(problem.prescale / bound) for bound in line.bounds(u))
        chosen = "a usual factor near where" if usual else "where"
        words.append(f"{chosen} the noise found has unit variance (from {low:.4g} to {high:.4g} could be)")
    scale = scales[0] if len(set(scales)) == 1 else None
    return Scaling(torch.tensor(factors), scale, _words(problem, scale, scales, words))


def _words(problem: Problem, scale: float | None, scales: list[float | None], words: list[str]) -> tuple[str, ...]:
    known = problem.knowledge
    if scale is not None and abs(scale - (known.scale or 1.0) * (known.sign or 1)) < 1e-6 * abs(scale):
        return ()
    if None in scales:
        return ("the samples' scales differ: each was estimated from its noise, taken to have unit variance",)
    told = ", ".join(dict.fromkeys(f"{value:.6g}" for value in scales if value is not None))
    reason = "; ".join(dict.fromkeys(words))
    return (f"the gradient is taken to be {told} times that of the mean loss, {reason}; scale= and sign= overrule it",)


def _choose(problem: Problem, line: _Line) -> tuple[float, bool]:
    """Return u = 1 / s, and whether s is one of the usual factors."""
    sign, root = _best_root(line, problem)
    if problem.knowledge.scale is not None:
        return sign, True
    least, best = ANY, root
    for usual, cost in zip(usual_scales(problem), COSTS, strict=True):
        for u in (sign * abs(problem.prescale) / scale for scale in usual):
            price = cost + line.deviation(u) ** 2 / 2
            if price < least and not problem.is_rescaled:
                least, best = price, u
    return best, least < ANY


def _best_root(line: _Line, problem: Problem) -> tuple[float, float]:
    """Return the sign of u, and where on its side the noise's mean square is nearest 1."""
    first, second = line.roots()
    if (
        problem.knowledge.sign is None
        and second < 0 < first
        and line.roughness(second) < SMOOTHER * line.roughness(first)
    ):
        return -1.0, second
    if problem.knowledge.sign is None and first < 0:
        return -1.0, first
    return 1.0, first if first > 0 else 1.0


def clipped_to(updates: Sequence[Update]) -> float | None:
    """Return the round length that every update has, as one that was clipped to it has; None if they have none."""
    lengths = [
        float(torch.stack([value.double().norm() for value in update.mean_gradient().values()]).norm())
        for update in updates
    ]
    return next((r for r in ROUND if all(abs(length / r - 1) < CLIPPED for length in lengths)), None)


def usual_scales(problem: Problem) -> list[list[float]]:
    """Return what clients multiply the mean loss with, in ranks, the commonest first."""
    sums = [float(n) for n in (problem.unknowns, problem.batch * problem.unknowns, problem.batch)]
    powers = [2.0**k for k in range(-16, 25)]
    return [
        [1.0],
        [*sums, 1 / problem.batch, 2.0, 0.5, 0.25, 0.125, 65536.0],
        powers + [1 / n for n in range(2, 11)] + [10.0**k for k in range(-12, 13)],
        [n**power for n in range(3, 33) for power in (1.0, -1.0)]
        + [digit * 10.0**k for k in range(-6, 4) for digit in (2, 3, 5)],
        [value * power for value in sums for power in powers],
    ]


def nearest_usual(problem: Problem, factor: float) -> float:
    """Return the factor (on top of `problem.prescale`) of the nearest usual scale; itself if none is within 0.2 %."""
    scale = abs(factor * problem.prescale)
    usual = min((value for rank in usual_scales(problem) for value in rank), key=lambda value: abs(value / scale - 1))
    return factor * usual / scale if abs(usual / scale - 1) < NEAR else factor
