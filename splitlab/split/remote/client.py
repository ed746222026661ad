"""A client between machines: it publishes its turns, one after the other, and goes on where the stream ends."""

import hashlib
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.data.image_set import ImageSet, digest, partition
from splitlab.privacy.draws import end_run, run_key
from splitlab.split.client import Client, client_send
from splitlab.split.remote.broker import Names
from splitlab.split.remote.link import Link
from splitlab.split.remote.trainer import Run
from splitlab.split.train import make_clients
from splitlab.split.wire import from_bytes

LOG = logging.getLogger(__name__)
FULL_S = 0.2
"""Seconds to wait where the stream has no room."""

WRONG_LAST, FULL = 10071, 10077
"""Codes of JetStream: the last message is another than expected; the stream takes no more."""


def remote_client(run: Run, number: int, private: ImageSet, *, cache: Path, share: bool = False) -> tuple[Client, Path]:
    """Make one client of a run, who holds all of `private`; return it and where its secret is kept until it is done.

    `share`: it holds its share of what is all clients' together, as in process.

    Raises:
        InputError: the run has no client of that number, the images have another size, or the secret is damaged.
    """
    if not 0 <= number < run.config.n_clients:
        raise InputError(f"run {run.name}: clients are numbered 0 to {run.config.n_clients - 1}, not {number}")
    if private.size != run.size:
        raise InputError(f"run {run.name}: its images have {run.size} pixels, these {private.size}; give others")
    if share:
        n = min(run.config.samples or len(private), len(private))
        private = private.subset(partition(n, run.config.n_clients)[number])
    whose = digest({"terms": run.terms, "client": number, "data": private.digest})
    secret = cache / f"join-{whose[:16]}.safetensors"
    key = run_key(secret, run.config.published_key, bound_to=whose)
    alone = replace(run.config, n_clients=1, samples=0)
    (client,) = make_clients(run.base, private, alone, key=key, cache=cache)
    return replace(client, number=number), secret


def join(
    run: Run,
    client: Client,
    link: Link,
    *,
    secret: Path | None = None,
    turns: int | None = None,
    callback: Callback | None = None,
) -> int:
    """Publish a client's turns, each acknowledged by the broker before the next.

    Killed and repeated, it asks the stream where it was. A message is a function of the client's key and the turn, so
    that what was lost comes again with the same bytes.

    Args:
        run: the run.
        client: who sends.
        link: its connection to the broker.
        secret: where its secret is kept (`remote_client`); erased once all turns are acknowledged.
        turns: how many to send in all; None: its share of the run's steps.
        callback: `(what, done, total, 0)`.

    Returns how many messages this call published.

    Raises:
        InputError: the server's run is another one, or the stream holds messages of this client that others made: with
            another secret or other data.
    """
    turns = run.turns(client.number) if turns is None else turns
    names, subject = Names(run.name), Names(run.name).messages(client.number)
    _agree(run, link, names)
    turn, behind = _resume(run, client, link, turns)
    sent, size = 0, 0
    with tqdm(desc=f"client {client.number}", initial=turn, total=turns, mininterval=2) as bar:
        while turn < turns:
            message, _ = client_send(client, turn, run.config.batch_size)
            position = _publish(link, subject, client.number, turn, message, behind)
            if position is None:  # the stream does not end where this client thought
                turn, behind = _resume(run, client, link, turns)
                continue
            turn, behind, sent, size = turn + 1, position, sent + 1, size + len(message)
            bar.update(turn - bar.n)
            bar.set_postfix(MB=f"{size / 1e6:.1f}", refresh=False)
            if callback:
                callback("join", turn, turns, 0.0)
    if secret is not None:
        end_run(secret)
    return sent


def _agree(run: Run, link: Link, names: Names) -> None:
    """Wait for a server's state, and compare what it says of the run, before anything private is sent."""
    until = time.monotonic() + link.patience_s
    while (found := link.last(names.state_stream, names.state)) is None:
        if time.monotonic() > until:
            raise InputError(f"run {run.name}: no server has said anything for {link.patience_s:g} s; start it there")
        time.sleep(FULL_S)
    theirs: dict[str, Any] = json.loads(found[1])["terms"]
    for name, value in run.terms.items():
        if theirs.get(name) != value:
            raise InputError(
                f"run {run.name}: {name} is {value!r} here, {theirs.get(name)!r} at the server; use one configuration"
            )


def _resume(run: Run, client: Client, link: Link, turns: int) -> tuple[int, int]:
    """Return the client's next turn and the position of its last message in the stream, (0, 0) at the beginning."""
    names = Names(run.name)
    last = link.last(names.stream, names.messages(client.number))
    if last is None:
        return 0, 0
    position, message = last
    turn = from_bytes(message).sequence
    if turn + 1 < turns and client_send(client, turn, run.config.batch_size)[0] != message:  # else its secret is gone
        raise InputError(
            f"run {run.name}: the stream holds turn {turn} of client {client.number} as others made it, with another "
            "secret or other data; going on would send the same images under other noise: put its secret and data back"
        )
    return turn + 1, position


def _publish(link: Link, subject: str, client: int, turn: int, message: bytes, behind: int) -> int | None:
    """Publish one message behind this client's last one; return its position, None if that one is not the last."""
    # The id holds the message's digest, so that no fellow client can use it up.
    headers = {
        "Nats-Msg-Id": f"{client}:{turn}:{hashlib.sha256(message).hexdigest()[:32]}",
        "Nats-Expected-Last-Subject-Sequence": str(behind),
    }
    while True:
        answer = json.loads(link.request(subject, message, headers).data)
        error = answer.get("error")
        if error is None:
            return int(answer["seq"])
        if error.get("err_code") == WRONG_LAST:
            return None
        if error.get("err_code") != FULL:
            raise InputError(f"turn {turn} of client {client}: the broker refuses it ({error.get('description')})")
        LOG.info("the stream has no room for turn %d of client %d; waiting", turn, client)
        time.sleep(FULL_S)
