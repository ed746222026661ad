"""What speaks against an inversion, as far as its attacker can see: odd noise, pixels out of range, misfits."""

import torch
from torch import Tensor

from splitlab.federated.attacks.problem import Problem
from splitlab.federated.update import OBJECTIVES

UNLIKELY = 6.0
"""Standard deviations that the mean square of noise may be off 1."""

SMOOTHER = 16.0
"""Over the number of differences between neighbours: the relative gain in smoothness that chance gives another reading
of a right result, 4 standard deviations."""

FALSE = 1e-5
"""What the patch test of an undefended float32 update leaves at most, ten times its goal."""

OUTSIDE, UNEXPLAINED, UNEXPLAINED_16, UNEXPLAINED_32 = 0.02, 0.05, 1e-4, 1e-5
"""Shares of pixels out of range, and of a gradient left unexplained, beyond which a result is doubted: of a weight
difference, a gradient of 16 bits, and of 32, of which right results leave 4e-6 and 1e-8."""


def doubts(
    problem: Problem, clean: Tensor, noise: Tensor, misfit: Tensor, patch_value: Tensor | None = None
) -> tuple[str, ...]:
    """Say what speaks against a result.

    Args:
        problem: the updates.
        clean, noise: `[n, c, h, w]`, as found.
        misfit: `[u]`: the share of each gradient left unexplained.
        patch_value: `[n]`: what the patch test left, if it was made.
    """
    said = []
    if patch_value is not None and not problem.is_inexact and (missed := int((patch_value > FALSE).sum())):
        said.append(
            f"the patch test was not passed by {missed} of {len(patch_value)} noisy input(s), which are likely false "
            "minima: more n_starts or n_evals may find the right ones"
        )
    squares = noise.double().square().mean((1, 2, 3))
    if float((squares - 1).abs().max()) > UNLIKELY * (2 / problem.unknowns) ** 0.5:
        far = float(squares[(squares - 1).abs().argmax()])
        said.append(
            f"the noise found has mean square {far:.3g}, not 1, so the images are wrong: check objective, "
            "alphas_cumprod, and how the update was scaled (scale=, sign=, clipped=, kind=)"
        )
    outside = float((clean.abs() > 1.05).double().mean())
    if problem.is_pixels and outside > OUTSIDE:
        said.append(
            f"{100 * outside:.0f} % of the pixels found lie outside [-1, 1]: check alphas_cumprod (the default is "
            "DDPMScheduler's), objective, and how the update was scaled"
        )
    if not problem.is_defended and (left := float(misfit.max())) > _most_unexplained(problem):
        said.append(
            f"{100 * left:.2g} % of the gradient stay unexplained, so the images may be wrong: the client may have had "
            "other weights, another precision, dropout or batch norms in training mode, or several steps; or more "
            "n_starts or n_evals, or facts (batch_size, timesteps, text, class_labels), may help"
        )
    elif not problem.is_defended and _is_smoother_otherwise(problem, clean, noise):
        said.append(
            "read with another objective, schedule or scale an image is smoother, as added noise never makes it: check "
            "objective, alphas_cumprod, and how the update was scaled (scale=, sign=, clipped=)"
        )
    return tuple(said)


def _most_unexplained(problem: Problem) -> float:
    if problem.is_inexact and problem.updates[0].kind == "gradient" and problem.updates[0].defence == "none":
        return UNEXPLAINED_16
    return UNEXPLAINED if problem.is_inexact else UNEXPLAINED_32


def _is_smoother_otherwise(problem: Problem, clean: Tensor, noise: Tensor) -> bool:
    """Say whether another reading of a result leaves less noise in an image.

    Read by a wrong objective, schedule or scale, an image is itself times a number, plus noise: rougher, for its
    contrast.
    """
    signal, sigma = problem.rates(problem.timesteps)
    noisy = signal * clean + sigma * noise
    target = noise if problem.objective == "epsilon" else signal * noise - sigma * clean
    roughness = _roughness(clean)
    other = next(name for name in OBJECTIVES if name != problem.objective)
    swapped = _roughness(problem.unmix(noisy, target, problem.timesteps, objective=other)[0])
    levels = torch.linspace(0.02, 0.98, 49)
    rates = (levels if problem.objective == "epsilon" else levels / (1 - levels**2).sqrt()).to(noisy)
    turned = torch.stack([_roughness(noisy - rate * target) for rate in rates])
    count = 2 * clean[0].numel() - clean[0, ..., 0].numel() - clean[0, :, 0].numel()
    enough = (roughness * (1 - SMOOTHER / max(count, 1))).clamp(max=1.0)
    return bool((torch.minimum(swapped, turned.min(0).values) < enough).any())


def _roughness(images: Tensor) -> Tensor:
    """Return `[n]`: the mean squared difference of neighbours over the mean square; 2 of white noise."""
    squares = [images.double().diff(dim=axis).square().flatten(1) for axis in (2, 3)]
    return torch.cat(squares, 1).mean(1) / images.double().square().mean((1, 2, 3)).clamp_min(1e-30)
