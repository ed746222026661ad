"""Randomness without state: a generator is a pure function of what it is for, so resuming needs no saved RNG."""

import hashlib

import torch


def generator(*purpose: object) -> torch.Generator:
    """Return a CPU generator seeded by `purpose`, e.g. `generator(seed, "client", 3, "step", 120)`."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
