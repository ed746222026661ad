"""Independent calls in parallel: as many processes as there are cores, one thread each."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import psutil
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

T = TypeVar("T")

MEMORY_PER_PROCESS = 2 << 30
"""Bytes that are set aside for each process: its libraries, models, data and gradients."""


class Reference:
    """What goes to another process in place of something `Loadable`; `load` returns that, or raises InputError."""

    def load(self) -> Any:
        """Load it in this process."""
        raise NotImplementedError


@runtime_checkable
class Loadable(Protocol):
    """What is not copied to another process but loaded there from where it lies."""

    def reference(self) -> Reference:
        """Say where it lies."""


def n_workers() -> int:
    """Return how many processes may run side by side here: one per core that this process may use, as memory allows."""
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // MEMORY_PER_PROCESS))


def parallel(work: Callable[..., T], calls: Iterable[tuple[Any, ...]], *, desc: str, workers: int = 1) -> Iterator[T]:
    """Yield `work(*call)` for every call, in the order of the calls, and show progress.

    Args:
        work: a function of a module; what it is given and returns is copied between processes, but for what is
            `Loadable`: that is loaded there anew.
        calls: its arguments.
        desc: of the progress bar.
        workers: processes. 1: this one, with as many threads as it has; more: one thread each, which is what makes two
            of them on two cores faster than one with two threads where tensors are small. Another number of threads
            may round sums otherwise.

    Raises:
        InputError: with more than one process, something `Loadable` that is not where it was, or another one.
        Exception: what a call raised; the others are stopped, what they have written is whole.
    """
    calls = list(calls)
    with parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = Parallel(n_jobs=workers, return_as="generator", pre_dispatch="n_jobs", batch_size=1, max_nbytes=None)
        if workers > 1:
            calls = [tuple(v.reference() if isinstance(v, Loadable) else v for v in call) for call in calls]
        results = parallel(delayed(_arrived)(work, *call) for call in calls)
        yield from tqdm(results, desc=desc, total=len(calls), mininterval=2)


def _arrived(work: Callable[..., T], *call: Any) -> T:
    return work(*(value.load() if isinstance(value, Reference) else value for value in call))
