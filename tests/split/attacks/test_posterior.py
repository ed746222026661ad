"""The public U-Net as the attacker's prior: it beats plain algebra where noise is left, and invents nothing."""

from dataclasses import replace

import pytest
import torch
from world import shipped, tiny

from splitlab.core.errors import InputError
from splitlab.diffusion.base import encoded
from splitlab.split.attacks.calibration import Calibration, wiener
from splitlab.split.attacks.posterior import denoise
from splitlab.split.config import Defences
from splitlab.split.messages import Knowledge
from splitlab.split.server import run_attack

pytestmark = shipped.needs_shipped
NOISY = Defences(feature_noise=0.3, hide_prompts=True)


def knowledge() -> Knowledge:
    return shipped.knowledge_of(shipped.record(NOISY)[0])


def test_one_step_of_denoising_beats_raw_inversion() -> None:
    transcript, truth = shipped.record(replace(NOISY, timestep_floor=400))
    middle = (truth.timesteps >= 400) & (truth.timesteps < 600)
    raw, found = (shipped.psnr(shipped.attack(name, transcript), truth) for name in ("closed_form", "posterior"))
    assert middle.sum() >= 16
    assert found[middle].mean() > raw[middle].mean() + 5.0


def test_without_noise_the_view_itself_is_the_answer() -> None:
    transcript, _ = shipped.record(Defences())
    raw, found = (shipped.attack(name, transcript) for name in ("closed_form", "posterior"))
    assert raw.images is not None
    assert found.images is not None
    assert raw.hints is not None
    assert found.hints is not None
    assert (raw.images - found.images).abs().max() < 1e-4
    assert torch.equal(raw.hints, found.hints)


def test_one_step_is_the_plain_denoiser_without_defences() -> None:
    """The state that was sent, the timestep it names, eq. 15 of Ho et al. 2020."""
    transcript, _ = shipped.record(Defences())
    base = shipped.base()
    found = shipped.attack("one_step", transcript)
    seen = transcript.observations[0].float()
    noisy, timesteps = seen.need("noisy_latents"), seen.need("timesteps")
    noise_pred = base.unet(noisy, timesteps, encoder_hidden_states=seen.need("encoder_hidden_states")).sample
    assert found.images is not None
    assert (found.images[:32] - base.decode(base.denoised(noisy, noise_pred, timesteps))).abs().max() < 1e-3
    assert found.used == ("timesteps", "noisy_latents", "encoder_hidden_states")


def test_the_prompt_helps_where_it_is_sent() -> None:
    transcript, truth = shipped.record(Defences(feature_noise=1.0, timestep_floor=400))
    blind = shipped.attack("posterior", transcript, ignore=("encoder_hidden_states",))
    assert shipped.psnr(shipped.attack("posterior", transcript), truth).mean() > shipped.psnr(blind, truth).mean()


def test_more_steps_and_draws_run_and_stay_near_the_posterior_mean() -> None:
    transcript, truth = shipped.record(NOISY)
    one = shipped.psnr(shipped.attack("posterior", transcript), truth).mean()
    many = shipped.attack("posterior", transcript, steps=2, eta=1.0, draws=2)
    assert many.n_evals == 4
    assert abs(shipped.psnr(many, truth).mean() - one) < 3.0


def test_hints_under_noise_of_their_own_are_smoothed() -> None:
    transcript, truth = shipped.record(replace(NOISY, independent_draws=True, symsigmoid=True))
    wanted = shipped.victims().hints[truth.indices]
    raw, found = (shipped.attack(name, transcript).hints for name in ("closed_form", "posterior"))
    assert raw is not None
    assert found is not None
    assert (found - wanted).square().mean() < 0.8 * (raw - wanted).square().mean()


def test_denoise_is_exact_for_no_noise_and_shrinks_no_clean_view() -> None:
    latents = encoded(shipped.base(), shipped.public(), cache=shipped.CACHE).latents[:8]
    before = latents.clone()
    found = denoise(latents, torch.zeros(8, 1, 1, 1), knowledge())
    assert torch.equal(found, latents)
    assert torch.equal(latents, before)
    noise = torch.randn(latents.shape, generator=tiny.draw())
    better = denoise(latents + 0.5 * noise, torch.full((8, 1, 1, 1), 0.5), knowledge())
    assert (better - latents).square().mean() < 0.5 * 0.25


def test_wiener_and_calibration_shrink_to_the_mean() -> None:
    public = torch.randn(500, 2, 4, 4, generator=tiny.draw()) * 2 + 1
    views = public[:100] + 4 * torch.randn(100, 2, 4, 4, generator=tiny.draw(1))
    std = torch.full((100, 1, 1, 1), 4.0)
    found = wiener(views, std, public)
    # variance 4 and noise of variance 16: the least error is 4 * 16 / 20
    assert (found - public[:100]).square().mean() == pytest.approx(3.2, rel=0.15)
    calibrated = Calibration(std, views, public[:100])
    assert calibrated(std, views).var() < 0.1 * views.var()
    assert calibrated.error(std)[0].item() == pytest.approx(3.2**0.5, rel=0.1)


def test_pure_noise_gives_nothing() -> None:
    assert shipped.gain_from_pure_noise("posterior", NOISY) < 0.5


def test_it_repeats_and_leaves_its_input_alone() -> None:
    shipped.check_repeats_and_leaves_input("posterior", NOISY, steps=2, eta=0.5, calibrate=False)


def test_bad_calls_say_what_to_do() -> None:
    transcript, _ = shipped.record(NOISY)
    for field in ("noisy_latents", "timesteps"):
        with pytest.raises(InputError, match=f"carries no {field}"):
            shipped.attack("posterior", transcript, ignore=(field,))
    with pytest.raises(InputError, match="set eta above 0"):
        shipped.attack("posterior", transcript, draws=4)
    with pytest.raises(InputError, match="1 or more"):
        shipped.attack("posterior", transcript, steps=0)
    with pytest.raises(InputError, match="from 0 to 1"):
        shipped.attack("posterior", transcript, eta=2.0)
    with pytest.raises(InputError, match="no messages to attack"):
        run_attack("posterior", [], knowledge(), generator=tiny.draw())
