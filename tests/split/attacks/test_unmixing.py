"""Key mixing undone: sources come back under fixed and fresh keys; nothing comes back from noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.data.image_set import ImageSet, load
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, load_base
from splitlab.split.attacks.unmixing import fast_ica
from splitlab.split.client import client_send
from splitlab.split.config import Defences, TrainConfig
from splitlab.split.defences.keys import mixing_key
from splitlab.split.messages import Truth
from splitlab.split.server import attack_transcript, make_knowledge, run_attack
from splitlab.split.train import make_clients
from splitlab.split.wire import Header, Transcript, from_bytes

GROUP = 16
FIXED = Defences(key_mixing=GROUP)
N_MESSAGES = 4

pytestmark = pytest.mark.skipif(
    not (ROOT / "models/base/model_index.json").exists() or not (ROOT / "data/public").exists(),
    reason="the shipped base model or data are missing; `make data` pulls them",
)


@pytest.fixture(scope="module")
def shipped() -> Base:
    return load_base(ROOT / "models/base")


@pytest.fixture(scope="module")
def public() -> ImageSet:
    return load(ROOT / "data/public/shapes.zip", limit=400)


@pytest.fixture(scope="module")
def victims() -> ImageSet:
    return load(ROOT / "data/private/shapes.zip", limit=128)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def record(base: Base, victims: ImageSet, defences: Defences, n_clients: int = 1) -> tuple[Transcript, Truth]:
    config = TrainConfig(defences=defences, n_clients=n_clients, published_key=0)
    clients = make_clients(base, victims, config)
    sent = [client_send(clients[i % n_clients], i // n_clients, 32) for i in range(N_MESSAGES)]
    header = Header("test", "shapes", "split", defences, victims.size, base.digest, n_clients)
    truths = [truth for _, truth in sent]
    columns = {name: torch.cat([getattr(t, name) for t in truths]) for name in ("indices", "timesteps", "noise")}
    return Transcript(header, tuple(from_bytes(message) for message, _ in sent)), Truth(**columns)


def matched_psnr(images: Tensor | None, truth: Tensor) -> float:
    """Mean PSNR, dB, under the best assignment within each group, the same for every attack."""
    assert images is not None
    values = []
    for found, wanted in zip(images.split(GROUP), truth.split(GROUP), strict=True):
        places, order = linear_sum_assignment(torch.cdist(wanted.flatten(1), found.flatten(1)).square().numpy())
        values.append(metrics.psnr_db(found[order], wanted[places]))
    return float(torch.cat(values).mean())


def test_fast_ica_finds_the_key_up_to_the_order() -> None:
    draw = tiny.draw(3)
    sources = -torch.rand(5, 20_000, generator=draw).log() * torch.randn(5, 20_000, generator=draw).sign()
    key = mixing_key(5, draw)
    unmixer = fast_ica(key @ sources, draw)
    gains = unmixer @ key
    gains = gains / gains.abs().amax(1, keepdim=True)
    assert gains.abs().round().sum(0).tolist() == [1.0] * 5  # a permutation
    assert gains.abs().sort(1).values[:, :-1].max() < 0.05  # 20,000 samples: interference below 5 %


@pytest.mark.parametrize(
    ("defences", "n_clients", "gain_db"),
    [
        (FIXED, 1, 12.0),
        (replace(FIXED, symsigmoid=True, half=True, timestep_floor=200, hide_prompts=True), 2, 10.0),
        (replace(FIXED, fresh_keys=True), 1, 6.0),
    ],
    ids=str,
)
def test_sources_come_back(
    shipped: Base,
    public: ImageSet,
    victims: ImageSet,
    cache: Path,
    defences: Defences,
    n_clients: int,
    gain_db: float,
) -> None:
    transcript, truth = record(shipped, victims, defences, n_clients)
    found, guess, naive = (
        attack_transcript(transcript, attack=name, base=shipped, public=public, cache=cache)
        for name in ("unmixing", "mean_public", "closed_form")
    )
    images, hints = victims.images[truth.indices], victims.hints[truth.indices]
    reached = matched_psnr(found.images, images)
    assert reached > matched_psnr(guess.images, images) + gain_db
    assert reached > matched_psnr(naive.images, images) + gain_db - 3.0
    assert matched_psnr(found.hints, hints) > matched_psnr(guess.hints, hints) + gain_db - 5.0


@pytest.mark.parametrize("fresh", [False, True])
def test_noise_gives_nothing_and_runs_repeat_and_inputs_stay(
    shipped: Base, public: ImageSet, victims: ImageSet, cache: Path, fresh: bool
) -> None:
    transcript, truth = record(shipped, victims, replace(FIXED, fresh_keys=fresh))
    draw = tiny.draw(7)
    noised = tuple(
        o.map(lambda v: torch.randn(v.shape, generator=draw) if v.is_floating_point() else v)
        for o in transcript.observations[:2]
    )
    before = [{name: value.clone() for name, value in o.tensors.items()} for o in noised]
    knowledge = make_knowledge(transcript, shipped, public, cache=cache)
    found, again = (run_attack("unmixing", noised, knowledge, generator=tiny.draw()) for _ in range(2))
    guess = run_attack("mean_public", noised, knowledge, generator=tiny.draw())
    images = victims.images[truth.indices[:64]]
    assert matched_psnr(found.images, images) < matched_psnr(guess.images, images) + 0.5
    assert torch.equal(torch.as_tensor(found.images), torch.as_tensor(again.images))
    for observation, tensors in zip(noised, before, strict=True):
        assert all(torch.equal(observation.tensors[name], value) for name, value in tensors.items())


def test_refusals_say_why(shipped: Base, public: ImageSet, victims: ImageSet) -> None:
    transcript, _ = record(shipped, victims, FIXED)
    run: dict[str, Any] = {"attack": "unmixing", "base": shipped, "public": public}
    with pytest.raises(InputError, match="key_mixing, which is not on here: use closed_form"):
        attack_transcript(transcript, **run, ignore=("defences",))
    with pytest.raises(InputError, match="carries no noise"):
        attack_transcript(transcript, **run, ignore=("noise",))
    both = replace(transcript, header=replace(transcript.header, defences=replace(FIXED, patch_shuffle=2)))
    with pytest.raises(InputError, match="cannot undo patch_shuffle"):
        attack_transcript(both, **run)
    cut = tuple(o.map(lambda v: v[:20]) for o in transcript.observations)
    with pytest.raises(InputError, match="has 20 samples, not whole groups of key_mixing 16"):
        attack_transcript(replace(transcript, observations=cut), **run)
