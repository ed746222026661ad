"""What crosses the wire, byte for byte, and the transcript of it that attacks read. Safetensors only.

A message is one safetensors buffer. A transcript is one safetensors file that holds the messages' tensors under
`<number>/<field>`; a truth file holds what only the clients knew, under `<number>/<field>` likewise.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from splitlab import checkpoint
from splitlab.config import Defences, parse
from splitlab.errors import InputError
from splitlab.types import OBSERVATION_FIELDS, Observation, Truth

VERSION = 1
MAX_MESSAGE_BYTES = 256 * 2**20
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int16)


def to_bytes(observation: Observation) -> bytes:
    """Serialise one message; `client` and `sequence` travel in its header."""
    envelope = {"v": str(VERSION), "c": str(observation.client), "s": str(observation.sequence)}
    return save_bytes({k: v.detach().contiguous() for k, v in observation.tensors.items()}, metadata=envelope)


def from_bytes(message: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Observation:
    """Parse one message and check it.

    Raises:
        InputError: it is too large, corrupt, of another version, or carries an unknown, ill-typed, ill-shaped or
            non-finite field.
    """
    if len(message) > max_bytes:
        raise InputError(f"message of {len(message)} bytes refused: the limit is {max_bytes}; send smaller batches")
    try:
        length = int.from_bytes(message[:8], "little")
        envelope = json.loads(message[8 : 8 + length])["__metadata__"]
        tensors = load_bytes(message)
        client, sequence, version = int(envelope["c"]), int(envelope["s"]), int(envelope["v"])
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise InputError(f"corrupt message ({error}); ask the client to send it again") from None
    if version != VERSION:
        raise InputError(f"message of protocol version {version}, expected {VERSION}; update the older side")
    return _checked(tensors, client, sequence)


def _checked(tensors: dict[str, Tensor], client: int, sequence: int) -> Observation:
    where = f"message {sequence} of client {client}"
    unknown = sorted(set(tensors) - set(OBSERVATION_FIELDS))
    if unknown:
        raise InputError(f"{where}: unknown field {', '.join(unknown)}; known: {', '.join(OBSERVATION_FIELDS)}")
    if len({len(t) if t.ndim else 0 for t in tensors.values()}) > 1:
        raise InputError(
            f"{where}: fields of different batch sizes { ({k: tuple(t.shape) for k, t in tensors.items()}) }"
        )
    for name, tensor in tensors.items():
        ndim = {"timesteps": 1, "encoder_hidden_states": 3}.get(name, 4)
        dtypes = INTEGERS if name == "timesteps" else FLOATS
        if tensor.ndim != ndim or tensor.dtype not in dtypes:
            raise InputError(
                f"{where}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {ndim} axes of "
                f"{' or '.join(str(dtype) for dtype in dtypes)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {name} holds NaN or infinity; check the client's data and learning rate")
    return Observation(client, sequence, **tensors)


@dataclass(frozen=True)
class Header:
    """What the server knows about a recorded run: all of it public.

    Attributes:
        run: the run's name.
        dataset: whose public split is the attacker's auxiliary data.
        scheme: the training scheme.
        defences: the clients' defences.
        size: image height and width, pixels.
        base: digest of the public base model.
        n_clients: how many clients sent.
        version: of the transcript's layout.
    """

    run: str
    dataset: str
    scheme: str
    defences: Defences
    size: int
    base: str
    n_clients: int
    version: int = VERSION


@dataclass(frozen=True)
class Transcript:
    """A recorded run as the server saw it: its public header and the messages in order of arrival."""

    header: Header
    observations: tuple[Observation, ...]


def write_transcript(path: Path, header: Header, messages: Sequence[bytes]) -> None:
    """Write the messages that went over the wire to a transcript file."""
    observations = [from_bytes(message) for message in messages]
    tensors = {f"{i:06d}/{k}": v for i, o in enumerate(observations) for k, v in o.tensors.items()}
    envelopes = [[o.client, o.sequence] for o in observations]
    checkpoint.save(path, tensors, {"header": asdict(header), "envelopes": envelopes})


def read_transcript(path: str | Path, *, base_digest: str | None = None) -> Transcript:
    """Read a transcript and check it.

    Args:
        path: the file.
        base_digest: digest of the base model it is to be attacked with; None skips that check.

    Raises:
        InputError: the file is missing or damaged, of another version, of another base model, or holds bad fields.
    """
    path = Path(path)
    tensors, meta = checkpoint.load(path)
    header = _header(path, meta)
    if base_digest is not None and header.base != base_digest:
        raise InputError(
            f"{path}: recorded with base model {header.base[:12]}, not with {base_digest[:12]}; load the model it names"
        )
    envelopes: list[list[int]] = meta["envelopes"]  # type: ignore[assignment]
    grouped: list[dict[str, Tensor]] = [{} for _ in envelopes]
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        if not number.isdigit() or int(number) >= len(grouped):
            raise InputError(f"{path}: tensor {key} belongs to no message; record the run again")
        grouped[int(number)][name] = tensor
    try:
        observations = tuple(_checked(t, *envelope) for t, envelope in zip(grouped, envelopes, strict=True))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Transcript(header, observations)


def _header(path: Path, meta: dict[str, Any]) -> Header:
    fields, envelopes = meta.get("header"), meta.get("envelopes")
    senders = isinstance(envelopes, list) and all(
        isinstance(envelope, list) and [type(number) for number in envelope] == [int, int] for envelope in envelopes
    )
    if not isinstance(fields, dict) or not senders:
        raise InputError(f"{path}: not a splitlab transcript; `splitlab.wire.write_transcript` makes one")
    if fields.get("version") != VERSION:
        raise InputError(f"{path}: transcript version {fields.get('version')}, expected {VERSION}; record it again")
    missing = sorted({"run", "dataset", "scheme", "defences", "size", "base", "n_clients"} - set(fields))
    if missing:
        raise InputError(f"{path}: its header lacks {', '.join(missing)}; record it again")
    return parse(Header, fields, where=f"{path}: header")


def write_truth(path: Path, truths: Sequence[Truth]) -> None:
    """Write what only the clients knew, message by message as in the transcript, for its owner alone to read."""
    tensors = {f"{i:06d}/{k}": v for i, t in enumerate(truths) for k, v in t.tensors.items()}
    checkpoint.save(path, tensors, {"prompts": [text for truth in truths for text in truth.prompts]}, private=True)


def read_truth(path: Path) -> Truth:
    """Read a truth file and concatenate its messages: aligned with `types.stack` of the transcript's observations.

    Raises:
        InputError: the file is missing, damaged or no truth file.
    """
    tensors, meta = checkpoint.load(path)
    names = sorted({key.partition("/")[0] for key in tensors})
    if not names:
        nobody = torch.zeros(0, dtype=torch.int64)
        return Truth(indices=nobody, timesteps=nobody, noise=torch.zeros(0, 1, 1, 1))
    columns = ("indices", "timesteps", "noise")
    if set(tensors) != {f"{n}/{c}" for n in names for c in columns}:
        raise InputError(f"{path}: not a truth file; `splitlab.wire.write_truth` makes one")
    prompts: list[str] = meta.get("prompts", [])  # type: ignore[assignment]
    return Truth(**{c: torch.cat([tensors[f"{n}/{c}"] for n in names]) for c in columns}, prompts=tuple(prompts))


def read_server(path: Path) -> dict[str, Tensor]:
    """Read what a malicious server trained during a run, by name; empty for an honest one.

    Raises:
        InputError: the file is missing or damaged.
    """
    return checkpoint.load(path)[0]
