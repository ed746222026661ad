import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key
from splitlab.diffusion.controlnet import coarsened, low_frequencies, symsigmoid
from splitlab.split.config import Defences
from splitlab.split.defences import DEFENCES, protect
from splitlab.split.defences.fixed_noise import fixed_noise_tensor
from splitlab.split.defences.keys import draw_noise, from_patches, mixing_key, to_patches
from splitlab.split.defences.latent_norm import bounded
from splitlab.split.defences.matched import label_share, noisy_state, sent_timesteps, signal_level
from splitlab.split.defences.per_image_noise import noised_per_image
from splitlab.split.defences.timestep_floor import draw_timesteps
from splitlab.split.messages import OBSERVATION_FIELDS, Observation

NEEDED = {
    "independent_draws": {"feature_noise": 0.3},
    "key_mixing": {"key_mixing": 3},
    "patch_shuffle": {"patch_shuffle": 1},
}
"""What a defence needs on these messages, of three samples and 4x4 latents."""

EACH = [
    Defences(**{name: defence.usual[-1]} | NEEDED.get(name, {}))
    for name, defence in DEFENCES.items()
    if defence.transform
] + [Defences(feature_noise=0.3, matched=True)]
ALPHAS = torch.linspace(0.999, 0.005, 1000)


def message(seed: int = 0) -> Observation:
    draw = tiny.draw(seed)
    latents = [torch.randn(3, 4, 4, 4, generator=draw) for _ in range(3)]
    timesteps = torch.randint(1000, (3,), generator=draw)
    return Observation(1, 2, timesteps, *latents, torch.randn(3, 16, 8, generator=draw))


def applied(defences: Defences, sent: Observation, *, client_key: int = 7) -> Observation:
    return protect(sent, defences, client_key=Key.published(client_key), draw=tiny.draw())


def differs(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is not other
    return one.dtype != other.dtype or not torch.equal(one, other)


@pytest.mark.parametrize("defences", EACH, ids=str)
def test_a_defence_changes_the_fields_it_declares_and_no_other(defences: Defences):
    before = message()
    after = applied(defences, before)
    changed = {name for name in OBSERVATION_FIELDS if differs(getattr(before, name), getattr(after, name))}
    transforms = [defence for defence in defences.active if defence.transform]
    assert changed == {name for defence in transforms for name in defence.touches}
    assert (after.client, after.sequence) == (before.client, before.sequence)


@pytest.mark.parametrize("defences", EACH, ids=str)
def test_a_defence_leaves_its_input_as_it_was(defences: Defences):
    before = message()
    applied(defences, before)
    assert all(torch.equal(value, message().need(name)) for name, value in before.tensors.items())


def test_no_defence_is_no_transform():
    # the floor decides how timesteps are drawn, the bound and noise drawn once what a message is made of
    once = Defences(feature_noise=1.0, matched=True, hint_noise=1.0, per_image_noise=True)
    for defences in (Defences(), Defences(timestep_floor=600, latent_norm=9.0), once):
        before = message()
        assert applied(defences, before) == before


def test_all_together_act_in_the_order_of_their_places():
    everything = Defences(symsigmoid=True, fixed_noise=0.5, half=True, hide_prompts=True)
    assert [d.name for d in everything.active] == ["symsigmoid", "fixed_noise", "hide_prompts", "half"]
    before = message()
    after = applied(everything, before)
    noise = fixed_noise_tensor(everything, (4, 4, 4), Key.published(7))
    assert torch.equal(after.need("smashed"), (symsigmoid(before.need("smashed")) + noise).half())
    assert after.encoder_hidden_states is None


def test_fixed_noise_is_one_tensor_per_client_and_another_for_every_other():
    defences = Defences(fixed_noise=0.5)
    added = [applied(defences, m, client_key=k).need("smashed") - m.need("smashed")
             for k in (7, 8) for m in (message(0), message(1))]  # fmt: skip
    own = fixed_noise_tensor(defences, (4, 4, 4), Key.published(7))
    for first, second in (added[:2], added[2:]):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)  # other messages, the same tensor
    torch.testing.assert_close(added[0], own.expand(3, -1, -1, -1), rtol=0, atol=1e-6)  # and for every sample
    assert (added[0] - added[2]).abs().mean() > 0.1


def test_fixed_noise_has_the_standard_deviation_asked_for():
    defences, keys = Defences(fixed_noise=0.3), map(Key.published, range(20))
    draws = torch.cat([fixed_noise_tensor(defences, (4, 16, 16), key).flatten() for key in keys])
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


def test_feature_noise_is_one_draw_over_all_fields_unless_they_are_independent():
    before = message()
    for shared in (True, False):
        after = applied(Defences(feature_noise=0.5, independent_draws=not shared), before)
        added = [after.need(name) - before.need(name) for name in ("noisy_latents", "smashed")]
        assert added[0].std() == pytest.approx(0.5, rel=0.15)  # 192 draws: standard error 5 %
        same = (added[0] - added[1]).abs().max() < 1e-5
        assert bool(same) is shared
        assert torch.equal(after.need("noise"), before.need("noise"))  # the label does not reveal it


def test_the_matched_client_sends_a_diffusion_state_of_the_timestep_it_names():
    defences = Defences(feature_noise=1.0, matched=True)
    drawn = draw_timesteps(defences, 2000, ALPHAS, tiny.draw())
    named = sent_timesteps(defences, drawn, ALPHAS)
    alphas = signal_level(defences, named, ALPHAS)
    torch.testing.assert_close(alphas.flatten(), ALPHAS[drawn], rtol=0, atol=2e-3)  # to a timestep's rounding
    # signal and noise of (sqrt(a) x + sqrt(1 - a) e + n) / sqrt(2) are those of the schedule at the named timestep
    torch.testing.assert_close(alphas.flatten() / 2, ALPHAS[named], rtol=1e-5, atol=1e-7)
    share = label_share(defences, named, ALPHAS).flatten()
    torch.testing.assert_close(share.square(), (1 - alphas.flatten()) / (2 - alphas.flatten()))
    assert named.max() <= len(ALPHAS) - 1
    assert ALPHAS[drawn].min() / 2 >= ALPHAS[-1]


def test_without_matching_levels_and_loss_are_as_ever():
    timesteps = torch.tensor([0, 500, 999])
    for defences in (Defences(), Defences(feature_noise=1.0)):
        assert torch.equal(sent_timesteps(defences, timesteps, ALPHAS), timesteps)
        assert torch.equal(signal_level(defences, timesteps, ALPHAS).flatten(), ALPHAS[timesteps])
        assert (label_share(defences, timesteps, ALPHAS) == 1).all()


def test_hint_noise_is_no_second_view_of_the_image():
    # messages without and with hint noise, all else equal: only what is left of the hint differs, by noise of that size
    defences = Defences(feature_noise=1.0, matched=True, hint_noise=0.5)
    before = Observation(
        0, 0, torch.zeros(64).long(), *(torch.randn(64, 4, 8, 8, generator=tiny.draw(i)) for i in (1, 2, 3))
    )
    after = applied(defences, before)
    left = after.need("smashed") - after.need("noisy_latents") - (before.need("smashed") - before.need("noisy_latents"))
    assert left.std().item() == pytest.approx(0.5, rel=0.02)  # 16,384 draws: standard error 0.6 %
    added = after.need("noisy_latents") * 2**0.5 - before.need("noisy_latents")
    correlation = torch.corrcoef(torch.stack([left.flatten(), added.flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.03  # 4 standard errors


def test_coarse_hints_keep_few_numbers_and_white_noise_its_size():
    noise = torch.randn(200, 4, 8, 8, generator=tiny.draw())
    coarse = coarsened(noise, 2)
    assert coarse.std().item() == pytest.approx(1.0, rel=0.05)  # 2,400 free numbers: standard error 1.4 %
    assert torch.linalg.matrix_rank(coarse[:, 0].flatten(1)) == 3
    torch.testing.assert_close(low_frequencies(coarse, 2), coarse, rtol=1e-4, atol=1e-5)
    assert coarsened(noise, 0) is noise
    whole = low_frequencies(noise + 7.0, 8)  # all frequencies: nothing but the mean is lost
    torch.testing.assert_close(whole, noise - noise.mean((2, 3), keepdim=True), rtol=1e-4, atol=1e-5)
    defences = Defences(coarse_hints=2, hint_noise=0.5)
    sent = applied(defences, message())
    left = sent.need("smashed") - sent.need("noisy_latents")
    torch.testing.assert_close(low_frequencies(left, 2), left, rtol=1e-4, atol=1e-4)  # the noise is made coarse too


def test_noise_drawn_once_is_the_same_in_every_message_and_matched():
    defences = Defences(feature_noise=6.0, matched=True, hint_noise=2.0, per_image_noise=True)
    latents, hints = (torch.randn(500, 4, 4, 4, generator=tiny.draw(i)) for i in (1, 2))
    found, found_hints = noised_per_image(defences, latents, hints, [tiny.draw(i) for i in range(500)])
    again, _ = noised_per_image(defences, latents[7:8], hints[7:8], [tiny.draw(7)])
    assert torch.equal(found[7:8], again)  # whoever else is in the batch
    assert (found - latents).std().item() == pytest.approx(6.0, rel=0.03)
    assert (found_hints - hints).std().item() == pytest.approx(2.0, rel=0.03)
    drawn = draw_timesteps(defences, 500, ALPHAS, tiny.draw())
    named = sent_timesteps(defences, drawn, ALPHAS)
    noise = draw_noise(defences, (500, 4, 4, 4), tiny.draw(3))
    state = noisy_state(defences, found, noise, named, ALPHAS)
    # the rest of a message is a diffusion state's noise at the timestep that it names, and the label has its share k
    alphas = ALPHAS[named][:, None, None, None]
    rest = (state - alphas.sqrt() * latents) / (1 - alphas).sqrt()
    assert rest.std().item() == pytest.approx(1.0, rel=0.02)
    share = (rest * noise).mean((1, 2, 3))
    expected = label_share(defences, named, ALPHAS).flatten()
    assert (share - expected).mean().abs() < 0.02
    assert expected.std() > 0.1


def test_latents_are_scaled_down_to_their_bound_and_never_up():
    defences = Defences(latent_norm=5.0)
    latents = torch.randn(50, 4, 4, 4, generator=tiny.draw()) * torch.linspace(0.1, 2.0, 50)[:, None, None, None]
    found = bounded(defences, latents)
    norms, before = found.flatten(1).norm(dim=1), latents.flatten(1).norm(dim=1)
    assert norms.max() <= 5.0 * (1 + 1e-6)
    assert torch.equal(found[before <= 5.0], latents[before <= 5.0])
    assert bounded(Defences(), latents) is latents


def test_a_mixing_key_is_row_stochastic_and_invertible():
    key = mixing_key(16, tiny.draw())
    torch.testing.assert_close(key.sum(1), torch.ones(16))
    assert (key >= 0).all()
    assert torch.linalg.matrix_rank(key) == 16


def test_mixed_samples_share_timestep_and_noise_and_the_label_stays_right():
    defences = Defences(key_mixing=3)
    assert draw_timesteps(defences, 6, ALPHAS, tiny.draw()).reshape(2, 3).unique(dim=1).shape == (2, 1)
    noise = draw_noise(defences, (3, 4, 4, 4), tiny.draw())
    assert torch.equal(noise[0], noise[2])
    latents = torch.randn(3, 4, 4, 4, generator=tiny.draw(1))
    sent = applied(defences, Observation(0, 0, torch.zeros(3).long(), latents + noise, latents, noise))
    mixed = sent.need("noisy_latents") - noise  # rows sum to 1: subtracting the label leaves mixed latents
    solution = torch.linalg.lstsq(latents.flatten(1).T, mixed.flatten(1).T).solution
    torch.testing.assert_close(solution.sum(0), torch.ones(3), rtol=0, atol=1e-4)
    assert (solution > -1e-4).all()


def test_a_key_stays_with_its_client_unless_it_is_fresh():
    one, other = message(0), message(0)
    for fresh in (False, True):
        defences = Defences(key_mixing=3, fresh_keys=fresh)
        first, second = (
            protect(m, defences, client_key=Key.published(7), draw=tiny.draw(i)).need("smashed")
            for i, m in enumerate((one, other))
        )
        assert torch.equal(first, second) is not fresh


def test_patches_move_alike_in_every_map_and_nothing_is_lost():
    before = message()
    after = applied(Defences(patch_shuffle=2), before, client_key=8)
    for name in ("noisy_latents", "smashed", "noise"):
        assert not torch.equal(after.need(name), before.need(name))
        assert torch.equal(after.need(name).flatten(2).sort(2).values, before.need(name).flatten(2).sort(2).values)
    clean = before.need("noisy_latents") - before.need("noise")
    moved = after.need("noisy_latents") - after.need("noise")
    patches = to_patches(clean, 2)
    assert {tuple(p.tolist()) for p in patches[0]} == {tuple(p.tolist()) for p in to_patches(moved, 2)[0]}
    identity = torch.arange(4).expand(3, -1)
    assert torch.equal(from_patches(patches, identity, 2), clean)


@pytest.mark.parametrize(
    ("defences", "reason"),
    [(Defences(key_mixing=2), "key_mixing 2 does not divide a batch of 3"),
     (Defences(patch_shuffle=3), "patch_shuffle 3 does not divide latents of 4x4")],
)  # fmt: skip
def test_defences_that_do_not_fit_a_message_say_so(defences: Defences, reason: str):
    with pytest.raises(InputError, match=reason):
        applied(defences, message())


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"feature_noise": -1.0}, "feature_noise is a standard deviation"),
     ({"key_mixing": 1}, "2 or more"),
     ({"patch_shuffle": -2}, "patch's side"),
     ({"matched": True}, "say how feature_noise is added"),
     ({"feature_noise": 1.0, "matched": True, "independent_draws": True}, "leave out independent_draws"),
     ({"fresh_keys": True}, "needs a key"),
     ({"hint_noise": -1.0}, "hint_noise is a standard deviation"),
     ({"latent_norm": -1.0}, "latent_norm is a norm"),
     ({"coarse_hints": 1}, "number of frequencies, 2 or more"),
     ({"per_image_noise": True}, "give feature_noise or hint_noise"),
     ({"feature_noise": 1.0, "per_image_noise": True, "independent_draws": True}, "leave out independent_draws")],
)  # fmt: skip
def test_contradictory_defences_are_refused(values: dict, reason: str):
    with pytest.raises(InputError, match=reason):
        Defences(**values)
