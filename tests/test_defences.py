import pytest
import tiny
import torch

from splitlab.config import Defences
from splitlab.controlnet import symsigmoid
from splitlab.defences import draw_timesteps, fixed_noise_tensor, protect, transforms
from splitlab.errors import InputError
from splitlab.types import OBSERVATION_FIELDS, Observation

EACH = [
    Defences(symsigmoid=True),
    Defences(fixed_noise=0.5),
    Defences(half=True),
    Defences(hide_prompts=True),
    Defences(feature_noise=0.3),
    Defences(feature_noise=0.3, independent_draws=True),
    Defences(feature_noise=0.3, matched=True),
    Defences(key_mixing=3),
    Defences(patch_shuffle=1),
]
ALPHAS = torch.linspace(0.999, 0.005, 1000)


def message(seed: int = 0) -> Observation:
    draw = tiny.draw(seed)
    latents = [torch.randn(3, 4, 4, 4, generator=draw) for _ in range(3)]
    timesteps = torch.randint(1000, (3,), generator=draw)
    return Observation(1, 2, timesteps, *latents, torch.randn(3, 16, 8, generator=draw))


def applied(defences: Defences, sent: Observation, *, client_key: int = 7) -> Observation:
    return protect(sent, transforms(defences, client_key=client_key), tiny.draw())


def differs(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is not other
    return one.dtype != other.dtype or not torch.equal(one, other)


@pytest.mark.parametrize("defences", EACH, ids=str)
def test_a_defence_changes_the_fields_it_declares_and_no_other(defences: Defences):
    (defence,) = transforms(defences, client_key=7)
    before = message()
    after = defence.apply(before, tiny.draw())
    changed = {name for name in OBSERVATION_FIELDS if differs(getattr(before, name), getattr(after, name))}
    assert changed == set(defence.touches)
    assert (after.client, after.sequence) == (before.client, before.sequence)


@pytest.mark.parametrize("defences", EACH, ids=str)
def test_a_defence_leaves_its_input_as_it_was(defences: Defences):
    before = message()
    applied(defences, before)
    assert all(torch.equal(value, message().need(name)) for name, value in before.tensors.items())


def test_no_defence_is_no_transform():
    assert transforms(Defences(), client_key=0) == ()
    # the floor decides how timesteps are drawn, before there is a message
    assert transforms(Defences(timestep_floor=600), client_key=0) == ()


def test_all_together_act_in_the_order_of_their_fields():
    everything = Defences(symsigmoid=True, fixed_noise=0.5, half=True, hide_prompts=True)
    assert [d.name for d in transforms(everything, client_key=7)] == [
        "symsigmoid",
        "fixed_noise",
        "hide_prompts",
        "half",
    ]
    before = message()
    after = applied(everything, before)
    noise = fixed_noise_tensor(everything, (4, 4, 4), 7)
    assert torch.equal(after.need("smashed"), (symsigmoid(before.need("smashed")) + noise).half())
    assert after.encoder_hidden_states is None


def test_fixed_noise_is_one_tensor_per_client_and_another_for_every_other():
    defences = Defences(fixed_noise=0.5)
    added = [applied(defences, m, client_key=k).need("smashed") - m.need("smashed")
             for k in (7, 8) for m in (message(0), message(1))]  # fmt: skip
    own = fixed_noise_tensor(defences, (4, 4, 4), 7)
    for first, second in (added[:2], added[2:]):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)  # other messages, the same tensor
    torch.testing.assert_close(added[0], own.expand(3, -1, -1, -1), rtol=0, atol=1e-6)  # and for every sample
    assert (added[0] - added[2]).abs().mean() > 0.1


def test_fixed_noise_has_the_standard_deviation_asked_for():
    draws = torch.cat([fixed_noise_tensor(Defences(fixed_noise=0.3), (4, 16, 16), key).flatten() for key in range(20)])
    # 20,480 draws: the standard error of their standard deviation is 0.5 %
    assert draws.std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(draws.mean().item()) < 0.01


def test_half_halves_floats_to_fp16_and_keeps_timesteps_exact():
    before = message()
    after = applied(Defences(half=True), before)
    assert after.need("timesteps").dtype == torch.int16
    assert after.need("timesteps").tolist() == before.need("timesteps").tolist()
    for name in ("noisy_latents", "smashed", "noise", "encoder_hidden_states"):
        assert after.need(name).dtype == torch.float16
        assert 2 * after.need(name).nbytes == before.need(name).nbytes
        torch.testing.assert_close(after.need(name).float(), before.need(name), rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("floor", [0, 1, 600, 999])
def test_timesteps_are_drawn_from_the_floor_to_the_end(floor: int):
    drawn = draw_timesteps(Defences(timestep_floor=floor), 20_000, ALPHAS, tiny.draw())
    # 20,000 draws from at most 1,000 values miss one end with probability 2e-9
    assert (drawn.min().item(), drawn.max().item()) == (floor, 999)
    assert drawn.float().mean().item() == pytest.approx((floor + 999) / 2, abs=8)


@pytest.mark.parametrize("floor", [1000, 5000])
def test_a_floor_that_leaves_no_timestep_is_refused(floor: int):
    with pytest.raises(InputError, match=f"timestep_floor {floor} leaves none of the 1000 timesteps: lower it"):
        draw_timesteps(Defences(timestep_floor=floor), 4, ALPHAS, tiny.draw())
