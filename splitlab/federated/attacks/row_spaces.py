"""Row spaces of recorded gradients: the linear algebra that timesteps and prompts are read off with.

The gradient of a linear layer's weight is Σ δ xᵀ over its inputs x, so its rows lie in the span of the inputs. Rounding
and defences add noise to it; rows divided by the noise's standard deviation make directions comparable.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from splitlab.core.errors import InputError
from splitlab.federated.update import Update

ROUNDINGS = {torch.float32: 1.7}
"""Standard deviation of a gradient's rounding error in units in the last place; 1/sqrt(12), one rounding, if not named:
a float32 gradient is itself a long float32 sum."""


@dataclass(frozen=True)
class Rows:
    """Rows of gradients whose noise has about unit variance.

    Attributes:
        matrix: `[n, d]` float64.
        gram: `[d, d]`: matrixᵀ matrix; noise adds n to each of its eigenvalues.
    """

    matrix: Float[Tensor, "n d"]
    gram: Float[Tensor, "d d"]

    def __len__(self) -> int:
        return len(self.matrix)


def last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance from each value to the next one that `dtype` can represent, float64."""
    info = torch.finfo(dtype)
    magnitude = values.double().abs().clamp_min(info.smallest_normal)
    return torch.exp2(magnitude.log2().floor()) * info.eps


def rounding_std(update: Update, name: str, weight: Tensor) -> Float[Tensor, " n"]:
    """Return the standard deviation of the rounding error of each row of one parameter's gradient.

    Args:
        update: the update; a weight difference carries the rounding of the weights as well, at every local step.
        name: the parameter.
        weight: its value in the model.
    """
    value = update.gradients[name]
    error = last_place(value, value.dtype).square() * ROUNDINGS.get(value.dtype, 12**-0.5) ** 2
    if update.kind == "fedavg":
        error = error + last_place(weight.detach(), weight.dtype).square() * update.local_steps / 12
    return error.flatten(1).mean(1).sqrt()


@dataclass(frozen=True)
class Block:
    """A gradient `[n, d]` float64 of a linear layer or 1x1 convolution; the standard deviation `[n]` of rounding."""

    values: Float[Tensor, "n d"]
    std: Float[Tensor, " n"]


def block(update: Update, model: nn.Module, name: str) -> Block:
    """Return the gradient of the parameter `name` with its rounding."""
    weight = model.get_parameter(name)
    return Block(update.gradients[name].double().flatten(1), rounding_std(update, name, weight))


def unit_rows(blocks: list[Block]) -> Rows:
    """Stack the gradients of linear layers that share their input, each row divided by its noise.

    The noise is rounding, unless the smallest eigenvalue shows more: then noise in proportion to each tensor's RMS is
    assumed, as defences add it, and its level is taken from the smallest eigenvalues.

    Raises:
        InputError: all rows are zero.
    """
    blocks = [part for part in blocks if part.values.any()]
    if not blocks:
        raise InputError("all of these gradients are zero, so nothing can be read off them; ask for another update")
    rows = _rows(torch.cat([part.values / part.std[:, None] for part in blocks]))
    if torch.linalg.eigvalsh(rows.gram)[0] > 16 * len(rows):
        rows = _rows(torch.cat([part.values / part.values.square().mean().sqrt() for part in blocks]))
        noise = torch.linalg.eigvalsh(rows.gram)[:3].mean() / len(rows)
        rows = _rows(rows.matrix / noise.sqrt())
    return rows


def _rows(matrix: Tensor) -> Rows:
    return Rows(matrix, matrix.T @ matrix)


def complement(vectors: Float[Tensor, "k d"], *, tolerance: float = 1e-6) -> Float[Tensor, "d c"]:
    """Return an orthonormal basis of what is orthogonal to `vectors`; shorter than `tolerance` counts as dependent."""
    _, lengths, basis = torch.linalg.svd(vectors.double(), full_matrices=True)
    rank = int((lengths > tolerance * vectors.double().norm(dim=1).max()).sum())
    return basis[rank:].T


def captured(
    gram: Float[Tensor, "d d"], vectors: Float[Tensor, "*s k d"], *, tolerance: float = 1e-6
) -> tuple[Float[Tensor, "*s"], Tensor]:
    """Return the energy of the rows inside the span of each set of k vectors, and the span's dimension `[*s]`."""
    scale = vectors.square().sum(-1).amax(-1)[..., None]
    lengths, turn = torch.linalg.eigh(vectors @ vectors.mT)
    real = lengths > tolerance**2 * scale
    energy = torch.einsum("...ki,...kl,...li->...i", turn, vectors @ gram @ vectors.mT, turn)
    return (energy / lengths.clamp_min(1e-300)).where(real, 0.0).sum(-1), real.sum(-1)
