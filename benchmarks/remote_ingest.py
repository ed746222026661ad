"""Measure what goes between machines, over loopback and mutual TLS: reports/metrics/remote_ingest.csv.

    python benchmarks/remote_ingest.py [MB]

Three tables. *ingest*: messages of 0.1, 1, 6 and 8 MB, acknowledged one after the other by each of two clients,
and read in order by a server that does nothing else, MB/s. *training*: a run of S1 on the shipped base, its messages
already in the stream, against the same run in process, steps per second. *restart*: seconds from a start of the server
on a checkpoint, its modules loaded, to the first message that it applies.
"""

import csv
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from splitlab.core.paths import CACHE, ROOT
from splitlab.diffusion.base import load_base
from splitlab.params import load_params, load_split
from splitlab.split.config import TrainConfig
from splitlab.split.remote.broker import Broker, Limits, Names, make_streams
from splitlab.split.remote.client import join
from splitlab.split.remote.keys import make_keys
from splitlab.split.remote.link import Link
from splitlab.split.remote.server import serve
from splitlab.split.remote.trainer import Run
from splitlab.split.schemes import make_scheme
from splitlab.split.train import _processor, learning_rate, make_clients

SIZES_MB = (0.1, 1.0, 6.0, 8.0)
CLIENTS = 2
TOTAL = 2**33


@contextmanager
def opened(folder: Path, message_bytes: int) -> Iterator[tuple[str, Path]]:
    """Run a broker with a stream; give its address and the keys."""
    keys = folder / "keys"
    make_keys(keys, ["server", *(f"client-{number}" for number in range(CLIENTS))])
    limits = Limits(message_bytes, 10**6, TOTAL)
    with Broker(folder / "broker", keys, "bench", limits) as broker:
        with Link(broker.address, keys / "server") as link:
            make_streams(link, Names("bench"), limits)
        yield broker.address, keys


def ingest(size_mb: float, total_mb: float) -> dict[str, float]:
    """Publish and then read `total_mb` in messages of one size."""
    size, names = int(size_mb * 1e6), Names("bench")
    count = max(4, int(total_mb / size_mb / CLIENTS))
    contents = [os.urandom(size) for _ in range(4)]
    with tempfile.TemporaryDirectory() as place, opened(Path(place), size + 1024) as (address, keys):

        def publish(number: int) -> None:
            with Link(address, keys / f"client-{number}") as link:
                for turn in range(count):
                    answer = json.loads(link.request(names.messages(number), contents[turn % 4]).data)
                    assert "error" not in answer, answer

        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(publish, range(CLIENTS)))
        published = time.perf_counter() - began
        with Link(address, keys / "server") as link:
            began, ahead = time.perf_counter(), max(1, min(16, 2**25 // size))
            waiting = [link.later(link.at(names.stream, k)) for k in range(1, ahead + 1)]
            for position in range(1, CLIENTS * count + 1):
                assert waiting.pop(0).result() is not None
                if position + ahead <= CLIENTS * count:
                    waiting.append(link.later(link.at(names.stream, position + ahead)))
            consumed = time.perf_counter() - began
    moved = CLIENTS * count * size_mb
    return {"publish_mb_s": round(moved / published, 1), "consume_mb_s": round(moved / consumed, 1)}


def training(steps: int) -> dict[str, float]:
    """Train in process and on a stream that is full already; restart once in the middle."""
    params = load_params()
    base = load_base(params["base"]["source"])
    config = TrainConfig("shapes", steps=steps, batch_size=8, published_key=0, checkpoint_every=steps // 2)
    private = load_split("shapes", "private", params)
    (client,) = clients = make_clients(base, private, config, cache=CACHE)
    scheme = make_scheme(base, config, clients, private.need_hints())
    began = time.perf_counter()
    for number in range(steps):
        scheme.step(number, learning_rate(number, config))
    inside = steps / (time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_keys(folder / "keys", ["server", "client-0"])
        run = Run("bench", config, base, private.size)
        times: list[float] = []

        def stop_at(last: int) -> None:
            def callback(what: str, done: int, total: int, loss: float) -> None:
                times.append(time.perf_counter())
                if done == last:
                    raise KeyboardInterrupt

            options = {"out": folder / "out", "folder": folder / "remote", "callback": callback}
            serve(run, folder / "keys", **options)

        def send() -> None:
            while not (folder / "remote" / "address").exists():
                time.sleep(0.01)
            with Link((folder / "remote" / "address").read_text().strip(), folder / "keys" / "client-0") as link:
                join(run, client, link)

        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(send)
            with suppress(KeyboardInterrupt):
                stop_at(steps // 2 + 1)
            again = time.perf_counter()
            times.clear()
            stop_at(0)
            sent.result()
        outside = (len(times) - 1) / (times[-1] - times[0])
    values = {"in_process_steps_s": inside, "remote_steps_s": outside, "share": outside / inside}
    return {name: round(value, 3) for name, value in (values | {"restart_s": times[0] - again}).items()}


def main() -> None:
    """Measure, and write the table."""
    total_mb = float(sys.argv[1]) if len(sys.argv) > 1 else 400.0
    torch.set_num_threads(1)
    machine = f"{os.cpu_count()} cores, {_processor()}, load {os.getloadavg()[0]:.1f}"
    rows = []
    for size_mb in SIZES_MB:
        for what, value in ingest(size_mb, total_mb).items():
            rows.append(("ingest", size_mb, what, value))
    rows += [("training", "", what, value) for what, value in training(120).items()]
    path = ROOT / "reports" / "metrics" / "remote_ingest.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("table", "message_mb", "measure", "value", "date", "machine"))
        writer.writerows((*row, datetime.date.today().isoformat(), machine) for row in rows)
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
