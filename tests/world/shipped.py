"""The shipped models and data, and messages recorded on them, for tests of attacks; loaded once for all of them."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from splitlab.core.paths import ROOT
from splitlab.data.image_set import ImageSet, load
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, load_base
from splitlab.split.client import client_send
from splitlab.split.config import Defences, TrainConfig
from splitlab.split.messages import Reconstruction, Truth
from splitlab.split.server import attack_transcript, make_knowledge, run_attack
from splitlab.split.train import make_clients
from splitlab.split.wire import Header, Transcript, from_bytes
from world import tiny

needs_shipped = pytest.mark.skipif(
    not (ROOT / "models/base/model_index.json").exists() or not (ROOT / "data/public").exists(),
    reason="the shipped base model or data are missing; `make data` pulls them",
)

_FOLDER = tempfile.TemporaryDirectory()
CACHE = Path(_FOLDER.name)


@functools.cache
def shipped() -> Base:
    return load_base(ROOT / "models/base")


@functools.cache
def public() -> ImageSet:
    return load(ROOT / "data/public/shapes.zip", limit=400)


@functools.cache
def victims() -> ImageSet:
    return load(ROOT / "data/private/shapes.zip", limit=128)


@functools.cache
def record(defences: Defences, *, n_messages: int = 2, batch: int = 32, samples: int = 0) -> tuple[Transcript, Truth]:
    config = TrainConfig(defences=defences, samples=samples, batch_size=batch, published_key=0)
    (client,) = make_clients(shipped(), victims(), config, cache=CACHE)
    sent = [client_send(client, i, batch) for i in range(n_messages)]
    truths = [truth for _, truth in sent]
    columns = {name: torch.cat([getattr(t, name) for t in truths]) for name in ("indices", "timesteps", "noise")}
    header = Header("test", "shapes", "split", defences, victims().size, shipped().digest, 1)
    return Transcript(header, tuple(from_bytes(message) for message, _ in sent)), Truth(**columns)


def attack(name: str, transcript: Transcript, *, ignore: tuple[str, ...] = (), **options: object) -> Reconstruction:
    return attack_transcript(
        transcript, attack=name, base=shipped(), public=public(), ignore=ignore, options=options, cache=CACHE
    )


def psnr(found: Reconstruction, truth: Truth) -> torch.Tensor:
    assert found.images is not None
    return metrics.psnr_db(found.images, victims().images[truth.indices])


def gain_from_pure_noise(name: str, defences: Defences, **options: object) -> float:
    """Return how much better, dB, than the mean public image an attack does on noise in place of the observation."""
    transcript, truth = record(defences)
    draw = tiny.draw(7)
    noised = tuple(
        o.map(lambda v: torch.randn(v.shape, generator=draw).to(v.dtype) if v.is_floating_point() else v)
        for o in transcript.observations
    )
    knowledge = make_knowledge(transcript, shipped(), public(), cache=CACHE)
    found = run_attack(name, noised, knowledge, generator=tiny.draw(), options=options)
    guess = run_attack("mean_public", noised, knowledge, generator=tiny.draw())
    return float(psnr(found, truth).mean() - psnr(guess, truth).mean())


def check_repeats_and_leaves_input(name: str, defences: Defences, **options: object) -> None:
    """Assert that an attack gives the same twice and that messages are as they were."""
    transcript, _ = record(defences, n_messages=1)
    before = [{k: v.clone() for k, v in o.tensors.items()} for o in transcript.observations]
    first, second = (attack(name, transcript, **options) for _ in range(2))
    assert first.images is not None
    assert second.images is not None
    assert torch.equal(first.images, second.images)
    assert first.objective == second.objective
    for observation, tensors in zip(transcript.observations, before, strict=True):
        assert all(torch.equal(observation.tensors[key], value) for key, value in tensors.items())
