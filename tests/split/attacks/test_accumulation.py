"""Messages of one image over epochs: found by likeness, averaged, denoised."""

import pytest
import torch
from world import shipped, tiny

from splitlab.core.errors import InputError
from splitlab.split.attacks.accumulation import Features, link, same_image
from splitlab.split.attacks.calibration import CalibrationSet
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view
from splitlab.split.config import Defences
from splitlab.split.server import make_knowledge

pytestmark = shipped.needs_shipped
NOISY = Defences(feature_noise=0.3, hide_prompts=True)
EPOCHS, IMAGES = 10, 16


def epochs(defences: Defences) -> tuple:
    return shipped.record(defences, n_messages=EPOCHS, batch=IMAGES, samples=IMAGES)


@pytest.mark.parametrize("ignore", [(), ("smashed",)], ids=["hints", "views"])
def test_ten_epochs_are_worth_three_decibels(ignore: tuple[str, ...]) -> None:
    transcript, truth = epochs(NOISY)
    single = shipped.psnr(shipped.attack("posterior", transcript, ignore=ignore), truth)
    found = shipped.attack("accumulation", transcript, ignore=ignore)
    assert shipped.psnr(found, truth).mean() > single.mean() + 3.0
    assert found.objective[-1] == pytest.approx(IMAGES, abs=1)
    assert (found.hints is None) == bool(ignore)


def test_linked_samples_share_one_result_in_the_order_sent() -> None:
    transcript, truth = epochs(NOISY)
    found = shipped.attack("accumulation", transcript)
    assert found.images is not None
    alike = (found.images.flatten(1)[:, None] == found.images.flatten(1)[None]).all(2)
    assert torch.equal(alike, truth.indices[:, None] == truth.indices[None])  # the hints are exact here


def test_images_of_different_clients_are_never_linked() -> None:
    values = torch.zeros(4, 3)
    features = Features([values], [torch.full((4,), 0.1)], [torch.ones(3)])
    labels, found = link(features, torch.tensor([0, 0, 1, 1]), 0.0)
    assert labels.tolist() == [0, 0, 1, 1]
    assert found == [1.0, 1.0, 2.0, 2.0]


def test_the_ratio_is_that_of_gaussians() -> None:
    """One coordinate, in closed form: the joint density of two views against the product of their own."""
    spread, v, w, x, y = 2.0, 0.5, 0.3, 1.2, 0.9
    first, second = (Features([torch.tensor([[a]])], [torch.tensor([b])], [torch.tensor([spread])])
                     for a, b in ((x, v), (y, w)))  # fmt: skip
    joint = torch.distributions.MultivariateNormal(
        torch.zeros(2), torch.tensor([[spread + v, spread], [spread, spread + w]])
    )
    apart = sum(
        torch.distributions.Normal(0.0, (spread + b) ** 0.5).log_prob(torch.tensor(a)) for a, b in ((x, v), (y, w))
    )
    assert same_image(first, second).item() == pytest.approx(
        float(joint.log_prob(torch.tensor([x, y])) - apart), abs=1e-5
    )


def test_ratios_promise_as_many_links_as_there_are_where_noise_is_not_white() -> None:
    coarse = Defences(timestep_floor=800, feature_noise=1.0, coarse_hints=3, hint_noise=1.8, hide_prompts=True)
    transcript, truth = epochs(coarse)
    knowledge = make_knowledge(transcript, shipped.base(), shipped.public(), cache=shipped.CACHE)
    seen = labelled(transcript.observations, knowledge)
    calibration_set = CalibrationSet(seen, transcript.observations, knowledge, tiny.draw())
    raw = hint_latents(seen, transcript.observations, knowledge)
    features = Features.of(*latent_view(seen, knowledge), raw, calibration_set)
    ratios = same_image(features, features)
    others = ~torch.eye(len(ratios), dtype=torch.bool)
    same = truth.indices[:, None] == truth.indices[None]
    assert float(ratios[same & others].median()) > 0.0 > float(ratios[~same].median())
    odds = (EPOCHS - 1) / (EPOCHS * (IMAGES - 1))  # of two messages being of one image
    promised = torch.sigmoid(ratios + torch.tensor(odds).log())[others].sum()
    assert float(promised / (same & others).sum()) == pytest.approx(1.0, abs=0.25)


def test_without_repeats_it_is_the_posterior() -> None:
    transcript, truth = shipped.record(NOISY)
    single = shipped.psnr(shipped.attack("posterior", transcript), truth)
    found = shipped.attack("accumulation", transcript)
    assert found.objective[-1] >= 62.0  # two images may share an outline
    assert (shipped.psnr(found, truth) - single).abs().mean() < 0.3


def test_pure_noise_gives_nothing() -> None:
    assert shipped.gain_from_pure_noise("accumulation", NOISY) < 0.5


def test_it_repeats_and_leaves_its_input_alone() -> None:
    shipped.check_repeats_and_leaves_input("accumulation", NOISY)


def test_missing_fields_are_named() -> None:
    transcript, _ = shipped.record(NOISY)
    for field in ("noisy_latents", "timesteps"):
        with pytest.raises(InputError, match=f"carries no {field}"):
            shipped.attack("accumulation", transcript, ignore=(field,))
