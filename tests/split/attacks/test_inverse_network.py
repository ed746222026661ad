"""The learned inverse network: on its own, and as what improves on algebra and the public diffusion model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import shipped, tiny

from splitlab.core.errors import InputError
from splitlab.diffusion.base import encoded
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.simulated_client import fixed_noise_error, imitate, imitate_known
from splitlab.split.config import Defences
from splitlab.split.server import attack_transcript, make_knowledge

pytestmark = shipped.needs_shipped
NOISY = Defences(feature_noise=1.0, hide_prompts=True)
QUICK = {"steps": 20, "width": 16, "n_blocks": 2}
SMALL = {"steps": 60, "width": 24, "n_blocks": 2, "pool": 256}
S1 = Defences(timestep_floor=200, symsigmoid=True, fixed_noise=0.5, half=True, hide_prompts=True)


def test_with_the_prior_it_starts_from_the_posterior_and_does_not_fall_behind() -> None:
    transcript, truth = shipped.record(NOISY)
    single = shipped.psnr(shipped.attack("posterior", transcript), truth).mean()
    found = shipped.attack("adaptive_network", transcript, **SMALL)
    assert shipped.psnr(found, truth).mean() > single - 0.1
    assert sum(found.objective[-10:]) < sum(found.objective[:10])
    assert found.used == ("timesteps", "noisy_latents", "noise", "smashed")


def test_untrained_it_is_the_posterior() -> None:
    transcript, truth = shipped.record(NOISY)
    single = shipped.psnr(shipped.attack("posterior", transcript), truth)
    found = shipped.attack("adaptive_network", transcript, **(SMALL | {"steps": 4, "lr": 1e-9}))
    assert (shipped.psnr(found, truth) - single).abs().mean() < 0.2


def test_it_improves_hints_under_noise_of_their_own() -> None:
    transcript, truth = shipped.record(replace(NOISY, feature_noise=0.3, independent_draws=True, symsigmoid=True))
    wanted = shipped.victims().hints[truth.indices]
    smooth = shipped.attack("posterior", transcript).hints
    found = shipped.attack("adaptive_network", transcript, **(SMALL | {"steps": 80})).hints
    assert smooth is not None
    assert found is not None
    assert (found - wanted).square().mean() < (smooth - wanted).square().mean()


def test_a_non_adaptive_network_is_trained_once_for_all_defences(tmp_path: Path) -> None:
    def run(defences: Defences, prior: bool) -> torch.Tensor:
        found = attack_transcript(
            shipped.record(defences, n_messages=1)[0],
            attack="inverse_network",
            base=shipped.base(),
            public=shipped.public(),
            ignore=("defences",),
            options=(SMALL | {"pool": 64} if prior else QUICK) | {"steps": 4, "prior": prior},
            cache=tmp_path,
        )
        assert found.images is not None
        return found.images

    for prior in (False, True):
        first = run(NOISY, prior)
        trained = set(tmp_path.glob("inverse-*.safetensors"))
        assert len(trained) == 1 + prior
        assert torch.equal(run(NOISY, prior), first)
        run(replace(NOISY, feature_noise=0.3), prior)
        assert set(tmp_path.glob("inverse-*.safetensors")) == trained


def test_the_label_of_a_u_shaped_split_is_solved_for() -> None:
    """With noise_pred = 0 the returned gradient is -2 / N noise."""
    transcript, _truth = shipped.record(NOISY, n_messages=1)
    returned = tuple(
        replace(
            o.without("noise"),
            noise_pred=torch.zeros_like(o.need("noise")),
            noise_pred_gradient=-2 * o.need("noise") / o.need("noise").numel(),
        )
        for o in transcript.observations
    )
    shaped = replace(transcript, header=replace(transcript.header, scheme="u_shaped"), observations=returned)
    for options in (QUICK | {"prior": False}, SMALL | {"prior": True, "steps": 5, "pool": 64}):
        whole = shipped.attack("inverse_network", transcript, **options)
        found = shipped.attack("inverse_network", shaped, **options)
        assert whole.images is not None
        assert found.images is not None
        assert (whole.images - found.images).abs().mean() < 0.01
        assert {"noise_pred", "noise_pred_gradient"} <= set(found.used)


def test_the_imitation_of_fixed_noise_is_what_its_estimate_misses() -> None:
    transcript, _ = shipped.record(S1)
    knowledge = make_knowledge(transcript, shipped.base(), shipped.public(), cache=shipped.CACHE)
    data = encoded(shipped.base(), shipped.public(), cache=shipped.CACHE)
    assert fixed_noise_error(data, knowledge, 64, tiny.draw()).abs().median() < 0.1
    chosen = torch.arange(48)
    message, known = imitate_known(data, knowledge, [64], chosen, tiny.draw())
    found = hint_latents(message, [message], known)
    assert found is not None
    assert (found - data.hint_latents[chosen]).abs().median() < 0.1
    raw, same = imitate(data, knowledge, 8, tiny.draw(), chosen=chosen[:8])
    assert torch.equal(same, chosen[:8])
    assert raw.encoder_hidden_states is None


@pytest.mark.parametrize("prior", [False, True])
def test_pure_noise_gives_nothing(prior: bool) -> None:
    options = (SMALL if prior else QUICK) | {"prior": prior}
    assert shipped.gain_from_pure_noise("inverse_network", NOISY, **options) < 0.5


@pytest.mark.parametrize("prior", [False, True])
def test_it_repeats_and_leaves_its_input_alone(prior: bool) -> None:
    options = (SMALL | {"pool": 64} if prior else QUICK) | {"prior": prior, "steps": 8}
    shipped.check_repeats_and_leaves_input("inverse_network", replace(S1, timestep_floor=0), **options)


def test_missing_fields_are_named() -> None:
    transcript, _ = shipped.record(NOISY)
    with pytest.raises(InputError, match="carries no timesteps"):
        shipped.attack("inverse_network", transcript, ignore=("timesteps",))
    with pytest.raises(InputError, match="neither was sent"):
        shipped.attack("inverse_network", transcript, ignore=("noisy_latents", "smashed"))
    with pytest.raises(InputError, match="carries no noisy_latents"):
        shipped.attack("adaptive_network", transcript, ignore=("noisy_latents",))
