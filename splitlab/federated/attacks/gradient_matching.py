"""Images from updates whose noise and timesteps are known: L-BFGS on per-layer-normalised L2, all updates at once."""

from collections.abc import Sequence

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
from splitlab.federated.client import InversionKnowledge, Update

BLIND_GOAL = 1e-6
"""Where a fit that is blind to the scale may stop: near enough to read the scale off, after which it is finished."""


def known_noise(
    update: Update | Sequence[Update],
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    start: str = "random",
    n_evals: int = 400,
    n_starts: int = 1,
    distance: str | None = None,
    stages: int = 1,
    std: float = 0.3,
    goal: float = 1e-9,
) -> Inversion:
    """Reconstruct images by matching their gradient, noise and timesteps known.

    Args:
        update: the update, or several to be inverted side by side.
        knowledge: the threat model; needs `timesteps` and `noise`. A scale that is not known is fitted first, by a
            distance that is blind to it.
        generator: of the starting points.
        callback: told of every evaluation.
        start: "random", or "patches": from the noisy inputs that the patch test finds (see `noisy_inputs`).
        n_evals: budget of gradient evaluations per start.
        n_starts: random starts; the one of the smallest objective is kept.
        distance: a key of `matching.DISTANCES`; None: as the defence asks for (see `Matcher`).
        stages: annealing: the first stage counts the last 1/stages of the parameter tensors, the last stage all.
        std: of the random start, in units of the image's range [-1, 1].
        goal: stop below this objective.

    Raises:
        InputError: a fact is missing, or the update does not fit the model.
    """
    problem = Problem(update, knowledge)
    noise, timesteps = problem.need("noise"), problem.timesteps
    is_blind = distance is None and (knowledge.scale is None or knowledge.sign is None)
    matcher = Matcher(problem, distance="scale_free" if is_blind else distance)
    recorder = Recorder(problem, "known_noise", n_evals * n_starts, callback)

    def watch(count: int, point: Tensor, value: Tensor) -> None:
        recorder.tell(float(value.mean()), point.reshape(-1, *problem.shape))

    def fit(z: Tensor, n_stages: int, until: float) -> Minimum:
        for stage in range(n_stages):
            matcher.anneal((stage + 1) / n_stages)
            end = lbfgs(matcher.from_clean(noise), z, n_evals=n_evals // n_stages, goal=until, stall=100, watch=watch)
            z = end.point
        return end

    ends = []
    for _ in range(n_starts):
        shape = (len(problem.updates), problem.batch * problem.unknowns)
        z = std * torch.randn(shape, generator=generator)
        if start == "patches":
            noisy = find_noisy(problem, timesteps, generator=generator, recorder=recorder)
            if noisy is not None:
                z = problem.without_noise(noisy.noisy, noise, timesteps).reshape(shape)
        ends.append(fit(z, stages, BLIND_GOAL if is_blind else goal))
    best, value = best_of(torch.stack([end.value for end in ends]), [end.point for end in ends])
    scale: float | None = None if problem.is_rescaled else problem.prescale
    if is_blind:
        factors = [nearest_usual(problem, float(factor)) for factor in matcher.best_scale(best, noise)]
        scale = problem.prescale * factors[0] if len(set(factors)) == 1 else None
        matcher = Matcher(problem.rescaled(factors))
        end = fit(best, 1, goal)
        best, value = end.point, end.value
    clean = best.reshape(-1, *problem.shape)
    said = doubts(problem, clean, noise, value)
    return recorder.finish(clean, value, timesteps, noise, scale=scale, warnings=said)


ATTACKS = (Attack(known_noise, "gradient matching", rank=70),)
