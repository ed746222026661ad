"""ε against published values, an independent accountant and closed forms; what has no guarantee gets no number."""

import math
from dataclasses import replace

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from world import tiny

from splitlab.core.errors import InputError
from splitlab.privacy.accounting import (
    PrivacyEvent,
    composed_mu,
    epsilon,
    gdp_delta,
    gdp_epsilon,
    noise_multiplier_for,
)
from splitlab.split.config import Defences
from splitlab.split.defences.matched import sent_timesteps, signal_level
from splitlab.split.defences.timestep_floor import draw_timesteps
from splitlab.split.privacy import hint_event, matched_message_event, message_events, message_mu


def event(noise_multiplier: float, sample_rate: float = 1.0, steps: int = 1, adjacency: str = "add_remove_one"):
    return PrivacyEvent("gaussian", noise_multiplier, sample_rate, steps, adjacency)


def independent(events: list[PrivacyEvent], delta: float) -> float:
    """ε by Google's privacy loss distributions, in both directions of add and remove."""
    accountant = PLDAccountant()
    for one in events:
        mechanism = dp_accounting.GaussianDpEvent(one.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(one.sample_rate, mechanism), one.steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate", "steps", "delta", "accountant", "published"),
    [
        # tensorflow/privacy, compute_dp_sgd_privacy_test.py, Test0 and Test1
        (1.3, 150 / 60_000, 6_000, 1e-5, "rdp", 0.7242234026109595),
        (1.0, 100 / 100_000, 30_000, 1e-7, "rdp", 1.4154988495444845),
        # pytorch/opacus, accountants_test.py, test_rdp_accountant
        (1.5, 0.04, 2_250, 1e-5, "rdp", 7.32911117143),
        # google/differential-privacy, pld_privacy_accountant_test.py: δ = 0.15594 at ε = 1, and 0.126936 at ε = 1
        (0.5, 0.2, 3, 0.15594, "prv", 1.0),
        (math.sqrt(3), 1.0, 3, 0.126936, "prv", 1.0),
    ],
)
def test_published_values_are_met_within_one_per_cent(
    noise_multiplier, sample_rate, steps, delta, accountant, published
):
    found = epsilon([event(noise_multiplier, sample_rate, steps)], delta, accountant=accountant)
    assert found == pytest.approx(published, rel=0.01)


def test_tighter_than_the_moments_accountant_but_not_by_much():
    """Abadi et al. 2016, sec. 3.2: q = 0.01, σ = 4, δ = 1e-5, 100 epochs: ε = 1.26."""
    found = epsilon([event(4.0, 0.01, 10_000)], 1e-5)
    assert 0.7 * 1.26 < found < epsilon([event(4.0, 0.01, 10_000)], 1e-5, accountant="rdp") < 1.26


@pytest.mark.parametrize(
    "events",
    [
        [event(1.1, 256 / 60_000, 14_062)],
        [event(0.8, 0.05, 300)],
        [event(8.0, 0.1, 500)],
        [event(10.0, 0.02, 50)],
        [event(1.0, 0.02, 300), event(2.0, 0.1, 100)],
        [event(5.0, 0.1, 100), event(3.0), event(6.0, 1.0, 4)],
    ],
    ids=["mnist", "large", "one", "small", "two rates", "sampled and not"],
)
def test_independent_accountant_agrees_within_one_per_cent(events: list[PrivacyEvent]):
    expected = independent(events, 1e-5)
    assert expected * 0.999 < epsilon(events, 1e-5) == pytest.approx(expected, rel=0.01)


def test_gaussian_mechanisms_compose_exactly_and_in_any_order():
    events = [event(2.0, steps=3), event(5.0), event(1.0, steps=0)]
    assert composed_mu(events) == pytest.approx(math.sqrt(3 / 4 + 1 / 25), rel=1e-12)
    assert epsilon(events, 1e-6) == epsilon(events[::-1], 1e-6) == gdp_epsilon(composed_mu(events), 1e-6)
    assert epsilon(events, 1e-6) == pytest.approx(independent(events[:2], 1e-6), rel=0.001)


@pytest.mark.parametrize("mu", [0.05, 1.0, 7.0, 100.0])
def test_gdp_epsilon_inverts_gdp_delta(mu: float):
    assert gdp_delta(mu, gdp_epsilon(mu, 1e-5)) == pytest.approx(1e-5, rel=1e-6)


def test_gdp_delta_is_the_distance_of_two_gaussians():
    """The integral of max(p - e^ε q, 0), p = N(μ, 1), q = N(0, 1), by quadrature."""
    x = torch.linspace(-12, 14, 400_001, dtype=torch.float64)
    p, q = (torch.exp(-((x - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (1.3, 0.0))
    integral = torch.trapezoid((p - math.exp(0.7) * q).clamp_min(0), x)
    assert gdp_delta(1.3, 0.7) == pytest.approx(float(integral), rel=1e-6)


def test_nothing_released_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], 1e-5) == epsilon([event(1.0, 0.1, 0)], 1e-5) == gdp_epsilon(0.0, 1e-5) == 0.0
    assert epsilon([event(3.0, 0.1, 5), event(0.0)], 1e-5) == gdp_epsilon(math.inf, 1e-5) == math.inf


def test_large_epsilon_is_bounded_and_quick():
    assert 1e3 < epsilon([event(0.05, 0.1, 100)], 1e-5) < math.inf


@pytest.mark.parametrize(("target", "rate", "steps"), [(1.0, 0.1, 200), (6.0, 0.1, 100), (3.0, 1.0, 4)])
def test_noise_multiplier_reaches_the_target_and_no_less(target: float, rate: float, steps: int):
    found = noise_multiplier_for(target, delta=1e-5, sample_rate=rate, steps=steps)
    assert epsilon([event(found, rate, steps)], 1e-5) <= target
    assert epsilon([event(found * 0.998, rate, steps)], 1e-5) > target


def test_noise_multiplier_matches_the_published_one():
    """pytorch/opacus, accountants_test.py, test_get_noise_multiplier_rdp_steps: 1.3562."""
    found = noise_multiplier_for(8.0, delta=1e-5, sample_rate=0.04, steps=2_000, accountant="rdp")
    assert found == pytest.approx(1.3562, rel=0.001)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: epsilon([event(1.0)], 0.0), "delta"),
        (lambda: epsilon([event(1.0)], 1.0), "delta"),
        (lambda: epsilon([], 1e-5, accountant="moments"), "accountant"),
        (lambda: epsilon([PrivacyEvent("laplace", 1.0, 1.0, 1, "add_remove_one")], 1e-5), "mechanism"),
        (lambda: epsilon([event(1.0, 1.5)], 1e-5), "sample rate"),
        (lambda: epsilon([event(-1.0)], 1e-5), "noise multiplier"),
        (lambda: epsilon([event(math.nan)], 1e-5), "noise multiplier"),
        (lambda: epsilon([event(1.0, steps=-1)], 1e-5), "steps"),
        (lambda: epsilon([event(1.0, adjacency="zero_out")], 1e-5), "adjacency"),
        (lambda: epsilon([event(1.0), event(1.0, adjacency="replace_one")], 1e-5), "adjacencies"),
        (lambda: epsilon([event(1.0, 0.1, 1, "replace_one")], 1e-5), "add_remove_one only"),
        (lambda: composed_mu([event(1.0, 0.1)]), "no μ"),
        (lambda: noise_multiplier_for(0.0, delta=1e-5, sample_rate=0.1, steps=10), "above 0"),
        (lambda: noise_multiplier_for(-1.0, delta=1e-5, sample_rate=0.1, steps=10), "above 0"),
        (lambda: noise_multiplier_for(1.0, delta=1e-5, sample_rate=0.1, steps=0), "steps"),
        (lambda: noise_multiplier_for(1.0, delta=1e-5, sample_rate=0.0, steps=10), "sample rate"),
        (
            lambda: noise_multiplier_for(1e-3, delta=1e-5, sample_rate=0.1, steps=9, accountant="rdp"),
            "unreachable in 9 steps",
        ),
        (lambda: message_mu(0.5, norm=0.0, feature_noise=1.0), "without a bound"),
        (lambda: message_mu(0.5, norm=math.inf, feature_noise=1.0), "without a bound"),
        (lambda: message_mu(0.5, norm=1.0, feature_noise=0.0), "without noise"),
        (lambda: message_mu(1.5, norm=1.0, feature_noise=1.0), "alpha_bar"),
        (lambda: matched_message_event(Defences(), tiny.ALPHAS, norm=16.0), "without noise"),
        (
            lambda: matched_message_event(Defences(feature_noise=1.0, independent_draws=True), tiny.ALPHAS, norm=16.0),
            "independent_draws",
        ),
        (lambda: hint_event(0.0, norm=16.0), "without noise"),
    ],
)
def test_what_is_not_a_guarantee_is_refused(call, says: str):
    with pytest.raises(InputError, match=says):
        call()


def test_message_mu_is_the_distance_of_neighbours_over_the_noise():
    assert message_mu(0.25, norm=3.0, feature_noise=0.5) == pytest.approx(0.5 * 6 / 0.5)
    assert message_mu(0.25, norm=3.0, feature_noise=0.5, adjacency="add_remove_one") == pytest.approx(0.5 * 3 / 0.5)


@pytest.mark.parametrize("matched", [False, True])
def test_message_event_is_charged_at_the_floor_which_bounds_every_timestep(matched: bool):
    defences = Defences(feature_noise=1.0, matched=matched, timestep_floor=300)
    charged = 1 / matched_message_event(defences, tiny.ALPHAS, norm=16.0).noise_multiplier
    drawn = draw_timesteps(defences, 5_000, tiny.ALPHAS, tiny.draw())
    levels = signal_level(defences, sent_timesteps(defences, drawn, tiny.ALPHAS), tiny.ALPHAS).flatten()
    each = [message_mu(float(level), norm=16.0, feature_noise=1.0) for level in levels]
    assert max(each) == pytest.approx(charged, rel=1e-6)
    assert min(each) < 0.5 * charged
    lower = Defences(feature_noise=1.0, matched=matched, timestep_floor=800)
    assert 1 / matched_message_event(lower, tiny.ALPHAS, norm=16.0).noise_multiplier < charged


def test_epochs_and_the_hint_compose():
    defences = Defences(feature_noise=1.0, matched=True, timestep_floor=800)
    once, often = (matched_message_event(defences, tiny.ALPHAS, norm=16.0, messages=n) for n in (1, 9))
    hint = hint_event(4.0, norm=8.0, messages=9)
    assert composed_mu([often]) == pytest.approx(3 * composed_mu([once]))
    assert composed_mu([hint]) == pytest.approx(3 * 16 / 4)
    assert composed_mu([often, hint]) == pytest.approx(math.hypot(composed_mu([often]), composed_mu([hint])))
    assert epsilon([often, hint], 1e-5) > epsilon([often], 1e-5)


def test_noise_drawn_once_is_charged_once_however_often_it_is_sent():
    defences = Defences(latent_norm=16.0, feature_noise=4.0, hint_noise=8.0, matched=True, per_image_noise=True)
    once, often = (message_events(defences, tiny.ALPHAS, messages=n) for n in (1, 30))
    assert once == often
    assert composed_mu(once) == pytest.approx(math.hypot(32 / 4, 32 / 8))


def test_message_events_need_bound_and_noise_for_the_image_and_for_its_hint():
    whole = Defences(latent_norm=16.0, feature_noise=1.0, hint_noise=2.0, matched=True, timestep_floor=800)
    image, hint = message_events(whole, tiny.ALPHAS, messages=3)
    assert image == matched_message_event(whole, tiny.ALPHAS, norm=16.0, messages=3)
    assert hint == hint_event(2.0, norm=16.0, messages=3)
    for missing in ({"latent_norm": 0.0}, {"hint_noise": 0.0}, {"feature_noise": 0.0, "matched": False}):
        with pytest.raises(InputError, match="no ε"):
            message_events(replace(whole, **missing), tiny.ALPHAS)


def test_a_target_below_what_the_accountant_resolves_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="resolves no less than"):
        noise_multiplier_for(1e-9, delta=0.01, sample_rate=1 / 3, steps=100_000)
