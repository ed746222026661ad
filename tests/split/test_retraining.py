"""Membership by training again with what a private run publishes, `benchmarks/retraining.py`, on tiny models."""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from world import tiny

from splitlab.core.paths import ROOT
from splitlab.core.seeds import Key
from splitlab.diffusion.base import Base
from splitlab.dp.finetune import DPConfig, draw_inputs
from splitlab.privacy.mechanisms import Mechanism

sys.path.insert(0, str(ROOT / "benchmarks"))
import retraining


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """A game of seconds."""
    monkeypatch.setattr(retraining, "N", 8)
    pool = tiny.small_set(30)
    few = {"batch_size": 6, "steps": 2, "physical_batch": 8, "from_block": 0, "accountant": "rdp"}
    return pool, replace(retraining.CONFIG, **few, classes=tuple(sorted(set(pool.prompts))))


def played(base: Base, small, folder: Path, runs: int, published: bool) -> dict[str, object]:
    pool, config = small
    return retraining.play(base, pool, replace(config, published_key=0 if published else None), runs, folder)


def test_who_trains_again_with_a_published_key_knows(base: Base, small, tmp_path: Path):
    """Whatever ε says: all but the samples that were in no batch, which is one in sixteen."""
    found = played(base, small, tmp_path, 8, published=True)
    assert found["epsilon"] == 10.0
    assert found["bit_for_bit"] >= 7
    assert found["auc"] >= 0.9
    assert found["randomness"] == "published"


def test_who_trains_again_without_the_secret_guesses(base: Base, small, tmp_path: Path):
    found = played(base, small, tmp_path, 4, published=False)
    assert found["bit_for_bit"] == 0
    assert found["randomness"] == "secret"


@pytest.mark.parametrize("epsilon", [10.0, math.inf])
def test_without_the_secret_training_again_ends_as_far_away_as_any_strangers_run(
    base: Base, small, tmp_path: Path, epsilon: float
):
    """Whatever the secret is: independent noise in thousands of weights has one length, up to a few percent.

    The measure is the distance of two runs whose seeds are all published and differ. Where only the noise repeats,
    training again ends near; where there is none, only the other draws make a difference.
    """
    pool, config = small
    config = replace(config, epsilon=epsilon, steps=1)  # later steps follow from the first one
    worlds = retraining.candidates(pool, 0)
    strangers = [replace(config, published_key=key, seed=key) for key in (11, 12)]
    first, second = (retraining.trained("stranger", run, base, worlds[0], tmp_path) for run in strangers)
    far = (first - second).norm().item()
    retraining.trained("run", config, base, worlds[0], tmp_path)
    pairs = retraining.distances(base, tmp_path, worlds)
    assert len(pairs) == 2  # as recorded, and from the seed
    ends = [distance / far for pair in pairs.values() for distance in pair]
    low, high = (0.8, 1.25) if math.isfinite(epsilon) else (0.1, 10)  # directions of few images are not all alike
    assert low < min(ends) <= max(ends) < high


def test_every_draw_of_a_step_differs_from_secret_to_secret():
    n = 200
    how = Mechanism(1.0, 0.5, n)
    data = (torch.arange(float(n))[:, None, None, None].expand(n, 4, 4, 4), torch.zeros(n, 1))
    steps = [draw_inputs(data, DPConfig(), how, Key.secret(), 0, 1000) for _ in range(2)]
    (batch, _, timesteps, noise), (other_batch, _, other_timesteps, other_noise) = steps
    assert set(batch[:, 0, 0, 0].tolist()) != set(other_batch[:, 0, 0, 0].tolist())
    few = min(len(batch), len(other_batch))
    assert not torch.equal(timesteps[:few], other_timesteps[:few])
    assert not torch.isclose(noise[:few], other_noise[:few]).any(dim=3).all()


def test_a_published_record_names_every_seed_that_the_attack_tries():
    numbers = {name for name, value in asdict(DPConfig(published_key=3)).items() if "seed" in name or "key" in name}
    assert numbers == set(retraining.SEEDS)
