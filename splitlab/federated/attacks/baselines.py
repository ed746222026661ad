"""The two classical gradient inversions, as baselines: DLG and Inverting Gradients."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from splitlab.core.progress import Callback
from splitlab.federated.attacks.matching import Matcher, best_of
from splitlab.federated.attacks.optimise import lbfgs
from splitlab.federated.attacks.problem import Inversion, Problem, Recorder
from splitlab.federated.attacks.record import Attack
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.update import Update


def dlg(
    update: Update | Sequence[Update],
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    n_evals: int = 400,
    n_starts: int = 1,
    cpu_s: float | None = None,
) -> Inversion:
    """Deep leakage from gradients (Zhu et al. 2019): summed L2 over all parameters, L-BFGS from a standard normal.

    Noise and timesteps are known, as in GIDM's evaluation; what DLG calls the label is the noise.

    Args:
        update, knowledge, generator, callback: see `record.Attack`.
        n_evals: budget of gradient evaluations per start.
        n_starts: random starts; the one of the smallest objective is kept.
        cpu_s: stop after this many CPU seconds, whatever the budget.
    """
    problem = Problem(update, knowledge)
    noise, timesteps = problem.need("noise"), problem.timesteps
    objective = Matcher(problem, distance="l2").from_clean(noise)
    recorder = Recorder(problem, "dlg", n_evals * n_starts, callback)

    def limited(z: Tensor) -> tuple[Tensor, Tensor]:
        if cpu_s is not None and recorder.cpu_s > cpu_s:
            raise _TimeUpError
        return objective(z)

    points, values = [], []
    for _ in range(n_starts):
        point = torch.randn(len(problem.updates), problem.batch * problem.unknowns, generator=generator)
        latest = [point, torch.full((len(point),), torch.inf)]

        def watch(count: int, point: Tensor, value: Tensor, latest: list[Tensor] = latest) -> None:
            latest[:] = [point, value.float()]
            recorder.tell(float(value.mean()), point.reshape(-1, *problem.shape))

        with contextlib.suppress(_TimeUpError):
            lbfgs(limited, point, n_evals=n_evals, stall=100, watch=watch)
        points.append(latest[0])
        values.append(latest[1])
    best, value = best_of(torch.stack(values), points)
    return recorder.finish(best.reshape(-1, *problem.shape), value, timesteps, noise)


def inverting_gradients(
    update: Update | Sequence[Update],
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    n_evals: int = 1000,
    lr: float = 0.1,
    total_variation: float = 1e-2,
    cpu_s: float | None = None,
) -> Inversion:
    """Inverting Gradients (Geiping et al. 2020, eq. 4): cosine and total variation, Adam on the gradient's signs.

    The learning rate falls by 10 at 3/8, 5/8 and 7/8 of the way and images are projected to [-1, 1] (for pixel models),
    as in the authors' code.

    Args:
        update, knowledge, generator, callback: see `record.Attack`.
        n_evals: evaluations.
        lr: Adam's learning rate.
        total_variation: weight of the mean absolute difference between neighbours.
        cpu_s: stop after this many CPU seconds; the learning rate then falls with time.
    """
    problem = Problem(update, knowledge)
    noise, timesteps = problem.need("noise"), problem.timesteps
    # Eq. 4: the cosine distance of gradients, plus total variation.
    objective = Matcher(problem, distance="cosine").from_clean(noise)
    recorder = Recorder(problem, "inverting_gradients", n_evals, callback)
    z = torch.randn(len(problem.updates), problem.batch * problem.unknowns, generator=generator)
    optimizer = torch.optim.Adam([z], lr=lr)
    value = torch.zeros(len(z))
    while recorder.n_evals < n_evals and (cpu_s is None or recorder.cpu_s < cpu_s):
        value, gradient = objective(z)
        clean = z.detach().reshape(-1, *problem.shape).requires_grad_(True)
        smoothness = variation(clean).sum()
        gradient = gradient + total_variation * torch.autograd.grad(smoothness, clean)[0].reshape(z.shape)
        z.grad = gradient.sign()
        share = max(recorder.n_evals / n_evals, recorder.cpu_s / cpu_s if cpu_s else 0.0)
        optimizer.param_groups[0]["lr"] = lr * 0.1 ** sum(share > mark for mark in (3 / 8, 5 / 8, 7 / 8))
        optimizer.step()
        if problem.knowledge.base is None:
            z.clamp_(-1.0, 1.0)
        recorder.tell(float(value.mean()), z.reshape(-1, *problem.shape))
    return recorder.finish(z.reshape(-1, *problem.shape), value.detach(), timesteps, noise)


def variation(images: Tensor) -> Tensor:
    """Return the anisotropic total variation `[n]` of images `[n, c, h, w]`: mean absolute neighbour differences."""
    rows = (images[:, :, 1:] - images[:, :, :-1]).abs().mean((1, 2, 3))
    columns = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3))
    return rows + columns


class _TimeUpError(Exception):
    """The CPU budget is spent."""


ATTACKS = (
    Attack(dlg, "DLG", rank=30, family="classical", needs=("timesteps", "noise"), as_published=True),
    Attack(
        inverting_gradients,
        "Inverting Gradients",
        rank=40,
        family="classical",
        needs=("timesteps", "noise"),
        as_published=True,
    ),
)
