"""What tests of secret draws look for: known entropy, and traces of a secret in files and texts."""

import base64
from pathlib import Path

import torch

from splitlab.core import checkpoint
from splitlab.core.seeds import Key

ENTROPY = bytes(range(100, 132))
"""What the operating system gives in tests that look for it or repeat it."""

FIXED = Key.secret(bytes(range(32)))


def tensors_below(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{file.relative_to(folder)}/{n}": v for file in files for n, v in checkpoint.load(file)[0].items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def traces(content: bytes, secret: bytes) -> bool:
    """Whether a secret shows in some text or file, in any of the ways in which bytes are commonly written."""
    numbers = (str(int.from_bytes(secret, order)) for order in ("little", "big"))
    written = [secret.hex(), secret.hex().upper(), base64.b64encode(secret).decode(), str(list(secret)), repr(secret)]
    raw = (secret, secret[::-1], bytes([*secret[:16]]), bytes([*secret[16:]]))
    return any(word.encode() in content for word in (*written, *numbers)) or any(part in content for part in raw)


def holders(folder: Path, secrets: list[bytes]) -> list[str]:
    """The files below a folder in which a secret shows."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if any(traces(path.read_bytes(), one) for one in secrets)]
