"""What speaks against an inversion, as far as its attacker can see: odd noise, pixels out of range, misfits."""

from torch import Tensor

from splitlab.inversion.problem import Problem

UNLIKELY = 6.0
"""Standard deviations that the mean square of noise may be off 1."""

FALSE = 1e-5
"""What the patch test of an undefended float32 update leaves at most, ten times its goal."""

OUTSIDE, UNEXPLAINED = 0.02, 0.05
"""Shares of pixels out of range, and of an undefended gradient left unexplained, beyond which a result is doubted."""


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
    if float(misfit.max()) > UNEXPLAINED and problem.updates[0].defence == "none":
        said.append(
            f"{100 * float(misfit.max()):.0f} % of the gradient stay unexplained, so the images may be wrong: more "
            "n_starts or n_evals, or facts (batch_size, timesteps, text, class_labels), may help"
        )
    return tuple(said)
