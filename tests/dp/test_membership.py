"""Membership inference and extraction: right where the answer is known, at chance where there is nothing to find."""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.diffusion.base import Base
from splitlab.dp.attacks.membership import auc, log_losses, membership_auc
from splitlab.dp.finetune import DPConfig
from splitlab.dp.sample import Tuned, untuned

sys.path.insert(0, str(ROOT / "benchmarks"))
from canaries import distance_ratio, extract, insert
from shadow_models import attacks, auc_bound, halves, judged, likelihood_ratio, shadow_losses, tpr_at, tpr_bound


def test_auc_and_tpr_of_a_case_done_by_hand():
    members, others = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.5])
    assert auc(members, others) == 0.75
    assert auc(torch.ones(3), torch.ones(5)) == 0.5
    assert tpr_at(members, others, fpr=0.0) == 0.5
    assert tpr_at(members, others, fpr=0.5) == 1.0


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
def test_randomised_response_reaches_the_bounds_exactly(epsilon: float):
    """It tells the truth with probability e^ε / (1 + e^ε), and no ε-DP mechanism tells more (Kairouz et al. 2015)."""
    truth, lie = 1 / (1 + math.exp(-epsilon)), 1 / (1 + math.exp(epsilon))
    assert tpr_bound(lie, epsilon, 0.0) == pytest.approx(truth, rel=1e-12)
    assert auc_bound(epsilon, 0.0) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.3, 0.2), (1.0, 1e-5), (8.0, 1e-3)])
def test_auc_bound_is_the_area_under_the_tpr_bound(epsilon: float, delta: float):
    rates = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    area = torch.trapezoid(torch.tensor([tpr_bound(float(r), epsilon, delta) for r in rates]), rates)
    assert auc_bound(epsilon, delta) == pytest.approx(float(area), rel=1e-3)


def simulated(effect: float, *, models: int = 8, n: int = 2000) -> tuple[torch.Tensor, ...]:
    """Log losses: samples differ in difficulty far more than membership matters."""
    draw = tiny.draw(0)
    member = halves(n, models, seed=0)
    difficulty = 3 * torch.randn(n, generator=draw, dtype=torch.float64)
    noise = torch.randn(models, n, generator=draw, dtype=torch.float64)
    return difficulty + noise - effect * member, member, difficulty + 1


def test_likelihood_ratio_finds_what_a_threshold_on_the_loss_cannot():
    """A shift of one standard deviation, known exactly, has AUC Φ(1 / sqrt 2) = 0.760."""
    found = attacks(*simulated(1.0), epsilon=2.0, delta=1e-5)
    assert found["loss"].auc < 0.63
    assert 0.70 < found["likelihood ratio, offline"].auc < found["likelihood ratio"].auc + 0.01 < 0.765
    assert found["likelihood ratio"].tpr > 2 * found["loss"].tpr
    assert found["likelihood ratio"].n_targets == 8
    assert found["loss"].auc_bound == pytest.approx(auc_bound(2.0, 1e-5))


def test_nothing_is_found_where_membership_has_no_effect():
    for result in attacks(*simulated(0.0)).values():
        assert abs(result.auc - 0.5) < 0.02
        assert result.tpr < 0.02


def test_halves_hold_every_sample_equally_often():
    member = halves(11, 6, seed=3)
    assert member.sum(0).tolist() == [3] * 11
    assert not torch.equal(member, halves(11, 6, seed=4))


def test_spread_of_one_target_comes_from_resampling():
    few, many = (judged(torch.randn(n, generator=tiny.draw(1)) + 1, torch.randn(n)) for n in (20, 2000))
    assert few.auc_std > 3 * many.auc_std > 0


RUN = DPConfig(
    dataset="tiny",
    conditioning="none",
    trainable="unet",
    from_block=0,
    embedder=False,
    batch_size=6,
    steps=2,
    max_grad_norm=1.0,
    ema_decay=0.0,
    checkpoint_every=1000,
    published_key=0,
)


def memory(base: Base, latents: torch.Tensor) -> Tuned:
    """The best noise predictor for a few images: a model that overfitted perfectly."""

    def predict(noisy: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        alpha = base.alphas_cumprod[timestep].reshape(())
        squares = torch.cdist(noisy.flatten(1), alpha.sqrt() * latents.flatten(1)).square()
        weights = (-squares / (2 * (1 - alpha))).softmax(1)
        mean = (weights @ latents.flatten(1)).view_as(noisy)
        return SimpleNamespace(sample=(noisy - alpha.sqrt() * mean) / (1 - alpha).sqrt())

    unet = copy.deepcopy(base.unet)
    unet.forward = predict
    return Tuned(unet, None, "none", (), {})


def test_an_overfitted_model_gives_its_members_away_and_the_base_does_not(base: Base):
    pixels = torch.rand(24, 3, 4, 4, generator=tiny.draw(5)).round() * 2 - 1
    data = replace(tiny.small_set(24), images=pixels.repeat_interleave(4, 2).repeat_interleave(4, 3))
    members, others = data.subset(range(12)), data.subset(range(12, 24))
    overfitted = memory(base, base.encode(members.images))
    assert membership_auc(base, overfitted, members, others) > 0.95
    assert membership_auc(base, untuned(base, "none"), members, others, draws=2) == 0.5


def test_losses_repeat_and_do_not_depend_on_company(base: Base):
    data, model = tiny.small_set(6, seed=6), untuned(base, "none")
    alone = log_losses(base, model, data.subset([4]), draws=3)
    together = log_losses(base, model, data, draws=3, batch=4)
    assert torch.allclose(alone[0], together[4], atol=1e-5)
    assert torch.equal(together, log_losses(base, model, data, draws=3, batch=4))


def test_shadow_models_are_trained_on_their_half_once(base: Base, tmp_path: Path):
    data, run = tiny.small_set(8, seed=7), replace(RUN, steps=2, batch_size=3)
    trained = []
    how = {"folder": tmp_path, "models": 4, "draws": 2}
    losses, member = shadow_losses(run, base, data, **how, callback=lambda what, *_: trained.append(what))
    assert losses.shape == member.shape == (4, 8)
    assert len(trained) == 8, "two steps for each of four models"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "models are not kept"
    again, _ = shadow_losses(run, base, data, **how, callback=lambda what, *_: trained.append(what))
    assert len(trained) == 8
    assert torch.equal(losses, again)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: auc(torch.zeros(0), torch.zeros(2)), "needs scores"),
        (lambda: auc(torch.tensor([math.nan]), torch.zeros(2)), "needs scores"),
        (lambda: halves(10, 5, seed=0), "even number"),
        (lambda: likelihood_ratio(torch.zeros(2), torch.zeros(2, 2), torch.ones(2, 2).bool()), "without it"),
        (
            lambda: likelihood_ratio(torch.zeros(2), torch.zeros(2, 2), torch.tensor([[True, False], [False, False]])),
            "every sample or none",
        ),
        (lambda: insert(tiny.small_set(3), tiny.small_set(2), 1), "one image"),
        (lambda: insert(tiny.small_set(3), tiny.small_set(1, size=32), 1), "size"),
        (lambda: distance_ratio(torch.zeros(1, 3, 2, 2), torch.zeros(3, 2, 2), torch.zeros(0, 3, 2, 2)), "other"),
        (lambda: distance_ratio(torch.zeros(1, 3, 2, 2), torch.zeros(3, 2, 2), torch.zeros(2, 3, 2, 2)), "among"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, says: str):
    with pytest.raises(InputError, match=says):
        call()


def test_a_canary_is_inserted_as_often_as_asked():
    private, canary = tiny.small_set(5), tiny.small_set(1, seed=9)
    for times in (0, 3):
        data = insert(private, canary, times)
        assert len(data) == 5 + times
        assert sum(torch.equal(image, canary.images[0]) for image in data.images) == times
        assert data.prompts.count(canary.prompts[0]) >= times
    assert insert(private, canary, 1).digest != insert(private, canary, 2).digest
    bare = replace(private, hints=None)
    assert insert(private, canary, 2).hints is not None
    assert insert(bare, bare.subset([0]), 2).hints is None


def test_a_copy_has_ratio_zero_and_an_ordinary_sample_does_not():
    images = torch.rand(40, 3, 8, 8, generator=tiny.draw(0)) * 2 - 1
    canary, others, fresh = images[0], images[1:30], images[30:]
    near = canary + 0.01 * torch.randn(1, 3, 8, 8, generator=tiny.draw(1))
    ratios = distance_ratio(torch.cat([canary[None], near, fresh]), canary, others)
    assert ratios[0] == 0
    assert ratios[1] < 0.1
    assert ratios[2:].min() > 1


def test_a_memorised_canary_is_extracted_and_a_forgotten_one_is_not(base: Base):
    others = base.decode(torch.randn(20, 4, 4, 4, generator=tiny.draw(3)))
    latents = torch.randn(1, 4, 4, 4, generator=tiny.draw(4))
    canary = replace(tiny.small_set(1), images=base.decode(latents))
    found = extract(base, memory(base, latents), canary, others, generator=tiny.draw(5), n=6, steps=10)
    assert found.extracted == 1.0
    assert found.ratio < 0.2
    blank = extract(base, untuned(base, "none"), canary, others, generator=tiny.draw(5), n=6, steps=3)
    assert blank.extracted == 0.0
    assert blank.ratio > 1
