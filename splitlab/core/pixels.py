"""Images as tensors and as bytes."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from splitlab.core import checkpoint, storage
from splitlab.core.errors import InputError


def finite(values: Tensor, what: str) -> Tensor:
    """Return `values` if all are finite: NaN would pass for a black image.

    Args:
        values: of any shape, one item per row.
        what: what they are, in the plural, for the error.

    Raises:
        InputError: some are not.
    """
    if not values.isfinite().all():
        bad = int((~values.isfinite()).flatten(1).any(1).sum())
        raise InputError(
            f"{bad} of {len(values)} {what} hold NaN or infinity: the model, or what was made with it, diverged; check "
            "the base model, the learning rate and the number of steps"
        )
    return values


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images in [-1, 1] to 0 ... 255.

    Raises:
        InputError: they hold NaN or infinity.
    """
    return finite(images, "images").add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Bring pixels 0 ... 255 back to [-1, 1] float32."""
    return pixels.float().div(127.5).sub(1.0)


def pictures(tensors: dict[str, Tensor], name: str, axes: int, where: Path) -> Tensor:
    """Return saved images in [-1, 1] float32: `[..., 3, h, w]` of that many axes, none of size 0 but the first.

    Raises:
        InputError: they are missing, or no such images.
    """
    saved = checkpoint.field(tensors, name, axes, (torch.uint8,), where)
    if saved.shape[-3] != 3 or 0 in saved.shape[-2:]:
        raise InputError(f"{where}: {name} is of shape {tuple(saved.shape)}; expected RGB images; make the file again")
    return from_uint8(saved)


def save_pngs(images: Tensor, folder: Path, maker: str) -> None:
    """Write images `[n, c, h, w]` in [-1, 1], grey or RGB, as `000.png`, `001.png`, ... of a folder of their own.

    Args:
        images: c is 1 or 3.
        folder: what `maker` wrote there before is replaced, see `storage.whole_folder`.
        maker: who writes it.

    Raises:
        InputError: they have other channels or hold NaN, or the folder cannot be written or holds anything else.
    """
    if images.shape[1] not in (1, 3):
        raise InputError(f"{folder}: {images.shape[1]} channels make no picture; give the base that decodes latents")
    pixels = to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    with storage.whole_folder(folder, maker) as new, storage.writing(folder):
        for index, picture in enumerate(pixels):
            Image.fromarray(picture).save(new / f"{index:03d}.png")
