"""Image data sets: (image, hint, prompt) triples from the shipped zips, any imagefolder directory, or the hub."""

import csv
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from splitlab.errors import InputError

COLUMNS = ("image", "conditioning_image", "text")
LAYOUT = (
    "expected the Hugging Face imagefolder layout: metadata.csv or metadata.jsonl with the columns "
    "file_name, conditioning_image_file_name and text beside the images"
)


@dataclass(frozen=True)
class ImageSet:
    """Images with their hints and prompts, decoded and checked.

    Attributes:
        images: `[n, 3, h, w]` float32 in [-1, 1].
        hints: `[n, 3, h, w]` float32 in [-1, 1] (outlines or edges, white on black).
        prompts: n texts.
        sources: n names of the originals the images stem from ("" where unknown).
        digest: SHA-256 over pixels and prompts: two sets of equal content have equal digests.
    """

    images: Tensor
    hints: Tensor
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
            _to_uint8(self.hints[chosen]),
            [self.prompts[i] for i in indices],
            [self.sources[i] for i in indices],
        )

    def image_hashes(self) -> frozenset[str]:
        """Return the SHA-256 of each image's pixels, to find images that two sets share."""
        return frozenset(hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in _to_uint8(self.images))


def image_set(
    images: np.ndarray, hints: np.ndarray, prompts: Sequence[str], sources: Sequence[str] | None = None
) -> ImageSet:
    """Build an `ImageSet` from uint8 pixels `[n, h, w, 3]`, in memory."""
    digest = hashlib.sha256()
    for part in (images.tobytes(), hints.tobytes(), json.dumps([images.shape, list(prompts)]).encode()):
        digest.update(part)
    return ImageSet(
        images=_to_float(images),
        hints=_to_float(hints),
        prompts=tuple(prompts),
        sources=tuple(sources) if sources is not None else ("",) * len(prompts),
        digest=digest.hexdigest(),
    )


def changed(data: ImageSet, **new: Any) -> ImageSet:
    """Return a data set with other images, hints or prompts in place of its own, and the digest of that content."""
    made = replace(data, **new)
    parts = (made.images.numpy().tobytes(), made.hints.numpy().tobytes(), json.dumps(made.prompts).encode())
    content = digest({str(number): hashlib.sha256(part).hexdigest() for number, part in enumerate(parts)})
    return replace(made, digest=content)


def _to_float(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def _to_uint8(images: Tensor) -> np.ndarray:
    return images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def load(source: str | Path, *, size: int | None = None, limit: int | None = None) -> ImageSet:
    """Load a data set split.

    Args:
        source: a zip or directory in imagefolder layout, or `hub:<name>[@<split>]` for a data set on the hub (read
            through `datasets`, which needs the network or its cache).
        size: the height and width every image must have; None takes the first image's.
        limit: read the first `limit` samples only.

    Raises:
        InputError: the source is missing, empty, corrupt, of another layout or of another image size.
    """
    text = str(source)
    rows = _hub_rows(text.removeprefix("hub:")) if text.startswith("hub:") else _local_rows(Path(source))
    samples: list[Row] = []
    for index, (image, hint, prompt, original) in enumerate(itertools.islice(rows, limit)):
        for picture in (image, hint):
            size = size or picture.shape[0]
            if picture.shape[:2] != (size, size):
                height, width = picture.shape[:2]
                raise InputError(
                    f"{text}: sample {index} is {width}x{height} pixels, expected {size}x{size}; "
                    "resize the data set, or set the size it has"
                )
        samples.append((image, hint, prompt, original))
    if not samples:
        raise InputError(f"{text}: the data set is empty; {LAYOUT}")
    images, hints, prompts, sources = zip(*samples, strict=True)
    return image_set(np.stack(images), np.stack(hints), prompts, sources)


Row = tuple[np.ndarray, np.ndarray, str, str]


def _local_rows(path: Path) -> Iterator[Row]:
    if path.is_dir():
        yield from _rows(path, {p.name for p in path.iterdir()}, lambda name: (path / name).read_bytes())
    elif path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise InputError(f"{path}: not a zip file ({error}); restore it with `dvc pull` or give a folder") from None
        with archive:
            yield from _rows(path, set(archive.namelist()), archive.read)
    else:
        raise InputError(f"{path}: no such data set; `dvc pull` fetches the shipped ones")


def _rows(path: Path, names: set[str], read: Callable[[str], bytes]) -> Iterator[Row]:
    """Yield the decoded rows of an imagefolder given how to read a file of it."""
    for index, row in enumerate(_metadata(path, names, read)):
        keys = ("file_name", "conditioning_image_file_name", "text")
        missing = [key for key in keys if row.get(key) is None]
        if missing:
            raise InputError(f"{path}: row {index} of the metadata has no {', '.join(missing)}; {LAYOUT}")
        image, hint = (_decode(path, row[key], read) for key in keys[:2])
        yield image, hint, row["text"], row.get("source", "")


def _metadata(path: Path, names: set[str], read: Callable[[str], bytes]) -> list[dict[str, str]]:
    name = next((name for name in ("metadata.csv", "metadata.jsonl") if name in names), None)
    if name is None:
        raise InputError(f"{path}: no metadata.csv or metadata.jsonl; {LAYOUT}")
    try:
        table = read(name).decode()
        if name == "metadata.csv":
            return list(csv.DictReader(io.StringIO(table)))
        return [dict(json.loads(line)) for line in table.splitlines() if line.strip()]
    except Exception as error:  # zip, text, CSV and JSON readers raise many types for damaged files
        raise InputError(f"{path}: {name} cannot be read ({error}); restore or mend it") from None


def _decode(path: Path, name: str, read: Callable[[str], bytes]) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(read(name))) as picture:
            return np.asarray(picture.convert("RGB"))
    except (KeyError, FileNotFoundError):
        raise InputError(f"{path}: image {name} is named in the metadata but missing; restore the file") from None
    except Exception as error:  # PIL raises many types for damaged files
        raise InputError(f"{path}: image {name} cannot be read ({error}); restore or convert it") from None


def _hub_rows(name: str) -> Iterator[Row]:
    import datasets

    repository, _, split = name.partition("@")
    try:
        rows = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # datasets raises many types, from network to parsing
        raise InputError(f"hub:{name}: cannot be loaded ({error}); check the name, the split and the network") from None
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise InputError(
            f"hub:{name}: no column {', '.join(missing)} among {', '.join(rows.column_names)}; "
            f"the columns {', '.join(COLUMNS)} are needed"
        )
    for index, row in enumerate(rows):
        for column in COLUMNS[:2]:
            if not isinstance(row[column], Image.Image):
                raise InputError(f"hub:{name}: row {index} has no image in column {column}; it must be an image column")
        image, hint = (np.asarray(row[column].convert("RGB")) for column in COLUMNS[:2])
        yield image, hint, row["text"], ""


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
