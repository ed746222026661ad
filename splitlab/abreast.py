"""Independent calls abreast: as many processes as there are cores, one thread each."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import psutil
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

T = TypeVar("T")

MEMORY_PER_PROCESS = 2 << 30
"""Bytes that are set aside for each process: its libraries, models, data and gradients."""


def n_workers() -> int:
    """Return how many processes may run abreast here: one per core that this process may use, as memory allows."""
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // MEMORY_PER_PROCESS))


def abreast(work: Callable[..., T], calls: Iterable[tuple[Any, ...]], *, desc: str, workers: int = 1) -> Iterator[T]:
    """Yield `work(*call)` for every call, in the order of the calls, and show progress.

    Args:
        work: a function of a module; what it is given and what it returns is copied between processes.
        calls: its arguments.
        desc: of the progress bar.
        workers: processes. 1: this one, with as many threads as it has; more: one thread each, which is what makes two
            of them on two cores faster than one with two threads where tensors are small. Another number of threads
            may round sums otherwise.

    Raises:
        Exception: what a call raised; the others are stopped, what they have written is whole.
    """
    calls = list(calls)
    with parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = Parallel(n_jobs=workers, return_as="generator", pre_dispatch="n_jobs", batch_size=1)
        results = parallel(delayed(work)(*call) for call in calls)
        yield from tqdm(results, desc=desc, total=len(calls), mininterval=2)
