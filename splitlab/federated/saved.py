"""Inversions on disk: what attacks on updates leave for the evaluation, for figures and for the explorer."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from splitlab.core import checkpoint
from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.pixels import pictures, to_uint8
from splitlab.data.image_set import ImageSet
from splitlab.federated.attacks import NO_INFORMATION
from splitlab.federated.attacks.problem import Inversion
from splitlab.federated.attacks.prompts import PromptsFound
from splitlab.federated.attacks.timesteps import TimestepsFound


@dataclass(frozen=True)
class SavedInversion:
    """What one attack made of the updates of one cell and seed.

    Attributes:
        attack: its name in `INVERSIONS`, or `NO_INFORMATION`.
        granted: facts that it was given besides the updates.
        images: `[n, 3, h, w]` in [-1, 1], sample by sample; None if it is not after images.
        timesteps: for each update, the sorted timesteps found; None if it is not after them.
        prompts: for each update, the sorted prompts found; None likewise.
        history: `(n_evals, images)` on the way.
        objective: the attack's own objective as it went on.
        n_evals: evaluations per update.
        cpu_s: CPU seconds for all updates; NaN if unknown.
        refused: why there is no result; "" if there is.
    """

    attack: str
    granted: tuple[str, ...] = ()
    images: Tensor | None = None
    timesteps: tuple[tuple[int, ...], ...] | None = None
    prompts: tuple[tuple[str, ...], ...] | None = None
    history: tuple[tuple[int, Tensor], ...] = ()
    objective: tuple[float, ...] = ()
    n_evals: int = 0
    cpu_s: float = 0.0
    refused: str = ""


def saved_inversion(
    result: Inversion | Sequence[Any],
    *,
    attack: str,
    n_updates: int,
    granted: tuple[str, ...],
    cpu_s: float,
) -> SavedInversion:
    """Return what an attack's result says, in the form that is saved.

    Args:
        result: an `Inversion` of all updates, or a `TimestepsFound` or `PromptsFound` for each.
        attack: see `SavedInversion`.
        n_updates: how many updates there were.
        granted: likewise; what was granted is not counted as found.
        cpu_s: CPU seconds that the attack took.
    """
    if isinstance(result, Inversion):
        steps = None if "timesteps" in granted else result.timesteps
        return SavedInversion(
            attack,
            granted,
            images=result.images,
            timesteps=None if steps is None else tuple(_distinct(part) for part in steps.chunk(n_updates)),
            history=result.history,
            objective=result.objective,
            n_evals=result.n_evals,
            cpu_s=cpu_s,
        )
    times = tuple(_distinct(part.timesteps) for part in result if isinstance(part, TimestepsFound))
    prompts = tuple(tuple(sorted(part.prompts)) for part in result if isinstance(part, PromptsFound))
    return SavedInversion(attack, granted, timesteps=times or None, prompts=prompts or None, cpu_s=cpu_s)


def _distinct(timesteps: Tensor) -> tuple[int, ...]:
    return tuple(sorted(set(timesteps.tolist())))


def guess(
    public: ImageSet, n: int, *, size: int, batch: int, n_timesteps: int, generator: torch.Generator
) -> SavedInversion:
    """Answer without looking: the mean public image, random timesteps, the commonest public prompts.

    Args:
        public: public data.
        n: samples.
        size: height and width of the images.
        batch: samples per update.
        n_timesteps: T.
        generator: of the timesteps.
    """
    mean = F.interpolate(public.images, size=(size, size), mode="area").mean(0, keepdim=True)
    steps = torch.randint(n_timesteps, (n,), generator=generator)
    common = tuple(sorted(prompt for prompt, _ in Counter(public.prompts).most_common(batch)))
    times = tuple(_distinct(part) for part in steps.split(batch))
    return SavedInversion(NO_INFORMATION, (), mean.expand(n, -1, -1, -1).clone(), times, (common,) * (n // batch))


def save_inversion(path: Path, saved: SavedInversion) -> None:
    """Write an inversion. Its CPU seconds go to a file beside it, so that equal attacks give equal files."""
    tensors = {"objective": torch.tensor(saved.objective, dtype=torch.float32)}
    if saved.images is not None:
        tensors["images"] = to_uint8(saved.images)
    if saved.history:
        tensors["history"] = to_uint8(torch.stack([images for _, images in saved.history]))
    meta = asdict(saved) | {"images": None, "history": [count for count, _ in saved.history], "objective": None}
    checkpoint.save_json(path.with_suffix(".seconds.json"), {"cpu_s": meta.pop("cpu_s")})
    checkpoint.save(path, tensors, meta)


def load_inversion(path: Path) -> SavedInversion:
    """Read what `save_inversion` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    tensors, content = checkpoint.load(path, remedy=checkpoint.REMADE)
    meta = parse(_Meta, content, where=f"{path}: what it says of itself")
    timed = path.with_suffix(".seconds.json")
    seconds = checkpoint.load_json(timed, "cpu_s")["cpu_s"] if timed.exists() else math.nan
    history = pictures(tensors, "history", 5, path) if "history" in tensors else torch.zeros(0)
    if len(history) != len(meta.history) or not isinstance(seconds, int | float):
        raise InputError(f"{path}: its history or its seconds do not fit; attack again (`dvc repro`)")
    return SavedInversion(
        meta.attack,
        meta.granted,
        pictures(tensors, "images", 4, path) if "images" in tensors else None,
        meta.timesteps,
        meta.prompts,
        tuple(zip(meta.history, history, strict=True)),
        tuple(checkpoint.field(tensors, "objective", 1, (torch.float32,), path, finite=False).tolist()),
        meta.n_evals,
        seconds,
        meta.refused,
    )


@dataclass(frozen=True)
class _Meta:
    attack: str
    granted: tuple[str, ...]
    images: Any
    timesteps: tuple[tuple[int, ...], ...] | None
    prompts: tuple[tuple[str, ...], ...] | None
    history: tuple[int, ...]
    objective: Any
    n_evals: int
    refused: str


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `call` returns, and the CPU seconds it took."""
    began = time.process_time()
    return call(), time.process_time() - began
