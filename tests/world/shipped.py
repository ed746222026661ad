"""The shipped models and data, and messages recorded on them, for tests of attacks; loaded once for all of them."""

import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from splitlab.core.paths import ROOT
from splitlab.data.image_set import ImageSet, load
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, load_base
from splitlab.split.client import client_send
from splitlab.split.config import Defences, TrainConfig
from splitlab.split.messages import Knowledge, Observation, Reconstruction, Truth
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
def base() -> Base:
    return load_base(ROOT / "models/base")


@functools.cache
def public(n: int = 400) -> ImageSet:
    return load(ROOT / "data/public/shapes.zip", limit=n)


@functools.cache
def victims(n: int = 128) -> ImageSet:
    return load(ROOT / "data/private/shapes.zip", limit=n)


@functools.cache
def record(
    defences: Defences, *, n_messages: int = 2, n_clients: int = 1, batch: int = 32, samples: int = 0
) -> tuple[Transcript, Truth]:
    """Record messages of clients that take turns."""
    config = TrainConfig(defences=defences, samples=samples, batch_size=batch, n_clients=n_clients, published_key=0)
    clients = make_clients(base(), victims(), config, cache=CACHE)
    sent = [client_send(clients[i % n_clients], i // n_clients, batch) for i in range(n_messages)]
    truths = [truth for _, truth in sent]
    columns = {name: torch.cat([getattr(t, name) for t in truths]) for name in ("indices", "timesteps", "noise")}
    header = Header("test", "shapes", "split", defences, victims().size, base().digest, n_clients)
    return Transcript(header, tuple(from_bytes(message) for message, _ in sent)), Truth(**columns)


def knowledge_of(transcript: Transcript, *, n_public: int = 400, ignore: tuple[str, ...] = ()) -> Knowledge:
    return make_knowledge(transcript, base(), public(n_public), cache=CACHE, ignore=ignore)


def attack(
    name: str, transcript: Transcript, *, n_public: int = 400, ignore: tuple[str, ...] = (), **options: object
) -> Reconstruction:
    return attack_transcript(
        transcript, attack=name, base=base(), public=public(n_public), ignore=ignore, options=options, cache=CACHE
    )


def psnr(found: Reconstruction, truth: Truth) -> torch.Tensor:
    """Return the PSNR of each sample, dB."""
    assert found.images is not None
    return metrics.psnr_db(found.images, victims().images[truth.indices])


def ceiling(images: torch.Tensor) -> torch.Tensor:
    """Return the PSNR of each image after the VAE alone, dB."""
    return metrics.psnr_db(base().decode(base().encode(images)), images)


def noised(observations: Iterable[Observation]) -> tuple[Observation, ...]:
    """Put Gaussian noise in place of all that was sent but for whole numbers."""
    draw = tiny.draw(7)
    return tuple(
        o.map(lambda v: torch.randn(v.shape, generator=draw).to(v.dtype) if v.is_floating_point() else v)
        for o in observations
    )


def gain_from_pure_noise(
    name: str,
    defences: Defences,
    *,
    measure: Callable[[Reconstruction, Truth], torch.Tensor] = psnr,
    **options: object,
) -> float:
    """Return how much better, dB, than the mean public image an attack does on noise in place of the observation."""
    transcript, truth = record(defences)
    noise, knowledge = noised(transcript.observations), knowledge_of(transcript)
    found = run_attack(name, noise, knowledge, generator=tiny.draw(), options=options)
    guess = run_attack("mean_public", noise, knowledge, generator=tiny.draw())
    return float(measure(found, truth).mean() - measure(guess, truth).mean())


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
