"""A run between machines, on this one: keys, a broker, and links to it."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from world import tiny

from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.split.remote.broker import Broker, Limits
from splitlab.split.remote.keys import make_keys
from splitlab.split.remote.link import Link, waited
from splitlab.split.remote.server import serve
from splitlab.split.remote.trainer import Run

PARTIES = ("server", "client-0", "client-1")


@pytest.fixture
def nats_server() -> None:
    if not which("nats-server", path="/usr/sbin:/usr/local/bin:/usr/bin"):
        pytest.skip("nats-server is not installed: apt-get install nats-server")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "keys"
    make_keys(folder, PARTIES)
    return folder


@pytest.fixture
def make_run(base: Base, private: ImageSet) -> Callable[..., Run]:
    return lambda **changes: Run("tiny", tiny.config(**changes), base, private.size)


@pytest.fixture
def broker(nats_server: None, tmp_path: Path, keys: Path, make_run: Callable[..., Run]) -> Iterator[Broker]:
    with Broker(tmp_path / "broker", keys, "tiny", Limits(make_run().message_bytes, 1000, 2**28)) as running:
        yield running


class Serving:
    """A server in a thread of its own."""

    def __init__(self, run: Run, keys: Path, folder: Path, **options: Any):
        self.folder, self.keys, self.error = folder, keys, None
        self._thread = threading.Thread(target=self._serve, args=(run, options), daemon=True)
        self._thread.start()
        assert waited(lambda: (folder / "remote" / "address").exists() or self.error is not None, 30.0)

    def _serve(self, run: Run, options: dict[str, Any]) -> None:
        try:
            serve(run, self.keys, out=self.folder / "out", folder=self.folder / "remote", **options)
        except BaseException as error:
            self.error = error

    def link(self, party: str) -> Link:
        address = (self.folder / "remote" / "address").read_text().strip()
        return Link(address, self.keys / party, patience_s=10.0)

    def end(self) -> Path:
        self._thread.join(60.0)
        assert not self._thread.is_alive(), "the server did not end"
        if self.error:
            raise self.error
        return self.folder / "out"


@pytest.fixture
def serving(nats_server: None, tmp_path: Path, keys: Path) -> Callable[..., Serving]:
    return lambda run, **options: Serving(run, keys, tmp_path, **options)
