"""A connection to the broker by mutual TLS, for code that waits: ask until there is an answer, whatever dies meanwhile.

Whatever is asked may be asked again: a message is published under its own id and only behind its predecessor, and all
else reads, or sets what it set before.
"""

import asyncio
import base64
import contextlib
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

import nats
import nats.errors
from nats.aio.client import Client as Connection
from nats.aio.msg import Msg

from splitlab.core.errors import InputError, brief
from splitlab.split.remote.keys import party_of, tls

T = TypeVar("T")
RETRY_S = 0.1
ANSWER_S = 5.0
"""Seconds after which a question is asked again."""

# nats-py's reader of a connection that ends keeps to a habit of asyncio's that TLS has no use for; asyncio warns of it.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in record.getMessage())

LOST = (nats.errors.Error, OSError, asyncio.TimeoutError, EOFError)
"""What a broker that is away, restarts, or dies while it answers looks like."""


class Link:
    """One party's connection; it comes back by itself.

    Args:
        address: `host:port` of the broker.
        folder: the party's own folder of keys.
        patience_s: seconds without an answer after which to give up.
        meanwhile: called twice a second while there is none.

    Raises:
        InputError: the broker refuses this party, or is not who it should be, at once; or there is none for too long.
    """

    def __init__(
        self,
        address: str,
        folder: Path,
        *,
        patience_s: float = 3600.0,
        meanwhile: Callable[[], None] | None = None,
    ):
        self.address, self.party, self.patience_s = address.removeprefix("tls://"), party_of(folder), patience_s
        self._tls = tls(folder)
        self._meanwhile = meanwhile or (lambda: None)
        self._connection: Connection | None = None
        self._refusal = ""
        self._lock = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="link", daemon=True).start()

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.later(self._hang_up()).result(timeout=ANSWER_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def later(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start something that the connection does while this thread goes on."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def request(self, subject: str, payload: bytes = b"", headers: Mapping[str, str] | None = None) -> Msg:
        """Ask, and ask again until there is an answer."""
        return self.wait(self.later(self.answer(subject, payload, headers)))

    def wait(self, future: "Future[T]") -> T:
        """Wait for what was started."""
        while not future.done():
            wait({future}, timeout=0.5)
            if not future.done():
                self._meanwhile()
        return future.result()

    def api(self, what: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask the broker's JetStream; an error of its own is in the answer's "error"."""
        content: dict[str, Any] = json.loads(self.request(f"$JS.API.{what}", json.dumps(body or {}).encode()).data)
        return content

    def last(self, stream: str, subject: str) -> tuple[int, bytes] | None:
        """Return position and content of the last message on a subject, None if there is none."""
        answer = self.request(f"$JS.API.DIRECT.GET.{stream}.{subject}")
        headers = answer.headers or {}
        return (int(headers["Nats-Sequence"]), answer.data) if "Nats-Sequence" in headers else None

    async def at(self, stream: str, position: int) -> tuple[str, bytes] | None:
        """Return subject and content of the message at a position; None if there is none, or not yet.

        The answer is the broker's own record: headers that a client made up cannot pass for a subject.
        """
        asked = json.dumps({"seq": position}).encode()
        content = json.loads((await self.answer(f"$JS.API.STREAM.MSG.GET.{stream}", asked)).data)
        if "error" in content:
            if content["error"].get("err_code") in (10037, 10057):  # no such message
                return None
            raise InputError(f"{self.address}: stream {stream}: {content['error'].get('description')}; see its log")
        return content["message"]["subject"], base64.b64decode(content["message"].get("data", ""))

    async def answer(self, subject: str, payload: bytes = b"", headers: Mapping[str, str] | None = None) -> Msg:
        """Ask until there is an answer: what `request` waits for."""
        given = dict(headers or {})
        return await self._until_answered(lambda c: c.request(subject, payload, timeout=ANSWER_S, headers=given))

    async def release(self, stream: str, subject: str, before: int) -> None:
        """Let go of a subject's messages before a position, to make room for more."""
        await self._until_answered(lambda c: c.jsm().purge_stream(stream, seq=before, subject=subject))

    async def _until_answered(self, ask: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        began = time.monotonic()
        while True:
            try:
                return await self._unless_refused(ask(await self._connected()))
            except LOST as error:
                if time.monotonic() - began > self.patience_s:
                    raise InputError(
                        f"{self.address}: no answer for {self.patience_s:g} s ({brief(error)}); "
                        "see that server and broker run there, and start again: it goes on where it was"
                    ) from None
                await asyncio.sleep(RETRY_S)

    async def _unless_refused(self, asked: Coroutine[Any, Any, T]) -> T:
        """Wait for an answer; what the broker says of permissions comes beside it, and then no answer comes."""
        task = asyncio.ensure_future(asked)
        while not task.done():
            await asyncio.wait({task}, timeout=RETRY_S)
            if self._refusal and not task.done():
                task.cancel()
                raise InputError(f"{self.address}: refused to {self.party}: {self._refusal}; ask who runs the server")
        return task.result()

    async def _connected(self) -> Connection:
        async with self._lock:
            if self._connection is None or not self._connection.is_connected:
                await self._hang_up()
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> Connection:
        """Connect once; refusals are final."""
        try:
            connection = await nats.connect(
                f"tls://{self.address}",
                tls=self._tls,
                inbox_prefix=f"_INBOX.{self.party}",
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=5,
                error_cb=self._noted,
            )
        except ssl.SSLError as error:
            raise InputError(
                f"{self.address}: no connection for {self.party}: {brief(error)}; the certificate of either side is "
                "expired, of another authority or for another host: issue it again with `splitlab keys`"
            ) from None
        except nats.errors.Error as error:
            if "uthorization" in str(error):
                raise InputError(
                    f"{self.address}: {self.party} is not let in; its certificate is revoked or of another run: "
                    "ask who runs the server for a new one"
                ) from None
            raise
        writer = getattr(connection._transport, "_io_writer", None)
        if (
            writer is None or writer.get_extra_info("ssl_object") is None
        ):  # whoever answers may not choose to do without
            await connection.close()
            raise InputError(f"{self.address}: whoever answers there does without TLS; nothing was sent to it")
        return connection

    async def _noted(self, error: Exception) -> None:
        if "permissions violation" in str(error).lower():
            self._refusal = brief(error)

    async def _hang_up(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(*LOST):
                await self._connection.close()


def waited(done: Callable[[], bool], patience_s: float, pause_s: float = 0.02) -> bool:
    """Wait until something is so; say whether it came to be in time."""
    until = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(pause_s)
    return True
