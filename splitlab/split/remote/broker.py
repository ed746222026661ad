"""The broker between machines: NATS JetStream as a process of its own, its limits, and who may say what to it."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import psutil

from splitlab.core import storage
from splitlab.core.errors import InputError
from splitlab.split.remote.keys import Certificate, issued
from splitlab.split.remote.link import Link, waited

MAX_PAYLOAD = 64 * 2**20
"""Bytes of the largest message that the broker can carry."""


@dataclass(frozen=True)
class Names:
    """How a run is called at the broker.

    Attributes:
        run: the run's name.
    """

    run: str

    def __post_init__(self) -> None:
        """Refuse what no subject can be called."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", self.run):
            raise InputError(f"run {self.run!r:.120}: a name of letters, digits, - and _ is needed between machines")

    @property
    def stream(self) -> str:
        """The stream of messages, which is the transcript."""
        return f"splitlab-{self.run}"

    @property
    def state_stream(self) -> str:
        """The stream whose one message is the server's state."""
        return f"splitlab-{self.run}-state"

    @property
    def state(self) -> str:
        """The subject of the server's state."""
        return f"splitlab.{self.run}.state"

    def messages(self, client: int | str) -> str:
        """Return the subject of one client's messages; of "*", of all."""
        return f"splitlab.{self.run}.message.{client}"

    def sender(self, subject: str) -> int:
        """Return which client a message is from; the broker lets nobody else use that subject."""
        number = subject.rpartition(".")[2]
        return int(number) if number.isdecimal() else -1


@dataclass(frozen=True)
class Limits:
    """What a stream holds before clients have to wait.

    Attributes:
        message_bytes: of the largest message.
        per_client: messages of one client, so that a fast one leaves room for the others.
        total_bytes: of all messages.
    """

    message_bytes: int
    per_client: int
    total_bytes: int

    def __post_init__(self) -> None:
        """Refuse what the broker cannot carry."""
        if self.message_bytes > MAX_PAYLOAD:
            raise InputError(
                f"a message has up to {self.message_bytes} bytes, and the broker carries {MAX_PAYLOAD}: "
                "lower batch_size, or send 16 bits (half)"
            )


def make_streams(link: Link, names: Names, limits: Limits) -> str:
    """Make the run's streams, or see that they are there; return the identity of the stream of messages.

    Raises:
        InputError: the broker refuses them.
    """
    # A full stream refuses what is new; nothing that was accepted is dropped.
    messages: dict[str, Any] = dict(  # the broker's own words
        subjects=[names.messages("*")],
        discard="new",
        discard_new_per_subject=True,
        max_msgs_per_subject=limits.per_client,
        max_bytes=limits.total_bytes,
        max_msg_size=limits.message_bytes,
        deny_delete=True,
        duplicate_window=600 * 10**9,
    )
    state = {"subjects": [names.state], "max_msgs_per_subject": 1, "max_msg_size": 2**20, "max_bytes": 2**22}
    identity = ""
    for stream, config in ((names.state_stream, state), (names.stream, messages)):
        wanted = {"name": stream, "storage": "file", "retention": "limits", "num_replicas": 1, "allow_direct": True}
        wanted |= config
        before = link.api(f"STREAM.INFO.{stream}").get("config")
        identity = before["description"] if before else secrets.token_hex(16)
        if before is None or any(before.get(name) != value for name, value in wanted.items()):
            act = f"STREAM.{'UPDATE' if before else 'CREATE'}.{stream}"
            answer = link.api(act, wanted | {"description": identity})
            if "error" in answer:
                raise InputError(
                    f"{link.address}: stream {stream}: {answer['error'].get('description')}; see its limits"
                )
    return identity


def accounts(certificates: Iterable[Certificate], names: Names) -> dict[str, Any]:
    """Return who may do what, by the certificates that are not revoked; all else is denied.

    The streams belong to the server's account. Every client has an account of its own, into which three things lead:
    to publish on its own subject, to read its own last message, and to read the server's state. Permissions alone would
    not do: the broker answers a published message wherever its sender says, in the sender's account, so that within
    one account a client could have such an answer stored as another's message.
    """
    exports: list[dict[str, Any]] = []
    entries: dict[str, Any] = {"run": {"jetstream": "enabled", "users": [], "exports": exports}}
    for certificate in certificates:
        if certificate.revoked:
            continue
        may: dict[str, Any] = {"subscribe": {"allow": [f"_INBOX.{certificate.party}.>"]}}
        user = {"user": certificate.user, "permissions": may}
        if certificate.client is None:
            may["publish"] = {"allow": ["$JS.API.>", names.state]}
            entries["run"]["users"].append(user)
            continue
        own = names.messages(certificate.client)
        state = f"$JS.API.DIRECT.GET.{names.state_stream}.{names.state}"
        subjects = [own, f"$JS.API.DIRECT.GET.{names.stream}.{own}", state]
        may["publish"] = {"allow": subjects}
        if certificate.party not in entries:
            exports += [{"service": subject, "accounts": [certificate.party]} for subject in subjects[:2]]
            imports = [{"service": {"account": "run", "subject": subject}} for subject in subjects]
            entries[certificate.party] = {"users": [], "imports": imports}
        entries[certificate.party]["users"].append(user)
    exports.append({"service": f"$JS.API.DIRECT.GET.{names.state_stream}.{names.state}"})
    return entries


class Broker:
    """A broker of this machine's own: it outlives whoever started it, and is found again.

    Args:
        folder: where its configuration, log and streams lie, for their owner alone.
        keys: the folder of keys; its list says who is let in.
        run: the run's name.
        limits: of the stream.
        listen: `host:port`; port 0 takes a free one, and keeps it.

    Raises:
        InputError: the program is not installed.
    """

    def __init__(self, folder: Path, keys: Path, run: str, limits: Limits, *, listen: str = "127.0.0.1:0"):
        self.folder, self.keys, self.names, self.limits = folder.resolve(), keys.resolve(), Names(run), limits
        program = which("nats-server") or which("nats-server", path="/usr/sbin:/usr/local/bin")
        if program is None:
            raise InputError("nats-server: not installed; install the package of that name, or give a broker's address")
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._told = 0
        with storage.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        host, _, port = listen.rpartition(":")
        self.host = host or "127.0.0.1"
        self.port = int(port) if port != "0" else self._kept_port()

    def __enter__(self) -> "Broker":
        self.ensure()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Where clients of this machine find it."""
        return f"{'127.0.0.1' if self.host in ('0.0.0.0', '::') else self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process that serves this folder; None if there is none."""
        if self._process is not None:
            self._process.poll()  # a child that died is no process any more
        try:
            process = psutil.Process(int((self.folder / "broker.pid").read_text()))
            ours = str(self._config) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
            return process.pid if ours else None
        except (OSError, ValueError, psutil.Error):
            return None

    def ensure(self) -> None:
        """Start it unless it runs; tell it who is let in if that has changed.

        Raises:
            InputError: it does not start; with the last line of its log.
        """
        pid, listed = self.pid, (self.keys / "issued.json").stat().st_mtime_ns
        if pid is not None and listed == self._told:
            return
        self._told, text = listed, self._configuration()
        if pid is not None and self._config.read_text() == text:
            return
        self.stop()  # clients come back by themselves; what it would keep of old accounts is gone
        storage.write_text(self._config, text)
        self._process = subprocess.Popen(
            [self._program, "-c", str(self._config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if not waited(self._listens, 20.0):
            raise InputError(f"{self.folder}: the broker does not start: {self._last_words()}")

    def stop(self) -> None:
        """End it; what it holds stays on the disk."""
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            waited(lambda: self.pid is None, 10.0)

    @property
    def _config(self) -> Path:
        return self.folder / "broker.conf"

    def _configuration(self) -> str:
        """Return the broker's configuration; JSON is NATS configuration, too."""
        party = self.keys / "server"
        content = {
            "server_name": self.names.stream,
            "listen": f"{self.host}:{self.port}",
            "pid_file": str(self.folder / "broker.pid"),
            "log_file": str(self.folder / "broker.log"),
            "logfile_size_limit": 2**24,
            "max_payload": min(MAX_PAYLOAD, self.limits.message_bytes + 2**16),
            "max_pending": 4 * MAX_PAYLOAD,
            "max_connections": 1024,
            "max_subscriptions": 64,
            "jetstream": {
                "store_dir": str(self.folder / "store"),
                "max_memory_store": 2**20,
                "max_file_store": self.limits.total_bytes + 2**23,
            },
            "tls": {
                "cert_file": str(party / "cert.pem"),
                "key_file": str(party / "key.pem"),
                "ca_file": str(party / "ca.pem"),
                "verify_and_map": True,
                "timeout": 5,
            },
            "authorization": {"timeout": 5},
            "accounts": accounts(issued(self.keys), self.names),
        }
        return json.dumps(content, indent=1)

    def _kept_port(self) -> int:
        """Return the port of an earlier start, for clients know it; else a free one."""
        try:
            return int(json.loads(self._config.read_text())["listen"].rpartition(":")[2])
        except (OSError, ValueError, KeyError):
            with socket.create_server((self.host, 0)) as free:
                return int(free.getsockname()[1])

    def _listens(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise InputError(f"{self.folder}: the broker does not start: {self._last_words()}")
        try:
            with socket.create_connection(self.address.rsplit(":", 1), timeout=1.0):  # type: ignore[arg-type]
                return self.pid is not None
        except OSError:
            return False

    def _last_words(self) -> str:
        try:
            lines = (self.folder / "broker.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return (lines[-1][:200] if lines else "it says nothing") + f"; see {self.folder / 'broker.log'}"
