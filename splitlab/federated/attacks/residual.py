"""The residual r = prediction - target of an update, its noisy inputs known: a linear system, by conjugate gradients.

The gradient of the mean squared error is (2 / elements) J(x_t)ᵀ r, linear in r. The layers next to the output determine
it best, and their part of J costs least. Entries that the client's defence, which is public, withholds are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.federated.attacks.matching import layer_weights
from splitlab.federated.attacks.problem import Problem


@dataclass(frozen=True)
class Residual:
    """A solved residual.

    Attributes:
        residual: `[b, c, h, w]`.
        prediction: `[b, c, h, w]`: the model's output at the noisy inputs.
        misfit: the share of the (per-tensor normalised) gradient left unexplained, squared.
        n_evals: products with J and its transpose.
    """

    residual: Tensor
    prediction: Tensor
    misfit: float
    n_evals: int


def tail(problem: Problem, *, margin: float = 20.0) -> list[str]:
    """Name the shared parameters of the last layers, at least `margin` times as many as residuals, if there are.

    All shared ones if no layer is known by its products.
    """
    shared = problem.gradients[0]
    names: list[str] = []
    entries = 0
    for layer in sorted(problem.layers(), key=lambda layer: -layer.order):
        own = [f"{layer.name}.{kind}" for kind in ("weight", "bias") if f"{layer.name}.{kind}" in shared]
        names += own
        entries += sum(shared[name].numel() for name in own)
        if entries >= margin * problem.batch * problem.unknowns:
            break
    return names or list(shared)


def solve_residual(
    problem: Problem,
    number: int,
    noisy: Tensor,
    timesteps: Tensor,
    names: list[str],
    *,
    n_iterations: int = 200,
    goal: float = 1e-9,
    stall: int = 10,
) -> Residual:
    """Solve for the residual of update `number`, given its noisy inputs (CGNR; Saad 2003, alg. 8.4).

    Products with J come from differentiating J(x)ᵀ r, which is linear in r, once more; both graphs are built once.

    Args:
        problem: the updates.
        number: which of them.
        noisy: `[b, c, h, w]`.
        timesteps: `[b]`.
        names: the parameters to use, e.g. from `tail`.
        n_iterations: at most.
        goal: stop at this misfit.
        stall: stop when so many iterations lowered the misfit by less than a thousandth of itself.
    """
    samples = torch.arange(number * problem.batch, (number + 1) * problem.batch)
    wanted = {name: problem.gradients[number][name] for name in names}
    roots = {name: weight.sqrt() for name, weight in layer_weights(wanted).items()}
    parameters = [parameter for name, parameter in problem.model.named_parameters() if name in wanted]
    order = [name for name, _ in problem.model.named_parameters() if name in wanted]
    for parameter in parameters:
        parameter.requires_grad_(True)
    prediction = problem.predict(noisy, timesteps, samples)
    scale = 2.0 / prediction.numel()
    probe = torch.zeros_like(prediction, requires_grad=True)
    linear = torch.autograd.grad(prediction, parameters, probe, create_graph=True)

    def back(residual: Tensor) -> list[Tensor]:
        products = torch.autograd.grad(prediction, parameters, residual, retain_graph=True)
        return [scale * roots[name] * kept[name] * part for name, part in zip(order, products, strict=True)]

    def forth(parts: list[Tensor]) -> Tensor:
        weighted = [scale * roots[name] * part for name, part in zip(order, parts, strict=True)]
        return torch.autograd.grad(linear, probe, weighted, retain_graph=True)[0]

    kept = {name: value != 0 if problem.withholds else torch.ones(()) for name, value in wanted.items()}
    _check_transpose(back, forth, torch.randn(probe.shape, generator=torch.Generator().manual_seed(0)))
    left = [roots[name] * wanted[name] for name in order]
    whole = float(sum(part.square().sum() for part in left))
    found = torch.zeros_like(prediction)
    slope = forth(left)
    direction, size = slope, slope.square().sum()
    count, misfits = 1, [1.0]
    while count < 2 * n_iterations and misfits[-1] > goal and size > 0:
        image = back(direction)
        step = size / torch.stack([part.square().sum() for part in image]).sum()
        found = found + step * direction
        left = [part - step * change for part, change in zip(left, image, strict=True)]
        slope = forth(left)
        before, size = size, slope.square().sum()
        direction = slope + size / before * direction
        count += 2
        misfits.append(float(sum(part.square().sum() for part in left)) / whole)
        if len(misfits) > stall and misfits[-1] > 0.999 * misfits[-1 - stall]:
            break
    for parameter in parameters:
        parameter.requires_grad_(False)
    return Residual(found.detach(), prediction.detach(), misfits[-1], count)


def _check_transpose(
    back: Callable[[Tensor], list[Tensor]], forth: Callable[[list[Tensor]], Tensor], u: Tensor
) -> None:
    """Refuse a model that loses second derivatives: with J u = v, |v|² must be uᵀ (Jᵀ v).

    Raises:
        InputError: it does.
    """
    image = back(u)
    length = float(sum(part.double().square().sum() for part in image))
    if abs(float((forth(image).double() * u).sum()) - length) > 1e-2 * length:
        raise InputError(
            "the model's second derivatives are wrong, as of autograd functions that have a first one only (some "
            "checkpointing, fused kernels); switch them off"
        )
