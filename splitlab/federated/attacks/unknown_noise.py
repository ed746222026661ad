"""Images from updates whose noise is honestly unknown: noisy inputs by the patch test, the residual by a linear solve.

The attack splits the unknowns the way the gradient does. First x_t, without any reference to noise or loss (`patches`);
then r = prediction - target, in which the gradient is linear (`residual`); then x_t and r together give the target and
the image. Where no layer allows the patch test, both are fitted to the gradient by L-BFGS.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.federated.attacks.doubts import doubts
from splitlab.federated.attacks.matching import Matcher, best_of
from splitlab.federated.attacks.noisy_inputs import find_noisy
from splitlab.federated.attacks.optimise import lbfgs
from splitlab.federated.attacks.problem import Inversion, Problem, Recorder
from splitlab.federated.attacks.record import Attack
from splitlab.federated.attacks.residual import solve_residual, tail
from splitlab.federated.attacks.scale import Scaling, find_scale
from splitlab.federated.attacks.timesteps import timesteps as read_timesteps
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.update import Update

MOST_PAIRED = 3
"""Images per update for which all pairings with timesteps are tried."""

NO_TEST = (
    "no shared gradient spans its layer's patches, so noisy inputs and noise were fitted to the gradient from random "
    "starts, and others may fit as well: see whether another seed= gives the same images, or grant noise"
)

OPEN, OPEN_INEXACT = 1e-7, 1e-4
"""A residual that leaves more of the gradient unexplained is another one: right ones leave 1e-8 of a float32 gradient,
1e-5 of one of 16 bits."""


def unknown_noise(
    update: Update | Sequence[Update],
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    start: Literal["patches", "random"] = "patches",
    n_evals: int = 400,
    n_starts: int = 16,
    n_iterations: int = 200,
    thorough: bool = False,
    fit_evals: int = 0,
    stages: int = 1,
    std: float = 0.3,
) -> Inversion:
    """Reconstruct images from updates without their noise, whose timesteps are read off the updates unless granted.

    Samples of one update come out in the order of `timesteps`, ascending if those are found. `final` of the result is
    the normalised L2 between the found and the shared gradient.

    Args:
        update, knowledge, generator, callback: see `record.Attack`; `noise` is ignored if it is granted.
        start: "patches", or "random": skip the patch test and fit (x_t, r) to the gradient from random starts.
        n_evals: evaluations of the patch test, or of the fit, per start.
        n_starts: random starts at most; the one of the smallest objective is kept.
        n_iterations: of the linear solve for the residual.
        thorough: solve it again, over all shared layers and for all pairings of images and timesteps, where the last
            layers, which suffice as a rule, left it open.
        fit_evals: L-BFGS evaluations on (x_t, r) together, after the linear solve.
        stages: annealing of a fit from random starts: the first stage counts the last 1/stages of the tensors.
        std: of the random starts of a fit.
    """
    # Step 1: the timesteps, in closed form.
    knowledge, words = _with_timesteps(update, knowledge, generator)
    problem = Problem(update, knowledge)
    recorder = Recorder(problem, "unknown_noise", n_evals * n_starts, callback)
    solver = _Solver(problem, recorder, n_iterations)
    # Steps 2 and 3: the noisy inputs by the patch test, then the residual by a linear solve; both by a fit without it.
    limits: dict[str, Any] = {"n_evals": n_evals, "n_starts": n_starts}
    inputs = find_noisy(problem, generator=generator, recorder=recorder, **limits) if start == "patches" else None
    if inputs is None:
        state = solver.fit_from_random(generator, stages=stages, std=std, **limits)
    else:
        state = solver.solved(inputs.noisy, thorough=thorough, fit_evals=fit_evals)
    # Step 4: target = prediction - residual, from which image and noise follow.
    value = solver.misfit(state)
    clean, noise, scaling = _read(problem, state)
    words += (NO_TEST,) if inputs is None and start == "patches" else ()
    said = (*words, *scaling.words, *doubts(problem, clean, noise, value, None if inputs is None else inputs.value))
    return recorder.finish(clean, value, problem.timesteps, noise, scale=scaling.scale, warnings=said)


def _with_timesteps(
    update: Update | Sequence[Update], knowledge: InversionKnowledge, generator: torch.Generator
) -> tuple[InversionKnowledge, tuple[str, ...]]:
    """Return the knowledge with timesteps and batch size as found in closed form, unless granted; and doubts."""
    if knowledge.timesteps is not None:
        return knowledge, ()
    updates = (update,) if isinstance(update, Update) else update
    results = [read_timesteps(update, knowledge, generator=generator) for update in updates]
    sets = [result.timesteps for result in results]
    batch = knowledge.batch_size or max(len(steps) for steps in sets)
    for number, steps in enumerate(sets):
        if len(steps) not in (1, batch):
            raise InputError(
                f"update {number}: {len(steps)} different timesteps for {batch} images, so some repeat and it is open "
                "which; grant knowledge.timesteps"
            )
    timesteps = torch.cat([steps if len(steps) == batch else steps.repeat(batch) for steps in sets])
    words = tuple(word for result in results for word in result.warnings)
    return replace(knowledge, batch_size=batch, timesteps=timesteps), words


class _Solver:
    """Finds states `[u, 2 b c h w]`: noisy inputs, and the residuals that explain their gradients."""

    def __init__(self, problem: Problem, recorder: Recorder, n_iterations: int):
        self.problem, self.recorder, self.n_iterations = problem, recorder, n_iterations
        self.matcher = Matcher(problem)

    def misfit(self, state: Tensor) -> Tensor:
        """Return `[u]`: the distance of a state's gradients to the shared ones."""
        self.matcher.anneal(1.0)
        return self.matcher.from_residual(self.problem.timesteps)(state)[0]

    def solved(self, noisy: Tensor, *, thorough: bool, fit_evals: int) -> Tensor:
        """Solve for the residuals of noisy inputs."""
        state = self.solve(noisy, tail(self.problem))
        if thorough:
            state = self.solve_again(noisy, state)
        return self.fit(state, fit_evals)[0] if fit_evals else state

    def solve(self, noisy: Tensor, names: list[str]) -> Tensor:
        """Solve for the residuals that explain the gradient of the parameters `names` best."""
        rows = []
        for number in range(len(self.problem.updates)):
            part = slice(number * self.problem.batch, (number + 1) * self.problem.batch)
            timesteps = self.problem.timesteps[part]
            solution = solve_residual(
                self.problem, number, noisy[part], timesteps, names, n_iterations=self.n_iterations
            )
            self.recorder.n_evals += solution.n_evals if number == 0 else 0
            rows.append(torch.stack([noisy[part], solution.residual]).flatten())
        return torch.stack(rows)

    def solve_again(self, noisy: Tensor, state: Tensor) -> Tensor:
        """Solve over all shared layers what the last ones left open, with images and timesteps paired in other ways.

        Layers in front of where the timestep enters find the images, but not which of them is whose.
        """
        problem, objective = self.problem, self.matcher.from_residual(self.problem.timesteps)
        best = objective(state)[0]
        orders: list[Sequence[int]] = [range(problem.batch)]
        if problem.batch <= MOST_PAIRED:
            orders = list(itertools.permutations(range(problem.batch)))
        for names, order in itertools.product((list(problem.gradients[0]), tail(problem)), orders):
            if float(best.max()) <= (OPEN_INEXACT if problem.is_inexact else OPEN):
                break
            paired = noisy.unflatten(0, (-1, problem.batch))[:, list(order)].flatten(0, 1)
            trial = self.solve(paired, names)
            value = objective(trial)[0]
            state, best = torch.where((value < best)[:, None], trial, state), torch.minimum(value, best)
        return state

    def fit(self, state: Tensor, n_evals: int) -> tuple[Tensor, Tensor]:
        """Fit noisy inputs and residuals together to the gradient; return the state and its distances."""
        problem = self.problem

        def watch(count: int, point: Tensor, value: Tensor) -> None:
            noisy = point.reshape(-1, 2, problem.batch, *problem.shape)[:, 0].flatten(0, 1)
            self.recorder.tell(float(value.mean()), noisy)

        objective = self.matcher.from_residual(problem.timesteps)
        end = lbfgs(objective, state, n_evals=n_evals, goal=1e-10, stall=200, watch=watch)
        return end.point, end.value

    def fit_from_random(
        self, generator: torch.Generator, *, n_evals: int, n_starts: int, stages: int, std: float
    ) -> Tensor:
        """Fit from random starts; return the best state of each update."""
        shape = (len(self.problem.updates), 2 * self.problem.batch * self.problem.unknowns)
        states, values = [], []
        for _ in range(n_starts):
            state = std * torch.randn(shape, generator=generator)
            value = torch.zeros(len(state))
            for stage in range(stages):
                self.matcher.anneal((stage + 1) / stages)
                state, value = self.fit(state, n_evals // stages)
            states.append(state)
            values.append(value)
            if bool((torch.stack(values).min(0).values < 1e-6).all()):
                break
        return best_of(torch.stack(values), states)[0]


@torch.no_grad()
def _read(problem: Problem, state: Tensor) -> tuple[Tensor, Tensor, Scaling]:
    """Return clean samples and noise: target = prediction - r."""
    noisy, residual = state.reshape(-1, 2, problem.batch, *problem.shape).unbind(1)
    noisy, residual, timesteps = noisy.flatten(0, 1), residual.flatten(0, 1), problem.timesteps
    prediction = problem.predict(noisy, timesteps, torch.arange(problem.n_samples))
    scaling = Scaling(torch.ones(problem.n_samples), problem.prescale)
    if problem.knowledge.scale is None or problem.knowledge.sign is None:
        scaling = find_scale(problem, noisy, prediction, residual, timesteps)
    elif problem.is_rescaled and problem.objective == "epsilon":
        scaling = Scaling(_unit_noise(prediction, residual), None)
    target = prediction - residual * scaling.factor[:, None, None, None]
    return *problem.unmix(noisy, target, timesteps), scaling


def _unit_noise(prediction: Tensor, residual: Tensor) -> Tensor:
    """Return `[n]`: the factor for a residual with which prediction - residual has mean square 1, as noise has.

    The larger root of a quadratic; 1 where there is none. It undoes a clipped update's unknown scale.
    """
    p, r = prediction.flatten(1).double(), residual.flatten(1).double()
    inner, size = (p * r).sum(1), r.square().sum(1).clamp_min(1e-30)
    inside = inner.square() - size * (p.square().sum(1) - p.shape[1])
    root = (inner + inside.clamp_min(0.0).sqrt()) / size
    return torch.where((inside >= 0) & (root > 0), root, 1.0).float()


ATTACKS = (Attack(unknown_noise, "patch test", rank=80, usual={"n_iterations": 1000, "thorough": True}),)
