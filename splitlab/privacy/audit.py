"""A lower bound on what really leaked: a one-run audit of DP-SGD (of messages: `benchmarks/message_audit.py`).

A guarantee is proved on paper; an audit attacks the code that claims it. A lower bound above the claim is a bug.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from scipy.stats import binom
from torch import Tensor, nn

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key, generator, source
from splitlab.privacy.mechanisms import Gradients, poisson_sample, private_gradient

Mechanism = Callable[..., Gradients]
"""The call of `splitlab.privacy.mechanisms.private_gradient`: what is audited, or a broken variant of it."""

Sampler = Callable[..., Tensor]
"""The call of `splitlab.privacy.mechanisms.poisson_sample`."""

GUESSES = (50, 100, 200, 400)
"""Numbers of canaries that are guessed; all are tried, and each gets its share of the error allowed."""


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        lower_bound: ε is at least this, with the given confidence; 0 says nothing.
        n_guesses: of the number of guesses that gave it.
        n_correct: of them.
        n_canaries: samples that were in or out at random.
        confidence: probability that a lower bound is none too high.
    """

    lower_bound: float
    n_guesses: int
    n_correct: int
    n_canaries: int
    confidence: float


class Canaries(nn.Module):
    """A model with one more weight per canary: a canary's gradient is `scale` times its own unit vector ("Dirac").

    `forward(marks, *inputs)` returns the loss of each row: the inner model's (none: 0) plus `scale` times the weights
    of the canaries marked in it. With `scale` far above the clip norm a clipped canary is that unit vector times C,
    orthogonal to all others: the worst case that the guarantee allows (Steinke et al. 2023, sec. 6).
    """

    def __init__(self, n: int, *, scale: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.weights = nn.Linear(n, 1, bias=False)
        nn.init.zeros_(self.weights.weight)
        self.scale, self.inner = scale, inner

    def forward(self, marks: Float[Tensor, "b n"], *inputs: Tensor) -> Float[Tensor, " b"]:
        """Return one loss per row."""
        losses = self.scale * self.weights(marks)[:, 0]
        return losses if self.inner is None else losses + self.inner(*inputs)


def audit(
    noise_multiplier: float,
    *,
    sample_rate: float,
    steps: int,
    delta: float,
    seed: int = 0,
    key: Key | None = None,
    n_canaries: int = 1000,
    multiplicity: int = 1,
    scale: float = 10.0,
    inner: nn.Module | None = None,
    inputs: tuple[Tensor, ...] = (),
    confidence: float = 0.95,
    mechanism: Mechanism = private_gradient,
    sampler: Sampler = poisson_sample,
) -> Audit:
    """Audit DP-SGD in one run (Steinke, Nasr & Jagielski 2023), by all gradients released: which canaries were in?

    Args:
        noise_multiplier, sample_rate, steps, delta: of the claim: σ, Poisson sampling rate, number of steps, δ.
        seed: of all draws; an audit's are no secret, its canaries are nobody's data.
        key: of the mechanism's draws, to audit another kind of them; None: the published key of `seed`.
        n_canaries: m; of `GUESSES`, those up to m are tried.
        multiplicity: K, draws per sample.
        scale: gradient norm of a canary before clipping; the clip norm is 1.
        inner, inputs: a real model that the canaries ride on, and what it takes, one row per canary.
        confidence: of the lower bound.
        mechanism, sampler: release a batch's gradient, and draw the batch.

    Raises:
        InputError: too few canaries.
    """
    model, key = Canaries(n_canaries, scale=scale, inner=inner), key or Key.published(seed)
    # Step 1: each canary is in with probability 1/2 (Steinke et al. 2023, algorithm 1).
    included = torch.rand(n_canaries, generator=generator(seed, "audit", "included")) < 0.5
    members = included.nonzero()[:, 0]
    scores = torch.zeros(n_canaries, dtype=torch.float64)
    claim = {"max_grad_norm": 1.0, "noise_multiplier": noise_multiplier, "multiplicity": multiplicity}
    claim |= {"expected_batch": max(sample_rate * len(members), 1.0), "physical_batch": 256}
    # Step 2: run the mechanism; a canary's score is the sum of its gradient's inner products with what is released.
    for number in range(steps):
        batch = sampler(len(members), sample_rate, generator=source(key, "audit", "batch", number))
        rows = members[batch].repeat_interleave(multiplicity)
        batch_inputs = (nn.functional.one_hot(rows, n_canaries).float(), *(value[rows] for value in inputs))
        released = mechanism(model, batch_inputs, **claim, generator=source(key, "audit", "noise", number))
        scores += released["weights.weight"][0].double()
    # Step 3: guess the highest scores in and the lowest out, and take the best bound.
    guesses = [count for count in GUESSES if count <= n_canaries]
    return epsilon_lower_bound(scores, included, delta=delta, confidence=confidence, guesses=guesses)


def epsilon_lower_bound(
    scores: Float[Tensor, " m"],
    included: Bool[Tensor, " m"],
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: Sequence[int] = GUESSES,
) -> Audit:
    """Return the largest ε that the number of correct guesses refutes (Steinke et al. 2023, thm 5.2).

    Half of the guesses go to the highest scores (in), half to the lowest (out), the rest abstain. Several numbers of
    guesses share the error allowed equally (Bonferroni), so the best of them is still a bound at `confidence`.

    Args:
        scores: higher for canaries that seem to have been in.
        included: which were.
        delta: δ of the claim.
        confidence: in (0, 1).
        guesses: numbers of guesses to try, even numbers up to m.

    Raises:
        InputError: fewer canaries than guesses, or scores that are not finite.
    """
    n = len(scores)
    if not guesses or n < max(guesses):
        raise InputError(f"{n} canaries are too few for {max(guesses, default=min(GUESSES))} guesses: take more")
    if not torch.isfinite(scores).all():
        raise InputError("the canaries' scores are not finite; the released gradients must be")
    order = scores.argsort(descending=True, stable=True)
    audits = []
    for total in guesses:
        half = total // 2
        correct = int(included[order[:half]].sum() + (~included[order[n - half :]]).sum())
        error = (1 - confidence) / len(guesses)
        audits.append(Audit(_refuted(n, 2 * half, correct, delta, error), 2 * half, correct, n, confidence))
    return max(audits, key=lambda result: result.lower_bound)


def p_value(n: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """Bound the probability of so many correct guesses under (ε, δ)-DP (Steinke et al. 2023, thm 5.2).

    P[W ≥ v] ≤ F(v) + 2 m δ max_i (F(v - i) - F(v)) / i, with F(v) = P[Binomial(r, e^ε / (1 + e^ε)) ≥ v], i = 1 ... v.

    Args:
        n: m, canaries that were in or out.
        guesses: r, canaries that were guessed.
        correct: v, correct guesses.
        epsilon: ε of the hypothesis.
        delta: its δ.
    """
    right = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if not correct:
        return 1.0
    i = np.arange(1, correct + 1)
    gain = np.cumsum(binom.pmf(correct - i, guesses, right)) / i
    return min(tail + 2 * n * delta * float(gain.max()), 1.0)


def _refuted(n: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """Return the largest ε whose p-value is below `error`; 0 if there is none, at most 50."""

    def excess(epsilon: float) -> float:
        return p_value(n, guesses, correct, epsilon=epsilon, delta=delta) - error

    if excess(0.0) >= 0:
        return 0.0
    return 50.0 if excess(50.0) < 0 else float(brentq(excess, 0.0, 50.0, xtol=1e-4))
