"""What crosses the wire, byte for byte, and the transcript of it that attacks read. Safetensors only.

A message is one safetensors buffer. A transcript is one safetensors file that holds the messages' tensors under
`<number>/<field>`; a truth file holds what only the clients knew, under `<number>/<field>` likewise.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from splitlab.core import checkpoint
from splitlab.core.checkpoint import field
from splitlab.core.config import Rule, Settings, one_of, parse_exactly
from splitlab.core.errors import InputError
from splitlab.split.config import SCHEMES, SENDING
from splitlab.split.defences import Defences, recorded
from splitlab.split.messages import OBSERVATION_FIELDS, Observation, Truth

if TYPE_CHECKING:
    from splitlab.diffusion.base import Base

VERSION = 1
N_TIMESTEPS = 1000
"""T of every Stable Diffusion 1.x noise schedule, the only ones that `load_base` takes."""

MAX_MESSAGE_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 16 * 2**10
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int16)
AXES = dict.fromkeys(OBSERVATION_FIELDS, 4) | {"timesteps": 1, "encoder_hidden_states": 3}
HANDED = ("noise_pred", "noise_pred_gradient")
"""Fields that the server of a U-shaped split handed out, or got for that: no defence of the client touches them."""

LATENTS = ("noisy_latents", "noise", *HANDED)
"""Fields of the latents' shape."""

NUMBER = re.compile("0|[1-9][0-9]{0,17}")
"""A client or sequence number as it travels: an int64, written in one way only."""


@dataclass(frozen=True)
class Limits:
    """What a message of a run may hold. None: not known.

    Attributes:
        floor: the smallest timestep (the defence timestep_floor).
        n_clients: clients are numbered from 0, below it.
        latents: shape `(c, h, w)` of one sample's latents.
        text: shape `(l, d)` of one sample's text embeddings.
        smashed_like_latents: whether `smashed` has the latents' channels too (S1), or only their height and width.
        withheld: fields that scheme or defences keep from the server.
        half: whether clients send 16 bits.
    """

    floor: int = 0
    n_clients: int | None = None
    latents: tuple[int, ...] | None = None
    text: tuple[int, ...] | None = None
    smashed_like_latents: bool = False
    withheld: tuple[str, ...] = ()
    half: bool = False


UNLIMITED = Limits()


def to_bytes(observation: Observation) -> bytes:
    """Serialise one message, equal ones to equal bytes; `client` and `sequence` travel in its header."""
    envelope = {"v": str(VERSION), "c": str(observation.client), "s": str(observation.sequence)}
    tensors = {name: value.detach().contiguous() for name, value in observation.tensors.items()}
    message = save_bytes(tensors, metadata=envelope)
    # The library writes the envelope's entries in another order every time; the header is written again in one.
    start = 8 + int.from_bytes(message[:8], "little")
    header = json.loads(message[8:start]) | {"__metadata__": envelope}
    return message[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(start - 8) + message[start:]


def from_bytes(message: bytes, *, limits: Limits = UNLIMITED, max_bytes: int = MAX_MESSAGE_BYTES) -> Observation:
    """Parse one message and check it.

    Args:
        message: the bytes.
        limits: what its run allows (`Header.limits`).
        max_bytes: larger messages are refused before they are parsed.

    Raises:
        InputError: it is too large, corrupt, empty, of another version, or carries an unknown, withheld, ill-typed,
            ill-shaped or non-finite field, a timestep outside [0, T), or a client that the run does not have.
    """
    if len(message) > max_bytes:
        raise InputError(f"message of {len(message)} bytes refused: the limit is {max_bytes}; send smaller batches")
    try:
        envelope = _envelope(message)
        tensors = load_bytes(message)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, MemoryError, RuntimeError) as error:
        raise InputError(f"corrupt message ({error}); ask the client to send it again") from None
    if envelope["v"] != str(VERSION):
        raise InputError(f"message of protocol version {envelope['v']}, expected {VERSION}; update the older side")
    return _checked(tensors, int(envelope["c"]), int(envelope["s"]), limits)


def _envelope(message: bytes) -> dict[str, str]:
    """Read client, sequence and version. What two parsers could read in two ways is refused."""
    length = int.from_bytes(message[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, where {MAX_HEADER_BYTES} are plenty")
    envelope = dict(json.loads(message[8 : 8 + length], object_pairs_hook=_once)["__metadata__"])
    if set(envelope) != {"v", "c", "s"}:
        raise ValueError(f"an envelope of {', '.join(envelope) or 'nothing'}")
    for value in envelope.values():
        if not (isinstance(value, str) and NUMBER.fullmatch(value)):
            raise ValueError(f"{value!r:.40} is no number from 0 on")
    return envelope


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name is given twice")
    return content


def _checked(tensors: dict[str, Tensor], client: int, sequence: int, limits: Limits) -> Observation:
    where = f"message {sequence} of client {client}"
    unknown = sorted(set(tensors) - set(OBSERVATION_FIELDS))
    if unknown:
        raise InputError(f"{where}: unknown field {', '.join(unknown)}; known: {', '.join(OBSERVATION_FIELDS)}")
    for name in tensors:
        field(tensors, name, AXES[name], INTEGERS if name == "timesteps" else FLOATS, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not shapes or any(0 in shape for shape in shapes.values()):
        raise InputError(f"{where}: it is empty, or a field of it is {shapes}; send at least one sample")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise InputError(f"{where}: fields of different batch sizes {shapes}; send one entry per sample in each")
    latents, maps = {shapes[n] for n in LATENTS if n in shapes}, {s[2:] for s in shapes.values() if len(s) == 4}
    if len(latents) > 1 or len(maps) > 1:
        raise InputError(f"{where}: fields of different shapes {shapes}; all maps of a sample have the latents' size")
    timesteps = tensors.get("timesteps", torch.tensor([limits.floor]))
    lowest, highest = int(timesteps.min()), int(timesteps.max())
    if not limits.floor <= lowest <= highest < N_TIMESTEPS:
        raise InputError(
            f"{where}: timesteps from {lowest} to {highest}; they must lie in [{limits.floor}, {N_TIMESTEPS})"
        )
    observation = Observation(client, sequence, **tensors)
    _within(observation, limits, where)
    return observation


def _within(observation: Observation, limits: Limits, where: str) -> None:
    """Refuse what the run does not allow."""
    tensors = observation.tensors
    if limits.n_clients is not None and observation.client >= limits.n_clients:
        raise InputError(f"{where}: the run has clients 0 to {limits.n_clients - 1}; ask who sent it")
    told = [name for name in limits.withheld if name in tensors]
    if told:
        raise InputError(f"{where}: it carries {', '.join(told)}, which this run withholds; check the client")
    for name, tensor in tensors.items():
        if limits.half and name not in HANDED and tensor.dtype not in (torch.float16, torch.int16):
            raise InputError(f"{where}: {name} is {tensor.dtype}, and this run sends 16 bits; check the client")
        shape = tuple(tensor.shape[1:])
        expected = {"timesteps": None, "encoder_hidden_states": limits.text}.get(name, limits.latents)
        if name == "smashed" and expected and not limits.smashed_like_latents:
            expected = (shape[0], *expected[1:])
        if expected is not None and shape != expected:
            raise InputError(f"{where}: {name} of {shape} per sample, in this run {expected}; give its base model")


SIZES = Rule(lambda value: 1 <= value < 2**31, "{name} must be 1 or more, got {value}")


@dataclass(frozen=True)
class Header(Settings):
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
    scheme: Annotated[str, one_of(SCHEMES)]
    defences: Defences
    size: Annotated[int, SIZES]
    base: str
    n_clients: Annotated[int, SIZES]
    version: int = VERSION

    def limits(self, base: "Base | None" = None) -> Limits:
        """Return what the run's messages may hold, as far as this header tells, and the base model it names.

        Raises:
            InputError: the base model has no latents for images of this size.
        """
        withheld = ("noise",) if self.scheme == "u_shaped" else HANDED
        return Limits(
            floor=self.defences.timestep_floor,
            n_clients=self.n_clients,
            latents=base.latent_shape(self.size) if base else None,
            text=base.text_shape if base else None,
            smashed_like_latents=self.scheme != "split_gradients",
            withheld=(*withheld, *(("encoder_hidden_states",) if self.defences.hide_prompts else ())),
            half=self.defences.half,
        )


@dataclass(frozen=True)
class Transcript:
    """A recorded run as the server saw it: its public header and the messages in order of arrival."""

    header: Header
    observations: tuple[Observation, ...]


def write_transcript(path: Path, header: Header, messages: Sequence[bytes]) -> None:
    """Write the messages that went over the wire to a transcript file.

    Raises:
        InputError: a message is not one of such a run (see `from_bytes`), or the file cannot be written.
    """
    observations = [from_bytes(message, limits=header.limits()) for message in messages]
    tensors = {f"{i:06d}/{k}": v for i, o in enumerate(observations) for k, v in o.tensors.items()}
    envelopes = [[o.client, o.sequence] for o in observations]
    checkpoint.save(path, tensors, {"header": recorded(header), "envelopes": envelopes})


def read_transcript(path: str | Path, *, base: "Base | None" = None, base_digest: str | None = None) -> Transcript:
    """Read a transcript and check it.

    Args:
        path: the file.
        base: the base model it is to be attacked with; None skips the checks against it.
        base_digest: its digest, where the model itself is not at hand.

    Raises:
        InputError: the file is missing or damaged, of another version, of another base model, or holds a message that
            its run cannot have sent (see `from_bytes`), or the same one twice.
    """
    path = Path(path)
    tensors, meta = checkpoint.load(path)
    header = _header(path, meta)
    digest = base.digest if base else base_digest
    if digest is not None and header.base != digest:
        raise InputError(
            f"{path}: recorded with base model {header.base[:12]}, not with {digest[:12]}; load the model it names"
        )
    envelopes: list[list[int]] = meta["envelopes"]  # type: ignore[assignment]
    grouped = _grouped(path, tensors, len(envelopes))
    try:
        limits = header.limits(base)
        observations = tuple(_checked(t, c, s, limits) for t, (c, s) in zip(grouped, envelopes, strict=True))
        _of_one_run(header, observations)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Transcript(header, observations)


def _grouped(path: Path, tensors: Mapping[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """Return the tensors message by message; keys are `<number>/<name>`, written in one way only."""
    grouped: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        index = int(number) if re.fullmatch("[0-9]{6,12}", number) else n
        if index >= n or f"{index:06d}" != number:
            raise InputError(f"{path}: tensor {key} belongs to no message; record the run again")
        grouped[index][name] = tensor
    return grouped


def _of_one_run(header: Header, observations: Sequence[Observation]) -> None:
    """Refuse messages that do not go together, although each could be sent."""
    if observations and header.scheme not in SENDING:
        raise InputError(f"scheme {header.scheme!r} sends no messages, here are {len(observations)}; check its header")
    shapes: dict[str, torch.Size] = {}
    seen: set[tuple[int, int]] = set()
    for sent in observations:
        where = f"message {sent.sequence} of client {sent.client}"
        if (sent.client, sent.sequence) in seen:
            raise InputError(f"{where} is there twice; record the run again")
        seen.add((sent.client, sent.sequence))
        for name, tensor in sent.tensors.items():
            if shapes.setdefault(name, tensor.shape[1:]) != tensor.shape[1:]:
                raise InputError(f"{where}: {name} has another shape than before; record the run again")
            if tensor.ndim == 4 and any(header.size % side for side in tensor.shape[2:]):
                raise InputError(f"{where}: {name} is no map of images of {header.size} pixels; record the run again")


def _header(path: Path, meta: Mapping[str, Any]) -> Header:
    fields, envelopes = meta.get("header"), meta.get("envelopes")
    senders = isinstance(envelopes, list) and all(
        isinstance(envelope, list)
        and [type(number) for number in envelope] == [int, int]
        and all(0 <= number < 2**63 for number in envelope)
        for envelope in envelopes
    )
    if not isinstance(fields, dict) or not senders:
        raise InputError(f"{path}: not a splitlab transcript; `splitlab.split.wire.write_transcript` makes one")
    if fields.get("version") != VERSION:
        raise InputError(f"{path}: transcript version {fields.get('version')}, expected {VERSION}; record it again")
    missing = sorted({"run", "dataset", "scheme", "defences", "size", "base", "n_clients"} - set(fields))
    if missing:
        raise InputError(f"{path}: its header lacks {', '.join(missing)}; record it again")
    return parse_exactly(Header, fields, where=f"{path}: header")


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
    if not tensors:
        nobody = torch.zeros(0, dtype=torch.int64)
        return Truth(indices=nobody, timesteps=nobody, noise=torch.zeros(0, 1, 1, 1))
    axes = {"indices": 1, "timesteps": 1, "noise": 4}
    n = len(tensors) // len(axes)
    if set(tensors) != {f"{number:06d}/{name}" for number in range(n) for name in axes}:
        raise InputError(f"{path}: not a truth file; `splitlab.split.wire.write_truth` makes one")
    for key in tensors:
        name = key.partition("/")[2]
        field(tensors, key, axes[name], (torch.float32,) if name == "noise" else (torch.int64,), path)
    columns = {name: [tensors[f"{number:06d}/{name}"] for number in range(n)] for name in axes}
    sizes = zip(*([len(value) for value in column] for column in columns.values()), strict=True)
    if any(len(set(size)) > 1 for size in sizes) or len({value.shape[1:] for value in columns["noise"]}) > 1:
        raise InputError(f"{path}: its messages differ in size or shape; record the run again")
    prompts = meta.get("prompts", [])
    texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not texts or len(prompts) not in (0, sum(map(len, columns["indices"]))):  # type: ignore[arg-type]
        raise InputError(f"{path}: its prompts are not one text per sample; record the run again")
    truth = Truth(**{name: torch.cat(column) for name, column in columns.items()}, prompts=tuple(prompts))  # type: ignore[arg-type]
    if len(truth.indices) and not (
        truth.indices.min() >= 0 <= truth.timesteps.min() <= truth.timesteps.max() < N_TIMESTEPS
    ):
        raise InputError(f"{path}: an index below 0, or a timestep outside [0, {N_TIMESTEPS}); record the run again")
    return truth


def read_server(path: Path) -> dict[str, Tensor]:
    """Read what a malicious server trained during a run, by name; empty for an honest one.

    Raises:
        InputError: the file is missing or damaged, or holds NaN or infinity.
    """
    tensors = checkpoint.load(path)[0]
    for name, tensor in tensors.items():
        field(tensors, name, tensor.ndim, (*FLOATS, *INTEGERS), path)
    return tensors
