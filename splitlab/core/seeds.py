"""Randomness without state: a source of draws is a pure function of what it is for, so resuming needs no saved RNG.

Public things (initial weights, samples, galleries, attackers) draw from `generator`, whose purpose says all. What a
guarantee or a client's secret rests on draws from `source`, whose purpose names a `Key` as well.
"""

import hashlib
import secrets
from dataclasses import dataclass, field

import numpy as np
import torch
from randomgen import ChaCha

Source = torch.Generator | np.random.Generator
"""A source of draws, to be used through `splitlab.privacy.draws`: torch's for a published key, ChaCha20 for a secret
one."""

SECRET_BYTES = 32

SECRET, PUBLISHED = "secret", "published"
"""The kinds of keys, and of the randomness that follows from them."""


@dataclass(frozen=True)
class Key:
    """What the private draws of a run or client follow from. Whoever knows it can repeat them, and undo their noise.

    `Key.secret()` is for real data: 256 bits of the operating system's entropy, which no text of the key shows.
    `Key.published(...)` is for simulations that others are to repeat; it protects nobody.

    Attributes:
        seed: of a published key, what stands for it in a purpose; None of a secret one.
    """

    seed: object = None
    _secret: bytes = field(default=b"", repr=False)

    @classmethod
    def secret(cls, entropy: bytes | None = None) -> "Key":
        """Return the secret key of `SECRET_BYTES` bytes that nobody else knows; they are drawn if there are none."""
        entropy = secrets.token_bytes(SECRET_BYTES) if entropy is None else entropy
        assert len(entropy) == SECRET_BYTES, "a secret key of another length"
        return cls(_secret=entropy)

    @classmethod
    def published(cls, seed: object) -> "Key":
        """Return the key that everybody can make from `seed`."""
        return cls(seed)

    @property
    def kind(self) -> str:
        """Say "secret" or "published", as `randomness` does in records and tables."""
        return SECRET if self._secret else PUBLISHED

    def derived(self, *purpose: object) -> "Key":
        """Return a secret key's own key for one purpose, which tells nothing of any other.

        Keyed BLAKE2b (RFC 7693) is the pseudo-random function.
        """
        assert self._secret, "a published key has no secret to derive from"
        digest = hashlib.blake2b(repr(purpose).encode(), key=self._secret, digest_size=SECRET_BYTES).digest()
        return Key.secret(digest)

    def of_client(self, number: int) -> "Key":
        """Return the key of one of the clients whose keys all follow from this one."""
        return self._numbered("client", number, stride=1000)

    def of_repeat(self, number: int) -> "Key":
        """Return the key of repeat `number` of what this one is for."""
        return self._numbered("repeat", number, stride=1)

    def _numbered(self, word: str, number: int, *, stride: int) -> "Key":
        if self._secret:
            return self.derived(word, number)
        assert isinstance(self.seed, int), "published keys are numbered from a whole number"
        return Key.published(self.seed * stride + number)

    def stream(self) -> np.random.Generator:
        """Return a secret key's stream of draws, ChaCha20's (Bernstein 2008); derive a key for each stream."""
        assert self._secret, "a published key draws from torch's generators"
        return np.random.Generator(ChaCha(key=int.from_bytes(self._secret, "little"), counter=0, rounds=20))


def generator(*purpose: object) -> torch.Generator:
    """Return a CPU generator seeded by `purpose`, e.g. `generator(seed, "client", 3, "step", 120)`; all of it public.

    torch keeps 32 bits of a seed, and its Mersenne Twister can be solved for its state: it hides nothing by itself.
    """
    assert not any(isinstance(word, Key) for word in purpose), "draws that rest on a key come from `source`"
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def source(*purpose: object) -> Source:
    """Return the source of draws for a purpose that names one key, e.g. `source("client", key, 3, 120)`.

    A published key's is `generator` with the key's seed in its place. A secret key's is the stream of a key that is
    derived from it and the rest of the purpose.
    """
    (key,) = (word for word in purpose if isinstance(word, Key))
    if key.kind == PUBLISHED:
        return generator(*(key.seed if word is key else word for word in purpose))
    return key.derived(*(... if word is key else word for word in purpose)).stream()
