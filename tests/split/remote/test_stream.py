"""Training on a stream is training in process, whatever clients, server and broker go through."""

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from world import faults, tiny
from world.fuzz import changes, mutations

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.split.client import Client, client_send
from splitlab.split.config import Defences
from splitlab.split.remote.client import join, remote_client
from splitlab.split.remote.server import record_stream
from splitlab.split.remote.status import lines, status
from splitlab.split.remote.trainer import Run, Trainer
from splitlab.split.server import attack_transcript
from splitlab.split.train import make_clients, train
from splitlab.split.wire import from_bytes, read_transcript, to_bytes

WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"
MakeRun = Callable[..., Run]
Serving = Callable[..., Any]


def clients_of(run: Run, private: ImageSet) -> list[Client]:
    return make_clients(run.base, private, run.config)


def messages_of(run: Run, private: ImageSet) -> list[tuple[int, bytes]]:
    """The run's messages as in process: client and bytes, in the order of the steps."""
    clients, n = clients_of(run, private), run.config.n_clients
    return [(k % n, client_send(clients[k % n], k // n, run.config.batch_size)[0]) for k in range(run.config.steps)]


def trained(run: Run, messages: list[tuple[int, bytes]]) -> Trainer:
    trainer = Trainer(run)
    for position, (client, message) in enumerate(messages, 1):
        trainer.receive(position, client, message)
    return trainer


def same_weights(one: Trainer, other: Trainer) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("defences", [Defences(), Defences(symsigmoid=True, feature_noise=0.5, half=True)], ids=str)
def test_one_client_and_a_server_leave_what_training_in_process_leaves(
    base: Base, private: ImageSet, heldout: ImageSet, make_run: MakeRun, serving: Serving, tmp_path: Path,
    defences: Defences,
):  # fmt: skip
    run = make_run(defences=defences)
    train(run.name, run.config, base, private, heldout, out=tmp_path / "inside", cache=tmp_path / "cache")
    server = serving(run)
    (client,) = clients_of(run, private)
    with server.link("client-0") as link:
        assert join(run, client, link) == run.config.steps
    out = server.end()
    for name in (WEIGHTS, "controlnet/config.json"):
        assert (out / name).read_bytes() == (tmp_path / "inside" / name).read_bytes()
    # a safetensors file's own metadata come in any order: compare what is in the transcripts
    ours, theirs = (read_transcript(folder / "transcript.safetensors") for folder in (out, tmp_path / "inside"))
    assert ours.header == theirs.header
    assert [to_bytes(o) for o in ours.observations] == [to_bytes(o) for o in theirs.observations]
    told, said = (json.loads((folder / "record.json").read_text()) for folder in (out, tmp_path / "inside"))
    assert {name: told[name] for name in ("loss", "config", "base")} == {
        name: said[name] for name in ("loss", "config", "base")
    }


def test_two_clients_come_when_they_like_and_the_stream_is_the_transcript(
    base: Base, private: ImageSet, make_run: MakeRun, serving: Serving, tmp_path: Path
):
    run = make_run(n_clients=2, steps=9, record_messages=9)
    server, clients = serving(run), clients_of(run, private)
    with server.link("client-1") as link:
        assert join(run, clients[1], link) == 4
        state = status(run.name, link)
        assert (state["steps"], state["refused"]) == (9, {})
        assert lines(run.name, state)[0].startswith("run tiny: step ")
    with server.link("client-0") as link:  # after the other has gone; more than its half
        join(run, clients[0], link, turns=3)
        join(run, clients[0], link, turns=5)
    out = server.end()
    transcript = read_transcript(out / "transcript.safetensors", base=base)
    sent = [(observation.client, observation.sequence) for observation in transcript.observations]
    assert sent == [(1, turn) for turn in range(4)] + [(0, turn) for turn in range(5)]
    again = trained(run, [(observation.client, to_bytes(observation)) for observation in transcript.observations])
    weights, _ = checkpoint.load(out / WEIGHTS)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    found = attack_transcript(out / "transcript.safetensors", attack="mean_public", base=base, public=private)
    assert found.images is not None
    assert len(found.images) == 9 * run.config.batch_size


def test_what_is_gone_for_good_waits_and_the_rest_goes_on(
    private: ImageSet, make_run: MakeRun, serving: Serving
):  # fmt: skip
    run = make_run(n_clients=2, steps=4)
    server, clients = serving(run), clients_of(run, private)
    with server.link("client-0") as link:
        join(run, clients[0], link)
        until = time.monotonic() + 20
        while status(run.name, link)["step"] < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        join(run, clients[0], link, turns=4)  # in place of the other, who never comes
    server.end()


def test_a_full_stream_makes_clients_wait_and_drops_nothing(
    private: ImageSet, make_run: MakeRun, serving: Serving, tmp_path: Path
):
    run = make_run(n_clients=2, steps=40, checkpoint_every=3, record_messages=0)
    limit = 2 * 4 * run.message_bytes
    seen: list[int] = []
    server = serving(run, keep=False, max_bytes=limit, callback=lambda *_: time.sleep(0.01))
    clients = clients_of(run, private)

    def send(number: int) -> None:
        with server.link(f"client-{number}") as link:
            join(run, clients[number], link)

    threads = [threading.Thread(target=send, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    with server.link("server") as link:
        while any(thread.is_alive() for thread in threads):
            seen.append(link.api("STREAM.INFO.splitlab-tiny").get("state", {"messages": 0})["messages"])
            time.sleep(0.05)
    out = server.end()
    assert max(seen) <= 8
    assert json.loads((out / "record.json").read_text())["messages"] == {"0": 20, "1": 20}


def test_a_stream_that_cannot_hold_the_run_is_refused_at_once(make_run: MakeRun, serving: Serving):
    run = make_run(steps=50)
    with pytest.raises(InputError, match=r"40 messages of each client, and the run has 50; raise max_bytes"):
        serving(run, max_bytes=40 * run.message_bytes).end()


def test_whoever_goes_on_does_so_with_the_same_secret_data_and_settings(
    private: ImageSet, heldout: ImageSet, make_run: MakeRun, serving: Serving, tmp_path: Path
):
    run = make_run(published_key=None, steps=6, batch_size=2)
    server = serving(run)
    client, secret = remote_client(run, 0, private, cache=tmp_path / "hospital")
    kept = secret.with_suffix(".key")
    with server.link("client-0") as link:
        with pytest.raises(InputError, match=r"batch_size is 3 here, 2 at the server"):
            join(make_run(published_key=None), client, link)
        join(run, client, link, turns=2)
        stranger, _ = remote_client(run, 0, private, cache=tmp_path / "elsewhere")
        with pytest.raises(InputError, match=r"turn 1 of client 0 as others made it, with another secret"):
            join(run, stranger, link)
        assert kept.exists()
        again, _ = remote_client(run, 0, private, cache=tmp_path / "hospital")
        assert join(run, again, link, secret=secret) == 4
        assert not kept.exists()  # nobody can repeat its noise any more
    server.end()


def test_a_checkpoint_of_another_stream_is_not_gone_on_from(private: ImageSet, make_run: MakeRun, tmp_path: Path):
    run = make_run()
    trainer = trained(run, messages_of(run, private)[:3])
    trainer.save(tmp_path / "state.safetensors", stream="one")
    with pytest.raises(InputError, match="the broker's stream is not the one"):
        Trainer(run).load(tmp_path / "state.safetensors", stream="another")
    with pytest.raises(InputError, match="with other settings"):
        Trainer(make_run(lr=1e-4)).load(tmp_path / "state.safetensors", stream="one")
    again = Trainer(run)
    again.load(tmp_path / "state.safetensors", stream="one")
    assert (again.position, again.turns[0], again.losses) == (3, 3, trainer.losses)


def hostile(run: Run, good: bytes, draw: random.Random) -> bytes:
    """Change one message so that no client of the run can have sent it in this turn."""
    seen = from_bytes(good)
    kinds: list[Callable[[], bytes]] = [
        lambda: good[: draw.randrange(len(good))],
        lambda: good + bytes(draw.randrange(1, run.message_bytes)),
        lambda: to_bytes(replace(seen, sequence=seen.sequence + draw.choice([1, 7, 2**40]))),
        lambda: to_bytes(replace(seen, client=draw.choice([1, 5]))),
        lambda: to_bytes(seen.changed(timesteps=seen.need("timesteps") + draw.choice([-1000, 1000]))),
        lambda: to_bytes(seen.map(lambda t: t[:1])),
        lambda: to_bytes(seen.map(lambda t: torch.cat([t, t]))),
        lambda: to_bytes(seen.without(draw.choice(["noise", "smashed", "timesteps", "noisy_latents"]))),
        lambda: to_bytes(seen.changed(noise=seen.need("noise").double())),
        lambda: to_bytes(seen.changed(noise=seen.need("noise")[:, :, :1])),
        lambda: to_bytes(seen.changed(noise_pred=seen.need("noise").clone())),
        lambda: to_bytes(seen.changed(noise=seen.need("noise") * 1e30)),
        lambda: to_bytes(seen.changed(smashed=torch.full_like(seen.need("smashed"), draw.choice([3e38, torch.nan])))),
    ]
    return draw.choice(kinds)()


def test_hostile_messages_are_refused_counted_and_leave_no_trace(private: ImageSet, make_run: MakeRun):
    run, draw = make_run(defences=Defences(timestep_floor=600), steps=4), random.Random(0)
    good = messages_of(run, private)
    undisturbed, trainer, position = trained(run, good), Trainer(run), 0
    for client, message in good:
        for _ in range(100):
            position += 1
            assert not trainer.receive(position, client, hostile(run, message, draw)), "an attacker's message is in"
        position += 1
        assert trainer.receive(position, client, message), trainer.reasons[-1]
    assert (trainer.step, trainer.refused[0]) == (4, 400)
    assert len(trainer.reasons) == 100
    assert same_weights(trainer, undisturbed)


def test_no_change_of_a_message_ends_the_training(private: ImageSet, make_run: MakeRun):
    run, draw = make_run(steps=10**6), random.Random(1)
    (client, message), *_ = messages_of(make_run(), private)
    trainer = Trainer(run)
    for position in range(1, 201):
        changed = draw.choice([mutations.mutated, changes.changed_tensors])(message, draw)
        if trainer.receive(position, client, changed):  # changed values are values, too
            trainer.turns[client] = 0
    assert trainer.step + trainer.refused[0] == 200
    assert trainer.refused[0] > 100
    assert all(torch.isfinite(value).all() for value in trainer.state_dict().values())


def test_a_replayed_turn_is_refused_by_its_number(private: ImageSet, make_run: MakeRun):
    run = make_run()
    (client, first), *_ = messages_of(run, private)
    trainer = trained(run, [(client, first), (client, first)])
    assert (trainer.step, trainer.position, trainer.refused[0]) == (1, 2, 1)
    assert trainer.reasons[-1][2].startswith("turn 0 was sent before: 1 is next")


@pytest.mark.slow
def test_weights_survive_a_dozen_kills_of_client_server_and_broker(
    nats_server: None, base_path: Path, tmp_path: Path
):  # fmt: skip
    config = tiny.config(n_clients=2, steps=240, published_key=None, checkpoint_every=3)  # no kill comes after the end
    rows = faults.storm(faults.Scene(base_path, tmp_path, config, tiny.SIZE, pace_s=0.03), 12)
    assert len(rows) == 13
    assert {row["party"] for row in rows[:-1]} >= {"server", "broker"}
    told = {name: rows[-1][name] for name in ("steps", "bit_identical", "every_message_once", "refused")}
    assert told == {"steps": 240, "bit_identical": True, "every_message_once": True, "refused": 0}


def test_a_whole_stream_is_written_as_a_transcript_that_trains_to_the_same_weights(
    private: ImageSet, make_run: MakeRun, serving: Serving, keys: Path, tmp_path: Path
):
    run = make_run(steps=5, record_messages=1)
    server = serving(run, callback=lambda *_: time.sleep(0.2))
    (client,) = clients_of(run, private)
    with server.link("client-0") as link:
        join(run, client, link)
    state, path = tmp_path / "remote" / "state.safetensors", tmp_path / "whole.safetensors"
    with server.link("server") as link:
        while not state.exists():
            time.sleep(0.01)
        record_stream(link, run, state, path)
    server.end()
    assert len(read_transcript(path).observations) >= run.config.checkpoint_every
