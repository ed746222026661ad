"""A malicious server on conventional split learning: what it returns, what it learns, and where it has no lever."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_bytes
from world import tiny

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base
from splitlab.split.attacks.hijacking import hijacking
from splitlab.split.config import Defences, TrainConfig
from splitlab.split.hijacker import FEATURE_STD, HijackingServer, Pilot, _statistics, hijacking_networks
from splitlab.split.messages import Knowledge, Observation
from splitlab.split.schemes import Scheme, make_scheme
from splitlab.split.server import attack_transcript
from splitlab.split.train import make_clients, train
from splitlab.split.wire import from_bytes, read_transcript, to_bytes


@pytest.fixture(scope="module")
def public() -> ImageSet:
    return tiny.small_set(256, seed=5)


@pytest.fixture(scope="module")
def victims() -> ImageSet:
    return tiny.small_set(100, seed=6)


def hijack(**changes: object) -> TrainConfig:
    return tiny.config(**({"scheme": "split_gradients", "server": "hijack"} | changes))


def built(base: Base, private: ImageSet, config: TrainConfig, public: ImageSet | None = None) -> Scheme:
    return make_scheme(base, config, make_clients(base, private, config), private.hints, public=public)


def knowing(base: Base, public: ImageSet, server: dict[str, torch.Tensor]) -> Knowledge:
    return Knowledge(base, "split_gradients", Defences(), tiny.SIZE, public, server=server)


def content(message: bytes) -> tuple[dict[str, object], bytes]:
    """Return a message's header and payload; safetensors writes the header's keys in any order."""
    length = int.from_bytes(message[:8], "little")
    return json.loads(message[8 : 8 + length]), message[8 + length :]


def identified(hints: torch.Tensor, victims: ImageSet) -> float:
    gallery_indices = metrics.draw_galleries(len(victims), torch.arange(len(hints)), len(victims), tiny.draw())
    return metrics.identified(hints, victims.hints, gallery_indices).float().mean().item()


@pytest.mark.parametrize("half", [False, True])
def test_its_reply_looks_like_an_honest_one(base: Base, private: ImageSet, public: ImageSet, half: bool) -> None:
    replies = {}
    for server in ("honest", "hijack"):
        scheme = built(base, private, hijack(server=server, defences=Defences(half=half)), public)
        step = scheme.step(0, 1e-3)
        _, down = scheme._answer(step.message, 1e-3)
        replies[server] = {name: (value.shape, value.dtype) for name, value in load_bytes(down).items()}
        assert step.down_bytes == len(down)
    assert replies["hijack"] == replies["honest"]


def test_clients_learn_from_it_and_the_controlnet_does_not(base: Base, private: ImageSet, public: ImageSet) -> None:
    scheme = built(base, private, hijack(), public)
    before = {name: value.clone() for name, value in scheme.controlnet().state_dict().items()}
    for number in range(2):
        scheme.step(number, 1e-3)
    changed = {name for name, value in scheme.controlnet().state_dict().items() if not torch.equal(before[name], value)}
    assert changed
    assert all(name.startswith("controlnet_cond_embedding") for name in changed)


def test_it_sees_only_bytes_and_of_them_only_smashed(base: Base, public: ImageSet) -> None:
    smashed = torch.randn(3, 16, 4, 4, generator=tiny.draw())
    bare = Observation(0, 0, smashed=smashed)
    full = Observation(
        0, 0, torch.zeros(3, dtype=torch.int64), torch.randn(3, 4, 4, 4), smashed, torch.ones(3, 4, 4, 4)
    )
    replies = [HijackingServer(base, public, steps=4, seed=0).receive(to_bytes(sent)) for sent in (bare, full)]
    assert replies[0] == replies[1]
    with pytest.raises(InputError, match="carries no smashed"):
        HijackingServer(base, public, steps=4, seed=0).receive(to_bytes(full.without("smashed")))


def test_its_gradient_takes_features_to_the_pilots_statistics(base: Base, public: ImageSet) -> None:
    server = HijackingServer(base, public, steps=40, seed=0)
    smashed = 0.01 * torch.randn(16, 16, 4, 4, generator=tiny.draw())
    wanted = _statistics(server.networks.pilot(public.hints))[1]

    def mismatch() -> float:
        return ((_statistics(smashed)[1] - wanted).norm() / wanted.norm()).item()

    before = mismatch()
    for _ in range(40):
        gradient = load_bytes(server.receive(to_bytes(Observation(0, 0, smashed=smashed))))["gradient"]
        smashed = smashed - 0.05 * gradient.sign()
    assert mismatch() < 0.7 * before


def test_its_decoder_finds_hints_in_the_pilots_features_and_none_in_noise(
    base: Base, public: ImageSet, victims: ImageSet
) -> None:
    server = HijackingServer(base, public, steps=100, seed=0, noise=0.2, statistics=0.0)
    with torch.no_grad():
        hijacked = server.networks.pilot(victims.hints)  # what a perfectly hijacked client sends
    for number in range(100):
        server.receive(to_bytes(Observation(0, number, smashed=hijacked[number % 6 * 16 :][:16])))
    knowledge = knowing(base, public, server.networks.state_dict())
    told: list[tuple[str, int, int]] = []
    found = hijacking(
        [Observation(0, 0, smashed=hijacked)], knowledge, generator=tiny.draw(), batch=64,
        callback=lambda *now: told.append(now[:3]),
    )  # fmt: skip
    assert told == [("hijacking", 1, 2), ("hijacking", 2, 2)]
    assert (found.images, found.used) == (None, ("smashed",))
    assert identified(found.hints, victims) > 0.8
    mean = public.hints.mean(0, keepdim=True).expand_as(victims.hints)
    assert metrics.psnr_db(found.hints, victims.hints).mean() > metrics.psnr_db(mean, victims.hints).mean() + 2

    noise = FEATURE_STD * torch.randn(hijacked.shape, generator=tiny.draw(1))
    blind = hijacking([Observation(0, 0, smashed=noise)], knowledge, generator=tiny.draw())
    assert identified(blind.hints, victims) < 0.1
    assert metrics.mse(blind.hints, victims.hints).mean() > metrics.mse(mean, victims.hints).mean()


def test_the_pilot_keeps_position_and_can_be_undone(public: ImageSet) -> None:
    pilot = Pilot(32, 4, sigmas=(0.7, 2.0))
    pilot.fit(public.hints)
    features = pilot(public.hints)
    assert features.shape == (256, 32, 4, 4)
    for band in features.split(16, 1):
        assert band.mean().abs() < 1e-4
        assert band.std().item() == pytest.approx(FEATURE_STD, rel=1e-3)
    point = torch.full((1, 3, 16, 16), -1.0)
    point[..., 9, 6] = 1.0  # cell (2, 1), pixel (1, 2) of it
    sharp = pilot(point)[0, :16]
    assert sharp.argmax() == torch.tensor([(4 * 1 + 2) * 16 + 2 * 4 + 1])


@pytest.mark.parametrize(("n_channels", "factor", "cell"), [(16, 4, 4), (20, 4, 4), (8, 4, 2), (320, 8, 8), (3, 8, 1)])
def test_the_pilot_fits_any_cut_layer(n_channels: int, factor: int, cell: int) -> None:
    pilot = Pilot(n_channels, factor, sigmas=(0.7, 2.0))
    assert pilot.cell == cell
    hints = tiny.small_set(4).hints
    assert pilot(hints).shape == (4, n_channels, 16 // factor, 16 // factor)


def test_an_interrupted_hijacking_ends_as_if_it_had_not_been(
    base: Base, private: ImageSet, heldout: ImageSet, public: ImageSet, tmp_path: Path
) -> None:
    def go(name: str, at: int = 0) -> dict[str, bytes]:
        def stop(what: str, now: int, total: int, loss: float) -> None:
            if now == at:
                raise KeyboardInterrupt

        out, cache = tmp_path / name, tmp_path / f"cache-{name}"
        config = hijack(eval_samples=1)
        train("a run", config, base, private, heldout, out=out, cache=cache, public=public, callback=stop)
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}

    whole = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("resumed", at=5)
    assert go("resumed") == whole
    assert "server.safetensors" in whole

    server, _ = checkpoint.load(tmp_path / "whole" / "server.safetensors")
    assert server["n_received"] == 6
    transcript = read_transcript(tmp_path / "whole" / "transcript.safetensors")
    found = attack_transcript(transcript, attack="hijacking", base=base, public=public, server=server)
    assert found.hints.shape == (12, 3, tiny.SIZE, tiny.SIZE)


def test_bad_calls_say_what_to_do(base: Base, private: ImageSet, public: ImageSet) -> None:
    with pytest.raises(InputError, match="learns from public data, and none were given"):
        built(base, private, hijack())
    sent = [Observation(0, 0, smashed=torch.zeros(2, 16, 4, 4))]
    with pytest.raises(InputError, match="this run's was honest"):
        hijacking(sent, knowing(base, public, {}), generator=tiny.draw())
    other = hijacking_networks(base, 2 * tiny.SIZE).state_dict()
    with pytest.raises(InputError, match="do not fit this base model and image size"):
        hijacking(sent, knowing(base, public, other), generator=tiny.draw())
    server = hijacking_networks(base, tiny.SIZE).state_dict()
    lacking = [Observation(0, 0, timesteps=torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(InputError, match="carries no smashed"):
        hijacking(lacking, knowing(base, public, server), generator=tiny.draw())


def test_on_split_a_server_has_no_lever(base: Base, private: ImageSet) -> None:
    """S1's clients send the same bytes whatever the server computes: nothing it makes reaches them."""
    config = tiny.config(scheme="split", n_clients=2)
    honest = built(base, private, config)
    hostile = built(base, private, config)
    with torch.no_grad():
        for weight in hostile.modules["controlnet"].parameters():
            weight.copy_(torch.randn(weight.shape, generator=tiny.draw()))
    for number in range(4):
        one, other = honest.step(number, 1e-3), hostile.step(number, 0.5)
        assert one.loss != other.loss
        assert content(one.message) == content(other.message)
        assert one.down_bytes == other.down_bytes == 0


def test_on_split_gradients_the_same_server_has_one(base: Base, private: ImageSet, public: ImageSet) -> None:
    # what makes the test above able to fail
    honest, hostile = (built(base, private, hijack(server=server), public) for server in ("honest", "hijack"))
    messages = [[scheme.step(number, 1e-3).message for number in range(2)] for scheme in (honest, hostile)]
    assert content(messages[0][0]) == content(messages[1][0])  # nothing has come back yet
    first, second = (from_bytes(sent[1]).need("smashed") for sent in messages)
    assert not torch.equal(first, second)


def test_hijacking_is_refused_where_nothing_is_returned() -> None:
    for scheme in ("split", "u_shaped", "central", "federated"):
        with pytest.raises(InputError, match="has no lever"):
            TrainConfig(scheme=scheme, server="hijack")
