"""Images from updates whose noise and timesteps are known: L-BFGS on per-layer-normalised L2, all updates at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from splitlab.federated import InversionKnowledge, Update
from splitlab.inversion.matching import Matcher, best_of
from splitlab.inversion.noisy_inputs import find_noisy
from splitlab.inversion.optimise import lbfgs
from splitlab.inversion.problem import Inversion, Problem, Recorder
from splitlab.types import Callback


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
        knowledge: the threat model; needs `timesteps` and `noise`.
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
    matcher = Matcher(problem, distance=distance)
    objective = matcher.from_clean(noise)
    total = n_evals * n_starts
    recorder = Recorder(problem, "known_noise", total, callback)

    def watch(count: int, point: Tensor, value: Tensor) -> None:
        recorder.tell(float(value.mean()), point.reshape(-1, *problem.shape))

    ends, values = [], []
    for _ in range(n_starts):
        shape = (len(problem.updates), problem.batch * problem.unknowns)
        z = std * torch.randn(shape, generator=generator)
        if start == "patches":
            noisy = find_noisy(problem, timesteps, generator=generator, recorder=recorder)
            if noisy is not None:
                z = problem.without_noise(noisy.noisy, noise, timesteps).reshape(shape)
        for stage in range(stages):
            matcher.anneal((stage + 1) / stages)
            end = lbfgs(objective, z, n_evals=n_evals // stages, goal=goal, stall=100, watch=watch)
            z = end.point
        ends.append(end.point)
        values.append(end.value)
    best, value = best_of(torch.stack(values), ends)
    clean = best.reshape(-1, *problem.shape)
    return recorder.finish(clean, value, timesteps, noise)
