"""L-BFGS over many independent problems at once: one network call evaluates them all."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`z [n, d] -> (values [n], gradients [n, d])`: row i of both depends on row i of z only."""

Watch = Callable[[int, Tensor, Tensor], None]
"""`(n_evals, z [n, d], values [n])`: told after every evaluation."""


@dataclass(frozen=True)
class Minimum:
    """Where a minimiser ended.

    Attributes:
        point: `[n, d]`: the best point of each problem.
        value: `[n]`: its objective.
    """

    point: Tensor
    value: Tensor


def lbfgs(
    objective: Objective,
    start: Float[Tensor, "n d"],
    *,
    n_evals: int = 500,
    memory: int = 30,
    goal: float = 0.0,
    stall: int = 0,
    stall_ratio: float = 0.9,
    watch: Watch | None = None,
) -> Minimum:
    """Minimise n problems with L-BFGS (Nocedal & Wright 2006, alg. 7.4), each with its own line search.

    The line search is the weak-Wolfe bisection of Lewis & Overton 2013 (alg. 2.6). Every problem keeps its own step,
    so none waits for another: one evaluation serves a fresh direction here and a halved step there.

    Args:
        objective: values and gradients of all problems.
        start: where to start; not modified.
        n_evals: budget of evaluations.
        memory: pairs kept.
        goal: stop when every problem's value is at most this.
        stall: stop when within this many evaluations no value fell below `stall_ratio` times itself; 0: never.
        stall_ratio: see `stall`.
        watch: told after every evaluation.
    """
    state = _State(start.detach().clone(), memory)
    record: list[Tensor] = []
    for count in range(1, n_evals + 1):
        trial = state.trial()
        value, gradient = objective(trial)
        state.tell(trial, value.detach().double(), gradient.detach().double())
        record.append(state.value.clone())
        if watch:
            watch(count, state.point, state.value)
        stalled = stall and count > stall and bool((state.value > stall_ratio * record[count - 1 - stall]).all())
        if bool((state.value <= goal).all()) or stalled:
            break
    return Minimum(state.point, state.value.float())


class _State:
    """Iterates, histories and line-search brackets of n problems. Scalars per problem are float64."""

    def __init__(self, point: Tensor, memory: int):
        n, d = point.shape
        self.point, self.memory = point, memory
        self.value = torch.full((n,), torch.inf, dtype=torch.float64)
        self.gradient = torch.zeros(n, d, dtype=torch.float64)
        self.direction = torch.zeros_like(self.gradient)
        self.steps: list[Tensor] = []  # s_k of all problems, zero where a problem took no step
        self.changes: list[Tensor] = []  # y_k
        self.low = torch.zeros(n, dtype=torch.float64)
        self.high = torch.full((n,), torch.inf, dtype=torch.float64)
        self.rate = torch.zeros(n, dtype=torch.float64)
        self.scale = torch.ones(n, dtype=torch.float64)

    def trial(self) -> Tensor:
        return self.point + (self.rate[:, None] * self.direction).to(self.point.dtype)

    def tell(self, trial: Tensor, value: Tensor, gradient: Tensor) -> None:
        if torch.isinf(self.value).any() and not self.direction.any():
            self._accept(torch.ones_like(value, dtype=torch.bool), trial, value, gradient)
            return
        slope = (self.gradient * self.direction).sum(1)
        finite = torch.isfinite(value) & torch.isfinite(gradient).all(1)
        low_enough = finite & (value <= self.value + 1e-4 * self.rate * slope)
        flat_enough = (gradient * self.direction).sum(1) >= 0.9 * slope
        accept = low_enough & flat_enough
        self.high = torch.where(low_enough, self.high, self.rate)
        self.low = torch.where(low_enough & ~flat_enough, self.rate, self.low)
        tired = ~accept & (self.high < 1e-10 * self.low.clamp_min(1e-6))
        middle = torch.where(torch.isinf(self.high), 2 * self.low, (self.low + self.high) / 2)
        self.rate = torch.where(accept, self.rate, middle)
        narrow = ~accept & ((self.high - self.low) < 1e-3 * self.high)  # rounding: no step satisfies both conditions
        self._accept(accept | (narrow & low_enough & (value < self.value)), trial, value, gradient)
        self._restart((narrow | tired | (self.rate < 1e-12)) & ~accept)

    def _accept(self, which: Bool[Tensor, " n"], trial: Tensor, value: Tensor, gradient: Tensor) -> None:
        if not which.any():
            return
        rows = which[:, None]
        if torch.isfinite(self.value).all():
            step = torch.where(rows, (trial - self.point).double(), 0.0)
            change = torch.where(rows, gradient - self.gradient, 0.0)
            curvature = (step * change).sum(1)
            good = curvature > 1e-10 * change.square().sum(1).clamp_min(1e-300)
            self._remember(torch.where(good[:, None], step, 0.0), torch.where(good[:, None], change, 0.0))
            size = change.square().sum(1)
            self.scale = torch.where(good & which, curvature / size.clamp_min(1e-300), self.scale)
        first = ~torch.isfinite(self.value)
        self.point = torch.where(rows, trial, self.point)
        self.value = torch.where(which, value, self.value)
        self.gradient = torch.where(rows, gradient, self.gradient)
        norm = self.gradient.norm(dim=1).clamp_min(1e-300)
        self.scale = torch.where(first, self.point[0].numel() ** 0.5 * 0.01 / norm, self.scale)
        self._aim(which)

    def _remember(self, step: Tensor, change: Tensor) -> None:
        self.steps.append(step)
        self.changes.append(change)
        if len(self.steps) > self.memory:
            del self.steps[0], self.changes[0]

    def _restart(self, which: Bool[Tensor, " n"]) -> None:
        """Forget the curvature of problems whose line search failed and go down the gradient."""
        if not which.any():
            return
        rows = which[:, None]
        self.steps = [torch.where(rows, 0.0, step) for step in self.steps]
        self.changes = [torch.where(rows, 0.0, change) for change in self.changes]
        self._aim(which)
        self.rate = torch.where(which, torch.full_like(self.rate, 1e-2), self.rate)

    def _aim(self, which: Bool[Tensor, " n"]) -> None:
        """Set new directions by the two-loop recursion; pairs of zeros drop out of it."""
        q = self.gradient.clone()
        weights = []
        for step, change in zip(reversed(self.steps), reversed(self.changes), strict=True):
            curvature = (step * change).sum(1)
            inverse = torch.where(curvature > 0, 1 / curvature.clamp_min(1e-300), 0.0)
            alpha = inverse * (step * q).sum(1)
            q = q - alpha[:, None] * change
            weights.append((alpha, inverse))
        q = q * self.scale[:, None]
        for (alpha, inverse), step, change in zip(reversed(weights), self.steps, self.changes, strict=True):
            beta = inverse * (change * q).sum(1)
            q = q + (alpha - beta)[:, None] * step
        uphill = (q * self.gradient).sum(1) <= 0
        q = torch.where(uphill[:, None], self.gradient * self.scale[:, None], q)
        rows = which[:, None]
        self.direction = torch.where(rows, -q, self.direction)
        self.rate = torch.where(which, torch.ones_like(self.rate), self.rate)
        self.low = torch.where(which, torch.zeros_like(self.low), self.low)
        self.high = torch.where(which, torch.full_like(self.high, torch.inf), self.high)
