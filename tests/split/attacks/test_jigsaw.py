"""Patch shuffling undone: the permutation comes back, fixed or fresh; nothing comes back from noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.data.image_set import ImageSet, load
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, encoded, load_base
from splitlab.split.attacks.jigsaw import place_by_moments
from splitlab.split.client import client_send
from splitlab.split.config import Defences, TrainConfig
from splitlab.split.defences.keys import from_patches, to_patches
from splitlab.split.messages import Truth
from splitlab.split.server import attack_transcript, make_knowledge, run_attack
from splitlab.split.train import make_clients
from splitlab.split.wire import Header, Transcript, from_bytes

FIXED = Defences(patch_shuffle=2)
FRESH = replace(FIXED, fresh_keys=True)
QUICK = {"steps": 150, "width": 48, "n_layers": 2}
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


def mean_psnr(images: torch.Tensor | None, truth: torch.Tensor) -> float:
    assert images is not None
    return float(metrics.psnr_db(images, truth).mean())


@pytest.mark.parametrize("side", [1, 2])
def test_one_permutation_is_found_exactly(
    shipped: Base, public: ImageSet, victims: ImageSet, cache: Path, side: int
) -> None:
    data, known = encoded(shipped, victims, cache=cache), encoded(shipped, public, cache=cache)
    patches = to_patches(torch.cat([data.latents, data.hint_latents], 1), side)
    shuffle = torch.randperm(patches.shape[1], generator=tiny.draw(5))
    public_patches = to_patches(torch.cat([known.latents, known.hint_latents], 1), side)
    order, _ = place_by_moments(patches[:, shuffle], public_patches)
    assert torch.equal(shuffle[order], torch.arange(len(shuffle)))
    untouched, _ = place_by_moments(patches, public_patches)
    assert torch.equal(untouched, torch.arange(len(shuffle)))


@pytest.mark.parametrize(
    "defences",
    [
        FIXED,
        replace(FIXED, symsigmoid=True, fixed_noise=0.1, half=True, timestep_floor=200, hide_prompts=True),
        replace(FIXED, patch_shuffle=1),
    ],
    ids=str,
)
def test_a_fixed_permutation_protects_nothing(
    shipped: Base, public: ImageSet, victims: ImageSet, cache: Path, defences: Defences
) -> None:
    transcript, truth = record(shipped, victims, defences, n_clients=2)
    found = attack_transcript(transcript, attack="jigsaw", base=shipped, public=public, cache=cache)
    images, hints = victims.images[truth.indices], victims.hints[truth.indices]
    ceiling = mean_psnr(shipped.decode(shipped.encode(images)), images)
    assert mean_psnr(found.images, images) > ceiling - 0.5
    guess = attack_transcript(transcript, attack="mean_public", base=shipped, public=public, cache=cache)
    assert mean_psnr(found.hints, hints) > mean_psnr(guess.hints, hints) + 8.0


def test_fresh_permutations_are_learned_from_public_data(
    shipped: Base, public: ImageSet, victims: ImageSet, cache: Path
) -> None:
    transcript, truth = record(shipped, victims, FRESH)
    found, guess, naive = (
        attack_transcript(transcript, attack=name, base=shipped, public=public, cache=cache, options=options)
        for name, options in (("jigsaw", QUICK), ("mean_public", {}), ("closed_form", {}))
    )
    assert found.objective[-1] < 0.5 * found.objective[0]
    images = victims.images[truth.indices]
    reached = mean_psnr(found.images, images)
    assert reached > max(mean_psnr(guess.images, images), mean_psnr(naive.images, images)) + 3.0


@pytest.mark.parametrize("defences", [FIXED, FRESH], ids=str)
def test_noise_gives_nothing_and_runs_repeat_and_inputs_stay(
    shipped: Base, public: ImageSet, victims: ImageSet, cache: Path, defences: Defences
) -> None:
    transcript, truth = record(shipped, victims, defences)
    draw = tiny.draw(7)
    noised = tuple(
        o.map(lambda v: torch.randn(v.shape, generator=draw) if v.is_floating_point() else v)
        for o in transcript.observations[:2]
    )
    before = [{name: value.clone() for name, value in o.tensors.items()} for o in noised]
    knowledge = make_knowledge(transcript, shipped, public, cache=cache)
    options = {**QUICK, "steps": 10} if defences.fresh_keys else {}
    found, again = (run_attack("jigsaw", noised, knowledge, generator=tiny.draw(), options=options) for _ in range(2))
    guess = run_attack("mean_public", noised, knowledge, generator=tiny.draw())
    images = victims.images[truth.indices[:64]]
    assert mean_psnr(found.images, images) < mean_psnr(guess.images, images) + 0.5
    assert torch.equal(torch.as_tensor(found.images), torch.as_tensor(again.images))
    for observation, tensors in zip(noised, before, strict=True):
        assert all(torch.equal(observation.tensors[name], value) for name, value in tensors.items())


def test_refusals_say_why(shipped: Base, public: ImageSet, victims: ImageSet) -> None:
    transcript, _ = record(shipped, victims, FIXED)
    run: dict[str, Any] = {"attack": "jigsaw", "base": shipped, "public": public}
    with pytest.raises(InputError, match="patch_shuffle, which is not on here: use closed_form"):
        attack_transcript(transcript, **run, ignore=("defences",))
    with pytest.raises(InputError, match="carries no noise"):
        attack_transcript(transcript, **run, ignore=("noise",))
    both = replace(transcript, header=replace(transcript.header, defences=replace(FIXED, key_mixing=16)))
    with pytest.raises(InputError, match="cannot undo key_mixing"):
        attack_transcript(both, **run)


def test_putting_patches_in_order_undoes_the_shuffle() -> None:
    maps = torch.randn(3, 4, 8, 8, generator=tiny.draw())
    order = torch.stack([torch.randperm(16, generator=tiny.draw(i)) for i in range(3)])
    assert torch.equal(
        from_patches(to_patches(from_patches(to_patches(maps, 2), order, 2), 2), order.argsort(1), 2), maps
    )
