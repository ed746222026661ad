"""Splits that should be apart: what an attacker may read must not be what he is after."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from splitlab.core.errors import InputError
from splitlab.data.datasets import SPLITS
from splitlab.data.image_set import ImageSet

ALIKE = 0.98
"""Correlation of thumbnails from which images count as look-alikes. Copies that were compressed, resized or brightened
reach it; of photographs of different things hardly any do."""


def refuse_overlap(splits: Mapping[str, ImageSet], *, dataset: str) -> None:
    """Refuse splits that share an image, pixel for pixel; warn of images that look alike, mirrored ones included.

    Splits of different sizes are refused too: their images cannot be compared.

    It is called before anything is trained or recorded, wherever several splits of a data set are at hand.

    Args:
        splits: the splits by name, in their final size.
        dataset: the data set's name, for messages.

    Raises:
        InputError: two splits share an image, or have images of different sizes.
    """
    if "private" in splits:
        name_repeats(splits["private"], dataset=dataset)
    for (one, first), (other, second) in itertools.combinations(splits.items(), 2):
        if first.size != second.size:
            raise InputError(
                f"data set {dataset}: the {one} images have {first.size}x{first.size} pixels, the {other} ones "
                f"{second.size}x{second.size}; let its entry say size and resize"
            )
        places = {content: index for index, content in enumerate(second.image_hashes())}
        shared = [(i, places[content]) for i, content in enumerate(first.image_hashes()) if content in places]
        if shared:
            raise InputError(
                f"data set {dataset}: {len(shared)} of the {len(first)} {one} images are {other} images too, the first "
                f"{_named(first, shared[0][0])} ({other}: {_named(second, shared[0][1])}); keep each in one split"
            )
    found = [
        text for pair in itertools.combinations(splits, 2) if (text := _look_alikes(*pair, *(splits[s] for s in pair)))
    ]
    if found:
        warnings.warn(f"data set {dataset}: look-alikes, which may be copies: {'; '.join(found)}", stacklevel=2)


def refuse_overlaps(datasets: Iterable[str], load: Callable[[str, str], ImageSet]) -> None:
    """Apply `refuse_overlap` to the three splits of each data set; `load` takes its name and a split."""
    for dataset in dict.fromkeys(datasets):
        refuse_overlap({split: load(dataset, split) for split in SPLITS}, dataset=dataset)


def name_repeats(private: ImageSet, *, dataset: str) -> None:
    """Warn of images that stand in the private split several times: what is promised for one row is not for them."""
    places: dict[str, list[int]] = {}
    for index, content in enumerate(private.image_hashes()):
        places.setdefault(content, []).append(index)
    if repeated := [rows for rows in places.values() if len(rows) > 1]:
        most = max(repeated, key=len)
        warnings.warn(
            f"data set {dataset}: {len(repeated)} private images are there more than once, {_named(private, most[0])} "
            f"{len(most)} times: an epsilon, and all that is counted per sample, is for one of them only",
            stacklevel=3,
        )


def _look_alikes(one: str, other: str, first: ImageSet, second: ImageSet) -> str:
    """Say how many images of the first split look like one of the second, and which is the closest pair."""
    mine, theirs = thumbnails(first.images), thumbnails(second.images)
    theirs = torch.cat([theirs, theirs.unflatten(1, (3, 8, 8)).flip(-1).flatten(1)])
    closest = [(part @ theirs.T).max(1) for part in mine.split(1024)]
    likeness, places = (torch.cat(parts) for parts in zip(*closest, strict=True))
    if not (count := int((likeness > ALIKE).sum())):
        return ""
    best = int(likeness.argmax())
    place = int(places[best])
    how = ", mirrored" if place >= len(second) else ""
    pair = f"{_named(first, best)} and {_named(second, place % len(second))}{how}"
    return f"{count} of the {len(first)} {one} images have one among the {other} images, the closest {pair}"


def thumbnails(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 192"]:
    """Return a perceptual hash: 8x8 colour thumbnails, mean off, of length 1, so that products are correlations.

    Images that hardly vary have a shorter one: they are all alike.
    """
    small = F.interpolate(images, size=(8, 8), mode="area").flatten(1)
    centred = small - small.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1.0)


def _named(data: ImageSet, index: int) -> str:
    return data.sources[index] or f"sample {index}"
