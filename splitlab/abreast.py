"""Independent calls abreast: as many processes as there are cores, one thread each."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import psutil
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

from splitlab.base import Base, load_base
from splitlab.errors import InputError

T = TypeVar("T")

MEMORY_PER_PROCESS = 2 << 30
"""Bytes that are set aside for each process: its libraries, models, data and gradients."""


def n_workers() -> int:
    """Return how many processes may run abreast here: one per core that this process may use, as memory allows."""
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // MEMORY_PER_PROCESS))


def abreast(work: Callable[..., T], calls: Iterable[tuple[Any, ...]], *, desc: str, workers: int = 1) -> Iterator[T]:
    """Yield `work(*call)` for every call, in the order of the calls, and show progress.

    Args:
        work: a function of a module; what it is given and what it returns is copied between processes. A `Base` is not
            copied but loaded from where it was: a copied tokenizer decodes otherwise.
        calls: its arguments.
        desc: of the progress bar.
        workers: processes. 1: this one, with as many threads as it has; more: one thread each, which is what makes two
            of them on two cores faster than one with two threads where tensors are small. Another number of threads
            may round sums otherwise.

    Raises:
        InputError: with more than one process, a base model that is not where it was loaded from, or another one.
        Exception: what a call raised; the others are stopped, what they have written is whole.
    """
    calls = list(calls)
    with parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = Parallel(n_jobs=workers, return_as="generator", pre_dispatch="n_jobs", batch_size=1, max_nbytes=None)
        if workers > 1:
            calls = [tuple(_Whereabouts.of(one) if isinstance(one, Base) else one for one in call) for call in calls]
        results = parallel(delayed(_arrived)(work, *call) for call in calls)
        yield from tqdm(results, desc=desc, total=len(calls), mininterval=2)


@dataclass(frozen=True)
class _Whereabouts:
    """What goes to another process in place of a base model."""

    source: str
    digest: str

    @classmethod
    def of(cls, base: Base) -> "_Whereabouts":
        return cls(base.pipeline.name_or_path, base.digest)

    def load(self) -> Base:
        base = _loaded(self.source)
        if base.digest != self.digest:
            raise InputError(
                f"base model {self.source}: it changed after it was loaded; load it again, or use one worker"
            )
        return base


_loaded = lru_cache(maxsize=1)(load_base)


def _arrived(work: Callable[..., T], *call: Any) -> T:
    return work(*(one.load() if isinstance(one, _Whereabouts) else one for one in call))
