"""Images from updates whose noise and timesteps are known: L-BFGS on per-layer-normalised L2, all updates at once."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from splitlab.core.progress import Callback
from splitlab.federated.attacks.doubts import doubts
from splitlab.federated.attacks.matching import Matcher, best_of
from splitlab.federated.attacks.noisy_inputs import find_noisy
from splitlab.federated.attacks.optimise import Minimum, lbfgs
from splitlab.federated.attacks.problem import Inversion, Problem, Recorder
from splitlab.federated.attacks.record import Attack
from splitlab.federated.attacks.scale import nearest_usual
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.update import Update

BLIND_GOAL = 1e-6
"""Where a fit that is blind to the scale may stop: near enough to read the scale off, after which it is finished."""


def known_noise(
    update: Update | Sequence[Update],
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    start: Literal["patches", "random"] = "random",
    n_evals: int = 400,
    n_starts: int = 1,
    distance: str | None = None,
    stages: int = 1,
    std: float = 0.3,
    goal: float = 1e-9,
) -> Inversion:
    """Reconstruct images by matching their gradient, noise and timesteps known.

    A scale that is not known is fitted first, by a distance that is blind to it.

    Args:
        update, knowledge, generator, callback: see `record.Attack`.
        start: "random", or "patches": from the noisy inputs that the patch test finds (see `noisy_inputs`).
        n_evals: budget of gradient evaluations per start.
        n_starts: random starts; the one of the smallest objective is kept.
        distance: a key of `matching.DISTANCES`; None: as the defence asks for (see `Matcher`).
        stages: annealing: the first stage counts the last 1/stages of the parameter tensors, the last stage all.
        std: of the random start, in units of the image's range [-1, 1].
        goal: stop below this objective.
    """
    problem = Problem(update, knowledge)
    noise, timesteps = problem.need("noise"), problem.timesteps
    is_blind = distance is None and (knowledge.scale is None or knowledge.sign is None)
    matcher = Matcher(problem, distance="scale_free" if is_blind else distance)
    recorder = Recorder(problem, "known_noise", n_evals * n_starts, callback)
    minima = []
    for _ in range(n_starts):
        point = std * torch.randn(len(problem.updates), problem.batch * problem.unknowns, generator=generator)
        if start == "patches" and (inputs := find_noisy(problem, generator=generator, recorder=recorder)):
            point = problem.without_noise(inputs.noisy, noise, timesteps).reshape(point.shape)
        minima.append(_fit(matcher, noise, point, recorder, n_evals, stages, BLIND_GOAL if is_blind else goal))
    point, misfit = best_of(torch.stack([end.value for end in minima]), [end.point for end in minima])
    scale: float | None = None if problem.is_rescaled else problem.prescale
    if is_blind:
        factors = [nearest_usual(problem, float(factor)) for factor in matcher.best_scale(point, noise)]
        scale = problem.prescale * factors[0] if len(set(factors)) == 1 else None
        end = _fit(Matcher(problem.rescaled(factors)), noise, point, recorder, n_evals, 1, goal)
        point, misfit = end.point, end.value
    clean = point.reshape(-1, *problem.shape)
    said = doubts(problem, clean, noise, misfit)
    return recorder.finish(clean, misfit, timesteps, noise, scale=scale, warnings=said)


def _fit(
    matcher: Matcher, noise: Tensor, point: Tensor, recorder: Recorder, n_evals: int, stages: int, goal: float
) -> Minimum:
    """Minimise from `point`, counting more and more of the parameter tensors."""

    def watch(count: int, point: Tensor, value: Tensor) -> None:
        recorder.tell(float(value.mean()), point.reshape(-1, *matcher.problem.shape))

    for stage in range(stages):
        matcher.anneal((stage + 1) / stages)
        objective = matcher.from_clean(noise)
        end = lbfgs(objective, point, n_evals=n_evals // stages, goal=goal, stall=100, watch=watch)
        point = end.point
    return end


ATTACKS = (Attack(known_noise, "gradient matching", rank=70, needs=("timesteps", "noise")),)
