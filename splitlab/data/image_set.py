"""Image data sets in memory: images, hints and prompts, checked and with a digest of their content."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.data.layouts import open_listing
from splitlab.data.reading import ReadOptions, read


@dataclass(frozen=True)
class ImageSet:
    """Images with their hints and prompts, decoded and checked.

    Attributes:
        images: `[n, 3, h, w]` float32 in [-1, 1].
        hints: `[n, 3, h, w]` float32 in [-1, 1] (outlines or edges, white on black); None: the set has none.
        prompts: n texts; all "" where the set has none.
        sources: n names of the originals the images stem from, or of the image files ("" where unknown).
        digest: SHA-256 over pixels and prompts: two sets of equal content have equal digests.
    """

    images: Tensor
    hints: Tensor | None
    prompts: tuple[str, ...]
    sources: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def size(self) -> int:
        """Height and width of the images, pixels."""
        return self.images.shape[-1]

    def subset(self, indices: Sequence[int]) -> "ImageSet":
        """Return the samples at `indices`, in that order."""
        chosen = torch.as_tensor(list(indices), dtype=torch.long)
        return image_set(
            _to_uint8(self.images[chosen]),
            None if self.hints is None else _to_uint8(self.hints[chosen]),
            [self.prompts[i] for i in indices],
            [self.sources[i] for i in indices],
        )

    def need_hints(self) -> Tensor:
        """Return the hints; raise InputError if there are none."""
        if self.hints is None:
            raise InputError(
                "the data set has no hints, which a ControlNet needs: name their column (columns: {conditioning_image: "
                "<name>}), or have them made from the images (hints: canny)"
            )
        return self.hints

    def need_prompts(self) -> tuple[str, ...]:
        """Return the prompts; raise InputError if there are none."""
        if not any(self.prompts):
            raise InputError(
                "the data set has no prompts, which this needs: name their column (columns: {text: <name>}), or have "
                'them made from classes (prompts: "a photograph of a {label}")'
            )
        return self.prompts

    def image_hashes(self) -> tuple[str, ...]:
        """Return the SHA-256 of each image's pixels, in order, to find images that two sets share."""
        return tuple(hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in _to_uint8(self.images))


def image_set(
    images: np.ndarray, hints: np.ndarray | None, prompts: Sequence[str], sources: Sequence[str] | None = None
) -> ImageSet:
    """Build an `ImageSet` from uint8 pixels `[n, h, w, 3]`, in memory."""
    digest = hashlib.sha256()
    drawn = b"" if hints is None else hints.tobytes()
    for part in (images.tobytes(), drawn, json.dumps([images.shape, list(prompts)]).encode()):
        digest.update(part)
    return ImageSet(
        images=_to_float(images),
        hints=None if hints is None else _to_float(hints),
        prompts=tuple(prompts),
        sources=tuple(sources) if sources is not None else ("",) * len(prompts),
        digest=digest.hexdigest(),
    )


def changed(data: ImageSet, **new: Any) -> ImageSet:
    """Return a data set with other images, hints or prompts in place of its own, and the digest of that content."""
    made = replace(data, **new)
    hints = b"" if made.hints is None else made.hints.numpy().tobytes()
    parts = (made.images.numpy().tobytes(), hints, json.dumps(made.prompts).encode())
    content = digest({str(number): hashlib.sha256(part).hexdigest() for number, part in enumerate(parts)})
    return replace(made, digest=content)


def _to_float(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def _to_uint8(images: Tensor) -> np.ndarray:
    return images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def load(source: str | Path, *, size: int | None = None, limit: int | None = None, **options: Any) -> ImageSet:
    """Load a data set split.

    Args:
        source: a folder, zip or Parquet file in one of the layouts of `splitlab.data.layouts` (`<path>@<split>` where
            it has several splits), or `hub:<id>[@<split>]` for a data set on the hub (read through `datasets`, which
            needs the network or its cache).
        size: the height and width of the images; None takes the first image's.
        limit: read the first `limit` samples only.
        options: other fields of `splitlab.data.reading.ReadOptions`, e.g. `resize="shortest", crop="centre",
            hints="canny"`.

    Raises:
        InputError: the source is missing, empty, damaged, of another layout or of another image size.
    """
    how = parse(ReadOptions, options | {"size": size or 0, "limit": limit or 0}, where=f"load({source})")
    listing = open_listing(str(source), image_column=how.columns.get("image", ""))
    n = min(how.limit or len(listing.rows), len(listing.rows))
    return image_set(*read(listing, how, range(n)))


def partition(n: int, n_clients: int) -> list[range]:
    """Split n samples among clients into contiguous, near-equal shares.

    Raises:
        InputError: there are more clients than samples.
    """
    if not 1 <= n_clients <= n:
        raise InputError(f"cannot share {n} samples among {n_clients} clients; give 1 to {n} clients")
    edges = [round(i * n / n_clients) for i in range(n_clients + 1)]
    return [range(low, high) for low, high in itertools.pairwise(edges)]


def digest(values: Mapping[str, object]) -> str:
    """Return the SHA-256 of a JSON-serialisable mapping, for cache keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
