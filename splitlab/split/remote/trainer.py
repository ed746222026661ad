"""S1's server as a function of a stream: each message applied once or refused, its state one file."""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitlab.core import checkpoint, storage
from splitlab.core.errors import InputError
from splitlab.data.image_set import digest
from splitlab.diffusion.base import Base
from splitlab.split.client import sample_bytes, server_loss
from splitlab.split.config import TrainConfig
from splitlab.split.defences import recorded
from splitlab.split.messages import Observation
from splitlab.split.remote.broker import Names
from splitlab.split.schemes import Split
from splitlab.split.train import learning_rate
from splitlab.split.wire import MAX_HEADER_BYTES, Header, from_bytes, write_transcript

LOG = logging.getLogger(__name__)
NEEDED = ("timesteps", "noisy_latents", "smashed", "noise")
SHOWN = 100
"""Refusals that are kept with their reasons; all are counted."""


@dataclass(frozen=True)
class Run:
    """A run of S1's split between machines: what both sides know of it.

    Attributes:
        name: the run's name, and its broker's.
        config: the run; of scheme "split".
        base: the public models.
        size: image height and width, pixels.
    """

    name: str
    config: TrainConfig
    base: Base
    size: int

    def __post_init__(self) -> None:
        """Refuse schemes that need answers."""
        Names(self.name)
        if self.config.scheme != "split":
            raise InputError(
                f"run {self.name}: scheme {self.config.scheme!r} does not go between machines; 'split' does"
            )

    @property
    def terms(self) -> dict[str, Any]:
        """What client and server must agree on, in plain values: a client compares before it sends anything."""
        config = self.config
        return {
            "run": self.name,
            "base": self.base.digest,
            "size": self.size,
            "defences": str(config.defences),
            "batch_size": config.batch_size,
            "steps": config.steps,
            "n_clients": config.n_clients,
            "randomness": config.randomness,
        }

    @property
    def header(self) -> Header:
        """The head of the run's transcript."""
        config = self.config
        return Header(
            self.name, config.dataset, config.scheme, config.defences, self.size, self.base.digest, config.n_clients
        )

    @property
    def message_bytes(self) -> int:
        """The most bytes that a message of the run has."""
        batch = self.config.batch_size
        sample = sample_bytes(self.base.latent_shape(self.size), self.base.text_shape, self.config.defences)
        return sample * batch + MAX_HEADER_BYTES

    def turns(self, client: int) -> int:
        """Return how many messages a client sends where all send alike."""
        return len(range(client, self.config.steps, self.config.n_clients))


class Trainer:
    """S1's server on a stream: model, optimiser, position and turns are its whole state, one file on disk.

    What a client sends is applied in the stream's order, and a client's in the order of its turns. Whatever else comes
    is refused with a reason, counted and passed over; no message ends the training.

    Attributes:
        step: messages applied so far.
        position: of the last message in the stream that was applied or refused.
        losses, positions: of each step: its loss, and its message's place in the stream.
        turns: the next turn of each client.
        refused: how many messages of each client were refused.
        reasons: of the last `SHOWN` refusals: (position, client, reason).
    """

    def __init__(self, run: Run):
        self.run = run
        self._scheme = Split(run.base, run.config, [])
        self._model = self._scheme.controlnet()
        self._optimizer = self._scheme.optimizers["server"]
        self._limits = run.header.limits(run.base)
        self.step = self.position = self.n_bytes = 0
        self.losses: list[float] = []
        self.positions: list[int] = []
        self.turns: Counter[int] = Counter()
        self.refused: Counter[int] = Counter()
        self.reasons: deque[tuple[int, int, str]] = deque(maxlen=SHOWN)

    @property
    def done(self) -> bool:
        """Whether the run has all its steps."""
        return self.step >= self.run.config.steps

    def receive(self, position: int, client: int, message: bytes) -> bool:
        """Take one message of the stream: train on it, or refuse it and say so.

        Args:
            position: its place in the stream, behind the last one's.
            client: who sent it, as the broker knows.
            message: the bytes.

        Returns whether it was applied.
        """
        assert position == self.position + 1, "a stream has no gaps"
        self.position = position
        try:
            self._train(self._admitted(client, message))
        except InputError as error:
            self.refused[client] += 1
            self.reasons.append((position, client, str(error)[:300]))
            if self.refused[client] <= SHOWN:
                LOG.warning("message %d of client %d refused: %.300s", position, client, error)
            return False
        self.turns[client] += 1
        self.n_bytes += len(message)
        return True

    def _admitted(self, client: int, message: bytes) -> Observation:
        """Check one message against wire, run and turn."""
        observation = from_bytes(message, limits=self._limits, max_bytes=self.run.message_bytes)
        if observation.client != client:
            raise InputError(f"it names client {observation.client}, and client {client} sent it; check the client")
        if observation.sequence != self.turns[client]:
            kind = "was sent before" if observation.sequence < self.turns[client] else "comes too soon"
            raise InputError(f"turn {observation.sequence} {kind}: {self.turns[client]} is next; check the client")
        for name in NEEDED:
            observation.need(name)
        if observation.batch_size != self.run.config.batch_size:
            raise InputError(
                f"{observation.batch_size} samples, this run has {self.run.config.batch_size}; see its config"
            )
        return observation

    def _train(self, observation: Observation) -> None:
        """Do what the scheme does in process, unless loss or gradient is not finite: then nothing changes."""
        config = self.run.config
        loss = server_loss(self.run.base, self._model, observation, defences=config.defences)
        self._optimizer.zero_grad(set_to_none=True)
        if torch.isfinite(loss):
            loss.backward()
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        if not gradients or not math.isfinite(sum(gradient.square().sum().item() for gradient in gradients)):
            raise InputError(f"its loss {loss.item():g} or the gradient is not finite; check the client, or lower lr")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        self._optimizer.step()
        self.losses.append(loss.item())
        self.positions.append(self.position)
        self.step += 1

    def save(self, path: Path, *, stream: str = "") -> None:
        """Write model, optimiser and position in the stream as one file, whole or not at all."""
        tensors = checkpoint.training_state(self._scheme.modules, self._scheme.optimizers)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["positions"] = torch.tensor(self.positions, dtype=torch.int64)
        meta = {
            "bound_to": self._bound_to,
            "stream": stream,
            "position": self.position,
            "n_bytes": self.n_bytes,
            "turns": {str(client): turn for client, turn in self.turns.items()},
            "refused": {str(client): count for client, count in self.refused.items()},
            "reasons": [list(row) for row in self.reasons],
        }
        checkpoint.save(path, tensors, meta, private=True)

    def load(self, path: Path, *, stream: str = "") -> None:
        """Go on from what `save` wrote.

        Raises:
            InputError: it is damaged, of other settings or another base model, or of another stream than the broker's.
        """
        tensors, meta = checkpoint.load(path)
        if meta.get("bound_to") != self._bound_to:
            raise InputError(f"{path}: a run of that name with other settings; give this one a name of its own")
        if stream and meta["stream"] != stream:
            raise InputError(
                f"{path}: the broker's stream is not the one that was trained on, so that messages may be missing; "
                "put the broker's folder back, or give the run another name"
            )
        checkpoint.restore_training_state(tensors, self._scheme.modules, self._scheme.optimizers)
        self.losses, self.positions = tensors["losses"].tolist(), tensors["positions"].tolist()
        self.step, self.position, self.n_bytes = len(self.losses), int(meta["position"]), int(meta["n_bytes"])  # type: ignore[call-overload]
        self.turns, self.refused = (
            Counter({int(client): count for client, count in meta[name].items()})  # type: ignore[attr-defined]
            for name in ("turns", "refused")
        )
        self.reasons.extend((int(p), int(c), str(why)) for p, c, why in meta["reasons"])  # type: ignore[attr-defined]

    @property
    def _bound_to(self) -> str:
        return digest(self.run.terms | {"config": self.run.config, "torch": torch.__version__})

    def write(self, folder: Path, messages: Iterable[bytes]) -> None:
        """Write the outputs: the ControlNet, the transcript of `messages`, and `record.json`."""
        with storage.writing(folder / "controlnet"):
            self._model.eval().save_pretrained(folder / "controlnet")
        write_transcript(folder / "transcript.safetensors", self.run.header, list(messages))
        samples = self.step * self.run.config.batch_size
        record = {
            "run": self.run.name,
            "config": recorded(self.run.config),
            "base": self.run.base.digest,
            "loss": [round(loss, 6) for loss in self.losses],
            "up_bytes_per_sample": round(self.n_bytes / samples, 2),
            "messages": {str(client): turn for client, turn in sorted(self.turns.items())},
            "refused": {str(client): count for client, count in sorted(self.refused.items())},
        }
        checkpoint.save_json(folder / "record.json", record)

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return the weights."""
        return self._model.state_dict()
