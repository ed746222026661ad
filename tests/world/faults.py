"""Kill client, server and broker at random while they train between machines, and compare every bit in the end.

Two clients train; whoever is killed is started again at once. In the end the weights must be those of training on the
recorded stream without any kill, and every turn of every client must have been applied once.
`benchmarks/remote_faults.py` does so for longer.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PARTIES = ("client-0", "client-1", "server", "broker")


def started(target: Any, *args: Any) -> BaseProcess:
    """Start a process that has imported all it needs: hundreds of starts, one import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["splitlab.split.remote.server", "splitlab.split.remote.client"])
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


@dataclass(frozen=True)
class Scene:
    """A run between processes of this machine.

    Attributes:
        base: folder of the base model.
        folder: where everything of the run lies.
        config: the run.
        size: image height and width.
        pace_s: seconds that all pause after each step, so that there is time for faults.
        keep: whether the stream keeps what was trained on.
        max_bytes: what the stream may hold.
    """

    base: Path
    folder: Path
    config: Any
    size: int
    pace_s: float = 0.0
    keep: bool = True
    max_bytes: int = 2**30

    def run(self) -> Any:
        """Return the run as each process makes it."""
        import torch

        from splitlab.diffusion.base import load_base
        from splitlab.split.remote.trainer import Run

        torch.set_num_threads(1)
        return Run("faults", self.config, load_base(self.base), self.size)

    def address(self) -> str:
        """Wait for the broker's address."""
        path = self.folder / "remote" / "address"
        while not path.exists():
            time.sleep(0.01)
        return path.read_text().strip()


def serve_in(scene: Scene) -> None:
    """Be the server."""
    from splitlab.split.remote.server import serve

    marks = scene.folder / "marks"

    def callback(what: str, done: int, total: int, loss: float) -> None:
        marks.write_text(str(done))
        time.sleep(scene.pace_s)

    options = {"out": scene.folder / "out", "folder": scene.folder / "remote"}
    options |= {"keep": scene.keep, "max_bytes": scene.max_bytes, "callback": callback}
    serve(scene.run(), scene.folder / "keys", **options)


def join_in(scene: Scene, number: int) -> None:
    """Be a client: the number of shapes is the same for all, the shapes are its own."""
    import numpy as np

    from splitlab.data.generate import shapes
    from splitlab.data.image_set import image_set
    from splitlab.split.remote.client import join, remote_client
    from splitlab.split.remote.link import Link

    drawn = list(shapes(16, np.random.default_rng(number), f"client{number}", scene.size))
    images = np.stack([sample.image for sample in drawn])
    hints = np.stack([np.repeat(sample.hint[..., None], 3, axis=2) for sample in drawn])
    private = image_set(images, hints, [sample.text for sample in drawn], [sample.source for sample in drawn])
    run, keys = scene.run(), scene.folder / "keys" / f"client-{number}"
    client, secret = remote_client(run, number, private, cache=scene.folder / f"client-{number}")
    with Link(scene.address(), keys, patience_s=120.0) as link:
        join(run, client, link, secret=secret, callback=lambda *_: time.sleep(scene.pace_s))


def storm(scene: Scene, kills: int, seed: int = 0, pause_s: Sequence[float] = (0.02, 0.6)) -> list[dict[str, Any]]:
    """Run the scene under kills; return one row per kill, and raise if the end is not what it should be."""
    from splitlab.split.remote.keys import make_keys

    make_keys(scene.folder / "keys", ["server", "client-0", "client-1"])
    chance = random.Random(seed)
    roles = {"server": (serve_in, scene), "client-0": (join_in, scene, 0), "client-1": (join_in, scene, 1)}
    running = {party: started(*role) for party, role in roles.items()}
    rows: list[dict[str, Any]] = []
    marks, began = scene.folder / "marks", time.monotonic()
    while running["server"].exitcode != 0:
        for party, process in list(running.items()):
            if process.exitcode is not None and process.exitcode != 0:
                assert process.exitcode == -signal.SIGKILL, f"{party} ended with {process.exitcode}"
                running[party] = started(*roles[party])
        if len(rows) < kills and marks.exists():
            time.sleep(chance.uniform(*pause_s))
            party = PARTIES[len(rows) % len(PARTIES)]
            pid = _broker_pid(scene) if party == "broker" else running[party].pid
            alive = party == "broker" or running[party].exitcode is None
            if pid is None or not alive:
                party, pid = "server", running["server"].pid
            if running["server"].exitcode is not None:
                continue
            before = int(marks.read_text() or 0)
            os.kill(pid or 0, signal.SIGKILL)
            rows.append({"kill": len(rows) + 1, "party": party, "step": before, "restart_s": ""})
            if party == "server":
                running[party].join()
                marks.unlink()
                again = time.monotonic()
                running[party] = started(*roles[party])
                while not (marks.exists() and marks.read_text()) and running[party].exitcode is None:
                    time.sleep(0.005)
                rows[-1]["restart_s"] = round(time.monotonic() - again, 3)
        time.sleep(0.01)
    for process in running.values():
        process.join()
    rows.append({"kill": "all", "party": "", "step": "", "restart_s": ""} | verdict(scene))
    rows[-1]["wall_s"] = round(time.monotonic() - began, 1)
    return rows


def _broker_pid(scene: Scene) -> int | None:
    try:
        pid = int((scene.folder / "remote" / "broker" / "broker.pid").read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def verdict(scene: Scene) -> dict[str, Any]:
    """Train again on what the stream recorded, in process and undisturbed, and compare with what the storm left."""
    import torch

    from splitlab.core import checkpoint
    from splitlab.split.remote.broker import Broker, Limits
    from splitlab.split.remote.link import Link
    from splitlab.split.remote.server import recorded
    from splitlab.split.remote.trainer import Trainer
    from splitlab.split.wire import from_bytes

    run, state = scene.run(), scene.folder / "remote" / "state.safetensors"
    stormed, calm = Trainer(run), Trainer(run)
    stormed.load(state)
    limits = Limits(run.message_bytes, 10**6, scene.max_bytes)
    keys = scene.folder / "keys"
    with (
        Broker(scene.folder / "remote" / "broker", keys, run.name, limits) as broker,
        Link(broker.address, keys / "server", patience_s=20.0) as link,
    ):
        messages = list(recorded(link, run, stormed.positions))
    for position, message in enumerate(messages, 1):
        assert calm.receive(position, from_bytes(message).client, message)
    sent = [(observation.client, observation.sequence) for observation in map(from_bytes, messages)]
    weights, _ = checkpoint.load(scene.folder / "out" / "controlnet" / "diffusion_pytorch_model.safetensors")
    same = all(torch.equal(value, weights[name]) for name, value in calm.state_dict().items())
    every = {(client, turn) for client in range(scene.config.n_clients) for turn in range(run.turns(client))}
    return {
        "steps": stormed.step,
        "bit_identical": same and stormed.losses == calm.losses,
        "every_message_once": len(set(sent)) == len(sent) and set(sent) == every,
        "refused": sum(stormed.refused.values()),
    }
