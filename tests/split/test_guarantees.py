"""What may be claimed of a run, and what is refused with the reason."""

import math

import pytest
from world import tiny

from splitlab.privacy.accounting import gdp_epsilon
from splitlab.split.config import Defences, TrainConfig
from splitlab.split.privacy import guarantee, message_mu, messages_per_image

BOUNDED = {"latent_norm": 8.0, "feature_noise": 1.0, "matched": True, "hint_noise": 2.0, "hide_prompts": True}


def of(n: int = 100, **defences: object) -> object:
    config = TrainConfig(scheme="split", steps=10, batch_size=20, defences=Defences(**defences))  # type: ignore[arg-type]
    return guarantee(config, tiny.ALPHAS, n=n)


def test_a_bound_and_a_noise_on_image_and_hint_make_a_guarantee_that_composes_over_epochs() -> None:
    found = of(**BOUNDED)
    image = message_mu(float(tiny.ALPHAS[0]), norm=8.0, feature_noise=1.0)
    hint = message_mu(1.0, norm=8.0, feature_noise=2.0)
    # two epochs of two Gaussian mechanisms each: mu² adds up (Dong et al. 2022, Cor. 3.3); the named timestep is the
    # nearest there is, so ᾱ is not the schedule's first to the last digit
    assert found.epsilon == pytest.approx(gdp_epsilon(math.sqrt(2 * (image**2 + hint**2)), 1e-5), rel=0.01)
    assert found.why == ""
    assert of(50, **BOUNDED).epsilon > found.epsilon


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("latent_norm", "noise without a bound"),
        ("hint_noise", "a bound without noise"),
        ("hide_prompts", "prompts are sent"),
    ],
)
def test_whatever_is_missing_is_named_and_nothing_is_claimed(without: str, says: str) -> None:
    found = of(**{key: value for key, value in BOUNDED.items() if key != without})
    assert says in found.why
    assert found.events == ()
    assert math.isinf(found.epsilon)


def test_what_hides_nothing_claims_nothing() -> None:
    assert "no noise" in of().why
    assert "estimated" in of(fixed_noise=0.5).why
    central = guarantee(TrainConfig(scheme="central"), tiny.ALPHAS, n=10)
    assert "'central'" in central.why
    assert central.events == ()


def test_messages_of_one_image_are_counted_up() -> None:
    assert messages_per_image(TrainConfig(steps=10, batch_size=20), 100) == 2
    assert messages_per_image(TrainConfig(steps=10, batch_size=20), 150) == 2
