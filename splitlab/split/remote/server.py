"""The server between machines: it takes what clients publish in the stream's order, whatever dies meanwhile."""

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from splitlab.core import storage
from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.split.remote.broker import Broker, Limits, Names, make_streams
from splitlab.split.remote.link import Link
from splitlab.split.remote.trainer import Run, Trainer
from splitlab.split.wire import write_transcript

AHEAD_BYTES = 32 * 2**20
"""Bytes of messages that are fetched while one is trained on."""

STATE_S = 1.0
"""Seconds between two reports of the server's state."""


def serve(
    run: Run,
    keys: Path,
    *,
    out: Path,
    folder: Path,
    broker: str | None = None,
    listen: str = "127.0.0.1:0",
    max_bytes: int = 2**32,
    keep: bool = True,
    patience_s: float = 3600.0,
    callback: Callback | None = None,
) -> None:
    """Train a run on what clients publish, and write `out`: ControlNet, transcript, record.

    Repeated after whatever ended it, it goes on from its last checkpoint, and ends with the same bits: those of
    training in process on the same messages in the same order.

    Args:
        run: the run.
        keys: folder of keys (`splitlab.split.remote.keys`) with the party "server".
        out: folder to write; replaced only if it holds this function's outputs and nothing else.
        folder: where the checkpoint lies, and the broker's configuration, log and streams.
        broker: `host:port` of a broker that runs already; None starts one.
        listen: where the broker that is started listens; port 0 takes a free one, and keeps it.
        max_bytes: what the stream may take on disk.
        keep: the stream keeps all messages, it is the transcript; else what the checkpoint covers makes room for more.
        patience_s: seconds without a broker after which to give up. Clients may be away as long as they like.
        callback: `(what, done, total, loss)`.

    Raises:
        InputError: the broker does not start, or refuses the server; the stream cannot hold the run, or is not the one
            of the checkpoint; `out` holds other files.
    """
    limits = _limits(run, max_bytes, keep)
    own = None if broker else Broker(folder / "broker", keys, run.name, limits, listen=listen)
    address, meanwhile = (own.address, own.ensure) if own else (broker or "", None)
    with (
        storage.alone(folder, folder / ".lock", "a server of this run"),
        storage.whole_folder(out, "serve", apart={"folder": folder}) as written,
        own or nullcontext(),
        Link(address, keys / "server", patience_s=patience_s, meanwhile=meanwhile) as link,
    ):
        storage.write_text(folder / "address", link.address + "\n")
        service = _Service(run, link, folder / "state.safetensors", limits, own, keep)
        service.train(callback)
        positions = service.trainer.positions[run.config.record_from :][: run.config.record_messages]
        service.trainer.write(written, recorded(link, run, positions))


def _limits(run: Run, max_bytes: int, keep: bool) -> Limits:
    """Share the stream's room out among the clients."""
    per_client = max_bytes // run.message_bytes // run.config.n_clients
    if per_client < (run.turns(0) if keep else 2):
        raise InputError(
            f"run {run.name}: {max_bytes} bytes hold {per_client} messages of each client, and the run has "
            f"{run.turns(0)}; raise max_bytes, or let go of what was trained on (keep)"
        )
    return Limits(run.message_bytes, per_client, max_bytes)


class _Service:
    """What `serve` does while its broker runs."""

    def __init__(self, run: Run, link: Link, state: Path, limits: Limits, broker: Broker | None, keep: bool):
        self.run, self.link, self.state, self.broker, self.keep = run, link, state, broker, keep
        self.names = Names(run.name)
        self.stream = make_streams(link, self.names, limits)
        self.trainer = Trainer(run)
        if state.exists():
            self.trainer.load(state, stream=self.stream)
        self._acknowledged = self.trainer.position
        self._told = self._saved_at = 0.0
        self._began, self._bytes_then = time.monotonic(), self.trainer.n_bytes

    def train(self, callback: Callback | None) -> None:
        """Apply what comes until the run has its steps; checkpoint, then acknowledge."""
        trainer, config = self.trainer, self.run.config
        self._tell()
        bar = tqdm(desc=f"serve {self.run.name}", initial=trainer.step, total=config.steps, mininterval=2)
        with bar:
            for position, subject, message in () if trainer.done else self._arriving():
                if trainer.receive(position, self.names.sender(subject), message):
                    bar.update()
                    if callback:
                        callback("serve", trainer.step, config.steps, trainer.losses[-1])
                if trainer.done or position - self._acknowledged >= config.checkpoint_every:
                    self._checkpoint()
                self._tell(now=trainer.done)
                if trainer.done:
                    break

    def _arriving(self) -> Iterator[tuple[int, str, bytes]]:
        """Yield the stream's messages behind the trainer's position, the next ones being fetched meanwhile."""
        depth, most = 1, max(1, min(16, AHEAD_BYTES // self.run.message_bytes))
        position = self.trainer.position + 1
        ahead: deque[Future[tuple[str, bytes] | None]] = deque()
        pause = 0.005
        while True:
            while len(ahead) < depth:
                ahead.append(self.link.later(self.link.at(self.names.stream, position + len(ahead))))
            found = self.link.wait(ahead.popleft())
            if found is None:  # nothing there yet: what was asked behind it may be out of date
                ahead.clear()
                self._idle(pause)
                depth, pause = 1, min(0.1, pause * 1.5)
                continue
            depth, pause = min(most, 2 * depth), 0.005
            yield position, *found
            position += 1

    def _idle(self, pause: float) -> None:
        """Wait for clients; what is trained so far is acknowledged, and the broker's health is seen to."""
        if self.trainer.position > self._acknowledged and time.monotonic() - self._saved_at > 5.0:
            self._checkpoint()
        self._tell()
        time.sleep(pause)

    def _checkpoint(self) -> None:
        self.trainer.save(self.state, stream=self.stream)
        self._acknowledged, self._saved_at = self.trainer.position, time.monotonic()
        for client in () if self.keep else self.trainer.turns:
            # A client's last message stays: it tells the client where to go on.
            subject = self.names.messages(client)
            last = self.link.last(self.names.stream, subject)
            until = min(self._acknowledged + 1, last[0] if last else 1)
            self.link.wait(self.link.later(self.link.release(self.names.stream, subject, until)))

    def _tell(self, *, now: bool = False) -> None:
        """Publish the server's state, and see that the broker of our own runs."""
        if self.broker:
            self.broker.ensure()
        seconds = time.monotonic() - self._began
        if not now and seconds - self._told < STATE_S and self._told:
            return
        self._told = seconds
        trainer = self.trainer
        state = {
            "terms": self.run.terms,
            "step": trainer.step,
            "position": trainer.position,
            "acknowledged": self._acknowledged,
            "messages": {str(client): turn for client, turn in sorted(trainer.turns.items())},
            "refused": {str(client): count for client, count in sorted(trainer.refused.items())},
            "reasons": [list(row) for row in trainer.reasons][-5:],
            "mb_per_s": round((trainer.n_bytes - self._bytes_then) / 1e6 / max(seconds, 1e-3), 3),
            "at": time.time(),
        }
        self.link.request(self.names.state, json.dumps(state).encode())


def recorded(link: Link, run: Run, positions: Iterable[int]) -> Iterator[bytes]:
    """Yield the messages at some positions of a run's stream (`Trainer.positions`), as far as it still has them."""
    for position in positions:
        found = link.wait(link.later(link.at(Names(run.name).stream, position)))
        if found is not None:
            yield found[1]


def record_stream(link: Link, run: Run, state: Path, transcript: Path) -> None:
    """Write all messages that a run's server has applied, up to its checkpoint `state`, as a transcript file.

    Attacks read it, and training on its messages again gives the same weights.

    Raises:
        InputError: the checkpoint is damaged or of another run, or the transcript cannot be written.
    """
    trainer = Trainer(run)
    trainer.load(state)
    write_transcript(transcript, run.header, list(recorded(link, run, trainer.positions)))
