"""The residual r = prediction - target of an update, its noisy inputs known: a linear system, by conjugate gradients.

The gradient of the mean squared error is (2 / elements) J(x_t)ᵀ r, linear in r. The layers next to the output determine
it best, and their part of J costs least. Entries that the client's defence, which is public, withholds are left out.
"""

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
        parameters = [f"{layer.name}.{kind}" for kind in ("weight", "bias") if f"{layer.name}.{kind}" in shared]
        names += parameters
        entries += sum(shared[name].numel() for name in parameters)
        if entries >= margin * problem.batch * problem.unknowns:
            break
    return names or list(shared)


class _Jacobian:
    """Products with J, the prediction's derivative by parameters, each entry times its share in the gradient.

    Those with J itself come from differentiating J(x)ᵀ r, which is linear in r, once more; both graphs are built once.
    """

    def __init__(self, problem: Problem, prediction: Tensor, wanted: dict[str, Tensor]):
        named = [(name, p) for name, p in problem.model.named_parameters() if name in wanted]
        self.prediction, self.parameters = prediction, [parameter for _, parameter in named]
        roots = {name: weight.sqrt() for name, weight in layer_weights(wanted).items()}
        ones = torch.ones(())
        self.kept = [wanted[name] != 0 if problem.withholds else ones for name, _ in named]
        self.gradient = [roots[name] * wanted[name] for name, _ in named]
        self.factors = [2.0 / prediction.numel() * roots[name] for name, _ in named]
        self.probe = torch.zeros_like(prediction, requires_grad=True)
        self.linear = torch.autograd.grad(prediction, self.parameters, self.probe, create_graph=True)

    def transposed(self, residual: Tensor) -> list[Tensor]:
        """Return the (weighted) gradient that a residual makes."""
        products = torch.autograd.grad(self.prediction, self.parameters, residual, retain_graph=True)
        return [f * kept * part for f, kept, part in zip(self.factors, self.kept, products, strict=True)]

    def times(self, parts: list[Tensor]) -> Tensor:
        """Return the residual's direction that meets a (weighted) gradient."""
        weighted = [f * part for f, part in zip(self.factors, parts, strict=True)]
        return torch.autograd.grad(self.linear, self.probe, weighted, retain_graph=True)[0]


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
    """Solve for the residual of update `number`, given its noisy inputs, by least squares.

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
    parameters = [parameter for name, parameter in problem.model.named_parameters() if name in wanted]
    for parameter in parameters:
        parameter.requires_grad_(True)
    prediction = problem.predict(noisy, timesteps, samples)
    jacobian = _Jacobian(problem, prediction, wanted)
    _check_transpose(jacobian, torch.randn(prediction.shape, generator=torch.Generator().manual_seed(0)))
    residual, misfit, count = _least_squares(jacobian, n_iterations, goal, stall)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return Residual(residual.detach(), prediction.detach(), misfit, count)


def _least_squares(jacobian: _Jacobian, n_iterations: int, goal: float, stall: int) -> tuple[Tensor, float, int]:
    """Run conjugate gradients on the normal equations (CGNR; Saad 2003, alg. 8.4). The solution, misfit, products."""
    left = jacobian.gradient
    whole = float(sum(part.square().sum() for part in left))
    residual = torch.zeros_like(jacobian.prediction)
    slope = jacobian.times(left)
    direction, size = slope, slope.square().sum()
    count, misfits = 1, [1.0]
    while count < 2 * n_iterations and misfits[-1] > goal and size > 0:
        # Lines 4 to 7: the step along the direction, and what it leaves.
        image = jacobian.transposed(direction)
        step = size / torch.stack([part.square().sum() for part in image]).sum()
        residual = residual + step * direction
        left = [part - step * change for part, change in zip(left, image, strict=True)]
        # Lines 8 to 10: the next direction, conjugate to those before it.
        slope = jacobian.times(left)
        before, size = size, slope.square().sum()
        direction = slope + size / before * direction
        count += 2
        misfits.append(float(sum(part.square().sum() for part in left)) / whole)
        if len(misfits) > stall and misfits[-1] > 0.999 * misfits[-1 - stall]:
            break
    return residual, misfits[-1], count


def _check_transpose(jacobian: _Jacobian, u: Tensor) -> None:
    """Refuse a model that loses second derivatives: with J u = v, |v|² must be uᵀ (Jᵀ v).

    Raises:
        InputError: it does.
    """
    image = jacobian.transposed(u)
    length = float(sum(part.double().square().sum() for part in image))
    if abs(float((jacobian.times(image).double() * u).sum()) - length) > 1e-2 * length:
        raise InputError(
            "the model's second derivatives are wrong, as of autograd functions that have a first one only (some "
            "checkpointing, fused kernels); switch them off"
        )
