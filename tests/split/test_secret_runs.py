"""Runs whose draws are secret, as they are by default: what they leave behind, and what they claim."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from world import tiny
from world.interrupts import Interrupt, interrupted_at
from world.secrecy import ENTROPY, FIXED, equal, holders, tensors_below, traces

from splitlab.core.seeds import Key, source
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.dp.finetune import DPConfig, finetune
from splitlab.dp.sample import load_tuned
from splitlab.privacy import draws
from splitlab.privacy import mechanisms as engine
from splitlab.privacy.accounting import SIMULATED, PrivacyEvent, epsilon, epsilon_words, recorded_epsilon
from splitlab.privacy.audit import audit


@pytest.fixture
def entropy(monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(draws.secrets, "token_bytes", lambda n: ENTROPY[:n])
    return ENTROPY


def dp_config(private: ImageSet, **changes) -> DPConfig:
    few = {"dataset": "tiny", "classes": tuple(sorted(set(private.prompts))), "batch_size": 4, "steps": 5}
    few |= {"noise_multiplier": 1.0, "delta": 0.01, "accountant": "rdp", "checkpoint_every": 2}
    return DPConfig(**(few | changes))


def tune(base: Base, private: ImageSet, folder: Path, settings: DPConfig, **options):
    return finetune("mine", settings, base, private, out=folder / "out", cache=folder / "cache", **options)


def test_an_interrupted_private_run_ends_as_if_it_had_not_been(
    base: Base, private: ImageSet, tmp_path: Path, entropy: bytes
):
    settings = dp_config(private)
    whole = tune(base, private, tmp_path / "whole", settings)
    for step in (1, 3, 5):  # before the first checkpoint as well
        with pytest.raises(Interrupt):
            tune(base, private, tmp_path / "parts", settings, callback=interrupted_at(step))
    parts = tune(base, private, tmp_path / "parts", settings)
    assert parts == whole
    assert equal(tensors_below(tmp_path / "whole/out"), tensors_below(tmp_path / "parts/out"))


def test_two_private_runs_of_one_config_differ(base: Base, private: ImageSet, tmp_path: Path):
    settings = dp_config(private)
    records = [tune(base, private, tmp_path / name, settings) for name in ("one", "other", "one")]
    assert records[0] == records[1] == records[2]
    first = tensors_below(tmp_path / "other/out")
    assert not equal(first, tensors_below(tmp_path / "one/out"))
    tune(base, private, tmp_path / "other", settings)  # a further call is a further release
    assert not equal(first, tensors_below(tmp_path / "other/out"))


def test_a_private_runs_secret_is_found_nowhere(
    base: Base, private: ImageSet, tmp_path: Path, entropy: bytes, capfd: pytest.CaptureFixture[str]
):
    used, original = [entropy], Key.derived

    def noted(key: Key, *purpose: object) -> Key:
        found = original(key, *purpose)
        used.append(found._secret)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Key, "derived", noted)
        with pytest.raises(Interrupt) as stopped:
            tune(base, private, tmp_path, dp_config(private), callback=interrupted_at(5))
        assert len(used) > 10
        assert holders(tmp_path, used) == ["dp-mine.key"]
        for path in (tmp_path / "cache/dp-mine.key", tmp_path / "cache/dp-mine.safetensors"):
            assert path.stat().st_mode & 0o777 == 0o600
        record = tune(base, private, tmp_path, dp_config(private))
    assert holders(tmp_path, used) == []
    assert not list((tmp_path / "cache").glob("dp-*"))
    shown = capfd.readouterr()
    texts = (shown.out, shown.err, repr(record), json.dumps(record), repr(stopped.value), str(stopped.traceback))
    assert not any(traces(text.encode(), secret) for text in texts for secret in used)


def test_a_record_says_what_its_epsilon_rests_on(base: Base, private: ImageSet, tmp_path: Path):
    spent = epsilon([PrivacyEvent("gaussian", 1.0, 1 / 3, 5, "add_remove_one")], 0.01, accountant="rdp")
    secret = tune(base, private, tmp_path / "secret", dp_config(private))
    assert (secret["randomness"], secret["epsilon"], "note" in secret) == ("secret", spent, False)
    known = tune(base, private, tmp_path / "known", dp_config(private, published_key=0))
    assert (known["randomness"], known["epsilon_simulated"], known["note"]) == ("published", spent, SIMULATED)
    assert "epsilon" not in known
    assert recorded_epsilon(secret) == recorded_epsilon(known) == spent
    text = (tmp_path / "known/out/record.json").read_text()
    assert '"epsilon":' not in text.replace('"config": ' + json.dumps(known["config"]), "").split('"delta"')[0]
    assert SIMULATED.split(":")[0] in text
    plain = tune(base, private, tmp_path / "plain", dp_config(private, noise_multiplier=0.0, published_key=0))
    assert math.isinf(plain["epsilon"])  # no key changes that


def test_what_starts_from_a_simulation_is_one(base: Base, private: ImageSet, tmp_path: Path):
    tune(base, private, tmp_path / "known", dp_config(private, published_key=0))
    start = load_tuned(tmp_path / "known/out")
    history = tuple(PrivacyEvent(**event) for event in start.record["events"])
    record = tune(base, private, tmp_path / "on", dp_config(private), start=start, history=history)
    assert (record["randomness"], "epsilon" in record) == ("published", False)
    public = dp_config(private, published_key=0, noise_multiplier=0.0)
    tune(base, private, tmp_path / "public", public)
    start = load_tuned(tmp_path / "public/out")  # claims nothing, so there is nothing to void
    assert tune(base, private, tmp_path / "on", dp_config(private), start=start)["randomness"] == "secret"


def test_an_epsilon_is_worded_by_what_it_rests_on():
    assert epsilon_words(9.974, "secret") == "ε = 9.97"
    assert epsilon_words(9.974, "published") == "simulated ε = 9.97"
    assert epsilon_words(math.inf, "published") == epsilon_words(math.inf, "secret") == "ε = ∞"


def test_secret_batches_are_poisson_samples():
    n, rate, trials = 60, 0.2, 3000
    batches = torch.zeros(trials, n)
    for number in range(trials):
        batches[number, engine.poisson_sample(n, rate, generator=source(FIXED, "dp batch", number))] = 1
    counts = batches.sum(0)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01  # none more often than others
    assert float(batches.mean()) == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / (n * trials)))
    assert float(batches.sum(1).var()) == pytest.approx(n * rate * (1 - rate), rel=0.1)  # each for itself
    assert len(engine.poisson_sample(n, 1.0, generator=source(FIXED, "x"))) == n
    assert len(engine.poisson_sample(n, 0.0, generator=source(FIXED, "x"))) == 0


def test_without_clipping_and_noise_a_secret_step_is_a_plain_one(base: Base):
    model, inputs = torch.nn.Linear(3, 1), torch.randn(6, 3, generator=tiny.draw())

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)[:, 0].square()

    how = {"expected_batch": 6.0}
    released = engine.private_gradient(
        Loss(), (inputs,), max_grad_norm=1e9, noise_multiplier=0.0, generator=source(FIXED, "x"), **how
    )
    plain, _ = engine.plain_gradient(Loss(), (inputs,), **how)
    assert all(torch.allclose(released[name], plain[name], rtol=1e-5) for name in plain)


def test_secret_noise_has_the_mechanisms_width():
    total = {"a": torch.zeros(300, 400), "b": torch.ones(50_000, dtype=torch.float64)}
    released = engine.release(total, 0.3, 1.7, expected_batch=50.0, generator=source(FIXED, "dp noise", 0))
    for name, value in released.items():
        noise = (value * 50.0 - total[name]).flatten().double().numpy() / (0.3 * 1.7)
        assert stats.kstest(noise, "norm").pvalue > 0.01
        assert value.dtype == total[name].dtype


def test_an_audit_of_secret_draws_stays_below_the_claim():
    sigma, rate, steps, delta = 0.6, 0.1, 30, 1e-5
    claim = epsilon([PrivacyEvent("gaussian", sigma, rate, steps, "add_remove_one")], delta)
    found = audit(sigma, sample_rate=rate, steps=steps, delta=delta, key=FIXED)
    assert 0.1 < found.lower_bound < claim
