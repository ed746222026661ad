"""The audit's bounds hold where the truth is known, pass the engine, and catch mistakes planted in it."""

import math

import pytest
import torch
from message_audit import audit_message, mu_lower_bound
from world import planted, tiny

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base, Encoded
from splitlab.diffusion.trainable import mark_trainable
from splitlab.dp.conditioning import denoiser, make_conditioning
from splitlab.privacy.accounting import composed_mu, noise_multiplier_for
from splitlab.privacy.audit import Canaries, audit, epsilon_lower_bound, p_value
from splitlab.privacy.mechanisms import norms, per_sample_gradients, per_sample_hooks
from splitlab.split.config import Defences
from splitlab.split.privacy import matched_message_event, message_events

DELTA, RATE, STEPS, DRAWS = 1e-5, 0.1, 50, 4


@pytest.fixture(scope="module")
def sigma() -> float:
    """The noise that buys ε = 1."""
    return noise_multiplier_for(1.0, delta=DELTA, sample_rate=RATE, steps=STEPS)


def bound(sigma: float, variant: str, seed: int) -> float:
    how = planted.VARIANTS[variant]
    found = audit(sigma, sample_rate=RATE, steps=STEPS, delta=DELTA, multiplicity=DRAWS, seed=seed, **how)
    return found.lower_bound


def test_correct_engine_passes_in_five_of_five_seeds(sigma: float):
    found = [bound(sigma, "correct", seed) for seed in range(5)]
    assert max(found) <= 1.0
    assert sum(found) / 5 > 0.05, "a bound that is always 0 would pass anything"


@pytest.mark.parametrize("variant", [name for name in planted.VARIANTS if name != "correct"])
def test_planted_mistakes_are_caught(sigma: float, variant: str):
    assert bound(sigma, variant, seed=0) > 1.0


def riding(base: Base, n: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A denoiser whose attention is trained, and inputs for it, one row per canary."""
    classes = tuple(tiny.PROMPTS[:2])
    conditioning = make_conditioning(base, "class", [classes[i % 2] for i in range(n)], classes=classes)
    model = denoiser(base, conditioning)
    mark_trainable(model.unet, "attention")
    latents, noise = torch.randn(2, n, 4, 4, 4, generator=tiny.draw(1))
    return model, (latents, conditioning.conditions, torch.randint(1000, (n,), generator=tiny.draw(2)), noise)


def test_canaries_ride_on_a_real_model(base: Base):
    inner, inputs = riding(base, 60)
    few = {"sample_rate": 1.0, "steps": 3, "delta": DELTA, "n_canaries": 60, "inner": inner, "inputs": inputs}
    claim = noise_multiplier_for(1.0, delta=DELTA, sample_rate=1.0, steps=3)
    assert audit(claim, **few).lower_bound <= 1.0 < audit(claim, **few, mechanism=planted.noise_over_batch).lower_bound


def test_a_canarys_gradient_is_its_own_unit_vector():
    model = Canaries(5, scale=3.0)
    with per_sample_hooks(model):
        gradients, _ = per_sample_gradients(model, (torch.eye(5)[[2, 4]],))
    assert torch.equal(gradients["weights.weight"][:, 0], 3.0 * torch.eye(5)[[2, 4]])
    assert norms(gradients).tolist() == [3.0, 3.0]


def test_bound_is_right_for_a_mechanism_of_known_epsilon():
    """Randomised response with ε = 1: each canary's bit is told truly with probability e / (1 + e)."""
    found = []
    for seed in range(40):
        draw = tiny.draw(seed)
        included = torch.rand(1000, generator=draw) < 0.5
        told = torch.rand(1000, generator=draw) < 1 / (1 + math.exp(-1.0))
        scores = torch.where(told == included, 1.0, -1.0) + 0.1 * torch.rand(1000, generator=draw)
        found.append(epsilon_lower_bound(scores, included, delta=0.0).lower_bound)
    assert sum(one > 1.0 for one in found) <= 4, "5 % of 40, and twice that for luck"
    assert 0.6 < sum(found) / 40 < 1.0


def test_blind_guesses_prove_nothing():
    included = torch.rand(1000, generator=tiny.draw(0)) < 0.5
    found = [epsilon_lower_bound(torch.rand(1000, generator=tiny.draw(1 + s)), included, delta=0.0) for s in range(40)]
    assert sum(one.lower_bound > 0 for one in found) <= 4


def test_p_value_of_a_perfect_guesser_is_its_closed_form():
    """δ = 0 and all r guesses right: (e^ε / (1 + e^ε))^r. δ only raises it."""
    exact = (math.e**2 / (1 + math.e**2)) ** 80
    assert p_value(1000, 80, 80, epsilon=2.0, delta=0.0) == pytest.approx(exact, rel=1e-9)
    assert p_value(1000, 80, 80, epsilon=2.0, delta=1e-5) > exact
    assert p_value(1000, 80, 0, epsilon=2.0, delta=1e-5) == 1.0


@pytest.mark.parametrize("mu", [0.5, 2.0, 4.0])
def test_mu_bound_is_right_for_gaussians(mu: float):
    found = []
    for seed in range(20):
        first, second = torch.randn(2, 4000, generator=tiny.draw(seed), dtype=torch.float64)
        found.append(mu_lower_bound(first, second + mu))
    assert sum(one > mu for one in found) <= 3
    assert sum(found) / 20 > mu - 0.25 * max(mu, 1.0)


def neighbours(base: Base, norm: float, *, same_hint: bool = False) -> Encoded:
    """Two samples as far apart as a norm allows: opposite in image and hint."""
    image, hint = (x / x.norm() * norm for x in torch.randn(2, 1, 4, 4, 4, generator=tiny.draw(3)))
    hints = torch.cat([hint, hint if same_hint else -hint])
    return Encoded(torch.cat([image, -image]), hints, base.encode_prompts(["", ""]))


LATE = {"latent_norm": 4.0, "timestep_floor": 700, "feature_noise": 1.0, "hint_noise": 4.0}
CLIENTS = {
    "matched": Defences(**{**LATE, "timestep_floor": 650}, matched=True, symsigmoid=True, half=True, hide_prompts=True),
    "naive": Defences(**{**LATE, "timestep_floor": 990}),
    "once": Defences(**LATE | {"feature_noise": 4.0, "hint_noise": 6.0}, matched=True, per_image_noise=True),
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("same_hint", [False, True])
def test_messages_leak_no_more_than_claimed(base: Base, client: str, same_hint: bool):
    defences, schedule = CLIENTS[client], base.alphas_cumprod
    events = message_events(defences, schedule)
    if same_hint:
        events = (matched_message_event(defences, schedule, norm=defences.latent_norm),)
    found = audit_message(base, defences, neighbours(base, 4.0, same_hint=same_hint))
    assert 0.4 * composed_mu(events) < found <= composed_mu(events)


def test_a_client_that_adds_half_the_noise_is_caught(base: Base):
    claimed = composed_mu(message_events(CLIENTS["once"], base.alphas_cumprod))
    real = Defences(**LATE | {"feature_noise": 2.0, "hint_noise": 3.0}, matched=True, per_image_noise=True)
    assert audit_message(base, real, neighbours(base, 4.0)) > claimed


def test_a_client_that_forgets_the_bound_is_caught(base: Base):
    claimed = composed_mu(message_events(CLIENTS["once"], base.alphas_cumprod))
    real = Defences(feature_noise=4.0, hint_noise=6.0, matched=True, per_image_noise=True, timestep_floor=700)
    assert audit_message(base, real, neighbours(base, 12.0)) > claimed


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: epsilon_lower_bound(torch.zeros(10), torch.zeros(10).bool(), delta=0.0), "too few"),
        (lambda: epsilon_lower_bound(torch.full((400,), math.nan), torch.zeros(400).bool(), delta=0.0), "not finite"),
        (lambda: audit(1.0, sample_rate=0.1, steps=1, delta=DELTA, n_canaries=10), "too few"),
        (lambda: mu_lower_bound(torch.zeros(3), torch.zeros(9)), "more messages"),
    ],
)
def test_too_little_evidence_is_refused(call, says: str):
    with pytest.raises(InputError, match=says):
        call()
