"""Draws from either kind of source, in one form, and the secret key of a run: kept beside its checkpoint, then erased.

From torch's generators they are torch's own draws, bit for bit. From a secret key's stream
(`splitlab.core.seeds.source`) uniform numbers have 53 bits, and Gaussian ones are built against attacks on
floating-point arithmetic.
"""

import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from splitlab.core import storage
from splitlab.core.errors import InputError
from splitlab.core.seeds import SECRET_BYTES, Key, Source

SUMMANDS = 4
"""Gaussian draws whose sum, halved, is one draw from a secret key."""


def normal(shape: Sequence[int], source: Source, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard Gaussian numbers.

    From a secret key's stream each is the sum of four, halved, computed in float64. The values that one floating-point
    Gaussian can take leave gaps, and the gaps tell what it was added to (Mironov 2012); those of a sum are too many to
    search (Holohan & Braghin 2021; Opacus' secure mode does the same).
    """
    if isinstance(source, torch.Generator):
        return torch.randn(tuple(shape), generator=source, dtype=dtype)
    total = torch.zeros(tuple(shape), dtype=torch.float64)
    for _ in range(SUMMANDS):
        total += torch.from_numpy(source.standard_normal(tuple(shape)))
    return (total / math.sqrt(SUMMANDS)).to(dtype)


def noised(value: Tensor, std: Tensor | float, source: Source) -> Tensor:
    """Add independent Gaussian noise of standard deviation `std` to every entry.

    From a secret key's stream the sum is taken in float64 and rounded to the value's type once, at the end: noise that
    was rounded before it is added shows in the low bits of the sum what it was added to (Haney et al. 2022).
    """
    if isinstance(source, torch.Generator):
        return value + std * normal(value.shape, source, dtype=value.dtype)
    return (value.double() + std * normal(value.shape, source, dtype=torch.float64)).to(value.dtype)


def uniform(shape: Sequence[int], source: Source, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw numbers uniformly from [0, 1), float32 or float64; in float64, multiples of 2^-53."""
    if isinstance(source, torch.Generator):
        return torch.rand(tuple(shape), generator=source, dtype=dtype)
    kind = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(source.random(tuple(shape), dtype=kind))


def integers(low: int, high: int, shape: Sequence[int], source: Source) -> Tensor:
    """Draw integers uniformly from [low, high), int64."""
    if isinstance(source, torch.Generator):
        return torch.randint(low, high, tuple(shape), generator=source)
    return torch.from_numpy(source.integers(low, high, tuple(shape)))


def permutation(n: int, source: Source) -> Tensor:
    """Draw an order of n things, int64."""
    if isinstance(source, torch.Generator):
        return torch.randperm(n, generator=source)
    return torch.from_numpy(source.permutation(n))


def new_key(published: int | None) -> Key:
    """Return the published key of that seed; of None, a new secret one, which nothing keeps."""
    return Key.secret() if published is None else Key.published(published)


def run_key(state: Path, published: int | None, *, bound_to: str) -> Key:
    """Return a run's key: the published one, or a secret one that is kept beside the run's checkpoint while it lasts.

    A secret is drawn at the first call and written to a file that its owner alone may read, so that an interrupted run
    repeats its draws; `end_run` erases it. The draws rest on it and on `bound_to`: a run of that name with other
    settings has other noise, so that no two releases differ by their data alone.

    Args:
        state: the run's checkpoint, whether it is there yet or not.
        published: the seed of a published key; None: secret.
        bound_to: digest of all that the run's draws are used on.

    Raises:
        InputError: the checkpoint's secret is gone or damaged, or cannot be written.
    """
    if published is not None:
        return new_key(published)
    path = _secret_path(state)
    if not path.exists():
        if state.exists():
            raise InputError(
                f"{path}: missing; the steps that {state.name} holds drew from this secret key, and going on with "
                "another would send again under other noise what was sent; put it back, or move the checkpoint aside "
                "to begin anew"
            )
        with storage.whole_file(path, private=True) as partial:
            partial.write_bytes(secrets.token_bytes(SECRET_BYTES))
    try:
        entropy = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); it is this run's secret key: make it readable") from None
    if len(entropy) != SECRET_BYTES:
        raise InputError(
            f"{path}: {len(entropy)} bytes, where a secret key has {SECRET_BYTES}; put the run's own back, or move it "
            f"and {state.name} aside to begin anew"
        )
    return Key.secret(entropy).derived(bound_to)


def end_run(state: Path) -> None:
    """Remove the checkpoint of a run whose results are written, and erase its secret key.

    The key's bytes are overwritten in place before the file is removed. Journals, snapshots, backups and the spare
    blocks of solid-state disks may keep older bytes all the same: encrypt the disk where that matters.

    Raises:
        InputError: either cannot be removed; the results are there all the same.
    """
    path = _secret_path(state)
    with storage.writing(path):
        state.unlink(missing_ok=True)
        if path.exists():
            with path.open("r+b") as file:
                file.write(bytes(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()


def _secret_path(state: Path) -> Path:
    return state.with_suffix(".key")
