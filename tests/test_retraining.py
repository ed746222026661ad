"""Membership by training again with what a private run publishes, `benchmarks/retraining.py`, on tiny models."""

import hashlib
import sys
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest
import tiny

from splitlab import draws
from splitlab.base import Base
from splitlab.dp.finetune import DPConfig
from splitlab.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import retraining

RUNS = 16


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """A game of seconds, in which the system's entropy is a known sequence, so that its outcome does not vary."""
    numbers = count()
    monkeypatch.setattr(draws.secrets, "token_bytes", lambda n: hashlib.sha256(b"%d" % next(numbers)).digest()[:n])
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
    found = played(base, small, tmp_path, RUNS, published=False)
    assert found["bit_for_bit"] == 0
    assert 0.3 < found["auc"] < 0.7  # ± 1.3 standard errors of guessing
    assert found["randomness"] == "secret"


def test_a_published_record_names_every_seed_that_the_attack_tries():
    numbers = {name for name, value in asdict(DPConfig(published_key=3)).items() if "seed" in name or "key" in name}
    assert numbers == set(retraining.SEEDS)
