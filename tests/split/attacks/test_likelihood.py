"""rMLE on recorded messages of the shipped base model: what the search adds, and that it reads the message only."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from world import shipped, tiny

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.diffusion.base import encoded
from splitlab.split.attacks.likelihood import (
    ACCURACY,
    denoise,
    denoising_error,
    likelihood,
    mean_gradient,
    total_variation,
)
from splitlab.split.client import Client, client_send, noise_loss
from splitlab.split.config import Defences
from splitlab.split.messages import Knowledge, Observation, Reconstruction
from splitlab.split.server import run_attack
from splitlab.split.wire import from_bytes

S1 = Defences(symsigmoid=True, fixed_noise=0.5, half=True, hide_prompts=True)
EARLY = 200

pytestmark = shipped.needs_shipped


@pytest.fixture(scope="module")
def public() -> ImageSet:
    return shipped.public(100)


@pytest.fixture(scope="module")
def victims() -> ImageSet:
    return shipped.victims(48)


@pytest.fixture(scope="module")
def send(victims: ImageSet) -> Callable[..., tuple[Observation, torch.Tensor]]:
    """Return a function that records one message of one client, and the true images of its samples."""
    data = encoded(shipped.base(), victims, cache=shipped.CACHE)

    def message(
        defences: Defences, *, keep: int = 12, batch: int = 24, below: int = 1000
    ) -> tuple[Observation, torch.Tensor]:
        client = Client(0, shipped.base(), data, torch.arange(len(victims)), defences, key=Key.published(5))
        payload, truth = client_send(client, 0, batch)
        chosen = (truth.timesteps < below).nonzero().flatten()[:keep]
        return from_bytes(payload).map(lambda value: value[chosen]), victims.images[truth.indices[chosen]]

    return message


def attack(seen: Observation, knowledge: Knowledge, name: str = "likelihood", **options: object) -> Reconstruction:
    return run_attack(name, [seen], knowledge, generator=tiny.draw(), options=options)


def psnr(found: Reconstruction, images: torch.Tensor) -> float:
    assert found.images is not None
    return float(metrics.psnr_db(found.images, images).mean())


def know(public: ImageSet, defences: Defences, scheme: str = "split") -> Knowledge:
    return Knowledge(shipped.base(), scheme, defences, public.size, public)


def test_the_label_takes_it_to_the_vae_ceiling_and_beyond(public: ImageSet, send: Callable) -> None:
    seen, images = send(Defences())
    knowledge = know(public, Defences())
    told: list[tuple[str, int, int, float]] = []
    found = likelihood([seen], knowledge, generator=tiny.draw(), callback=lambda *news: told.append(news), batch=8)
    ceiling = float(shipped.ceiling(images).mean())
    assert psnr(found, images) > ceiling + 0.5  # pixels are not bound to what the decoder can draw
    assert found.objective[-1] < 0.7 * found.objective[0]
    assert found.used == ("timesteps", "noisy_latents", "noise", "smashed")
    assert [news[:3] for news in told] == [("likelihood", i + 1, 40) for i in range(40)]
    assert found.hints is not None
    assert found.images is not None
    assert found.images.abs().max() <= 1.0
    inside = attack(seen, knowledge, space="latents", hints="none", steps=4)
    assert abs(psnr(inside, images) - ceiling) < 0.5


def test_it_finds_the_image_from_the_mean_public_image(public: ImageSet, send: Callable) -> None:
    seen, images = send(Defences(), keep=4)
    knowledge = know(public, Defences())
    found = attack(seen, knowledge, start="mean", steps=120, lr=0.1, hints="none")
    guess = attack(seen, knowledge, "mean_public")
    assert psnr(found, images) > psnr(guess, images) + 10.0
    assert found.objective[-1] < 0.05 * found.objective[0]


def test_without_the_label_it_beats_the_denoiser_early(public: ImageSet, send: Callable) -> None:
    seen, images = send(Defences(), batch=48, below=EARLY)
    seen, knowledge = seen.without("noise"), know(public, Defences())
    found = attack(seen, knowledge, hints="none")
    assert found.objective[-1] < 0.8 * found.objective[0]
    assert found.used == ("timesteps", "noisy_latents", "encoder_hidden_states")
    assert psnr(found, images) > psnr(attack(seen, knowledge, "one_step"), images) + 0.3
    assert psnr(found, images) > psnr(attack(seen, knowledge, "mean_public"), images) + 10.0
    plain = {start: attack(seen, knowledge, prior="none", start=start, hints="none") for start in ("view", "denoised")}
    assert psnr(found, images) > max(psnr(other, images) for other in plain.values()) + 0.5
    assert psnr(plain["view"], images) > psnr(attack(seen, knowledge, "mean_public"), images) + 8.0


@pytest.mark.parametrize("denied", [(), ("noise",)], ids=str)
def test_pure_noise_gives_nothing(public: ImageSet, send: Callable, denied: tuple[str, ...]) -> None:
    seen, images = send(S1)
    (noised,) = shipped.noised([seen.without(*denied)])
    knowledge = know(public, S1)
    found = attack(noised, knowledge, steps=5)
    assert torch.isfinite(found.images).all()
    assert psnr(found, images) < psnr(attack(noised, knowledge, "mean_public"), images) + 0.5


def test_it_repeats_exactly_draws_nothing_and_leaves_its_input_alone(public: ImageSet, send: Callable) -> None:
    seen, _ = send(S1, keep=4)
    before = {k: v.clone() for k, v in seen.tensors.items()}
    weights = {k: v.clone() for k, v in shipped.base().vae.state_dict().items()}
    first, second = (attack(seen.without("noise"), know(public, S1), steps=3) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert first.objective == second.objective
    assert all(torch.equal(seen.tensors[name], value) for name, value in before.items())
    assert all(torch.equal(value, weights[name]) for name, value in shipped.base().vae.state_dict().items())
    assert not first.images.requires_grad
    assert all(p.grad is None for p in shipped.base().vae.parameters())


def test_it_works_through_s1s_defences_and_u_shaped(public: ImageSet, send: Callable) -> None:
    seen, images = send(S1, keep=8)
    ceiling = float(shipped.ceiling(images).mean())
    found = attack(seen, know(public, S1), hints="none")
    assert psnr(found, images) > ceiling

    message = seen.float()
    noise_pred = torch.randn(message.need("noise").shape, generator=tiny.draw(3)).requires_grad_()
    loss = noise_loss(shipped.base(), S1, noise_pred, message.need("noise"), message.need("timesteps"))
    (gradient,) = torch.autograd.grad(loss, noise_pred)
    u_shaped = replace(seen.without("noise"), noise_pred=noise_pred.detach(), noise_pred_gradient=gradient)
    same = attack(u_shaped, know(public, S1, "u_shaped"), hints="none")
    assert same.used == ("timesteps", "noisy_latents", "noise_pred", "noise_pred_gradient")
    assert psnr(same, images) == pytest.approx(psnr(found, images), abs=0.1)


@pytest.mark.parametrize("defences", [Defences(feature_noise=0.3), Defences(feature_noise=0.3, matched=True)], ids=str)
def test_feature_noise_is_met_with_its_own_variance(public: ImageSet, send: Callable, defences: Defences) -> None:
    seen, images = send(defences, keep=8, below=600)
    knowledge = know(public, defences)
    found = attack(seen, knowledge, hints="none")
    assert psnr(found, images) > psnr(attack(seen, knowledge, "closed_form"), images) + 3.0


def test_hints_are_solved_for_or_searched_for(public: ImageSet, send: Callable) -> None:
    seen, _ = send(Defences(symsigmoid=True), keep=4)
    knowledge = know(public, Defences(symsigmoid=True))
    solved, searched = (attack(seen, knowledge, hints=way, steps=10).hints for way in ("solve", "optimise"))
    encode = shipped.base().encode
    start, end = (float((encode(hint) - encode(solved)).abs().mean()) for hint in (solved, searched))
    assert searched.shape == solved.shape
    assert not torch.equal(searched, solved)
    assert start == 0.0
    assert end < 0.2
    assert attack(seen, knowledge, hints="none", steps=1).hints is None
    untold = attack(seen.without("smashed"), knowledge, hints="optimise", steps=1)
    assert untold.hints is None
    assert "smashed" not in untold.used


def test_the_denoisers_error_is_foretold_from_public_images(public: ImageSet, victims: ImageSet) -> None:
    knowledge = know(public, Defences())
    std = torch.tensor([0.15, 0.4, 1.0])[:, None, None, None]
    foretold = denoising_error(std, knowledge, prompts=False).flatten()
    latents = shipped.base().encode(victims.images)
    for level, expected in zip(std.flatten(), foretold, strict=True):
        view = latents + level * torch.randn(latents.shape, generator=tiny.draw(5))
        found = denoise(view, level.expand(len(view))[:, None, None, None], None, knowledge)
        assert float((found - latents).square().mean().sqrt()) == pytest.approx(float(expected), rel=0.25)
    assert (foretold.diff() > 0).all()
    assert (foretold < std.flatten()).all()
    assert foretold[0] > ACCURACY / 2


def test_total_variation_counts_edges() -> None:
    images = -torch.ones(2, 3, 8, 8)
    images[1, :, :, 4:] = 1.0  # one vertical edge of height 2 and length 8, in three channels
    assert total_variation(images, smoothing=1e-6) == pytest.approx([0.0, 48.0], abs=1e-3)
    assert mean_gradient(images) == pytest.approx(48.0 / 2 / 192, rel=1e-3)
    assert mean_gradient(images[:1]) == 1e-3


def test_bad_calls_say_what_to_do(public: ImageSet, send: Callable) -> None:
    seen, _ = send(Defences(), keep=2)
    knowledge = know(public, Defences())
    for missing in ("noisy_latents", "timesteps"):
        with pytest.raises(InputError, match=f"carries no {missing}"):
            attack(seen.without(missing), knowledge)
    with pytest.raises(InputError, match="space 'dreams' is unknown; choose one of pixels, latents"):
        attack(seen, knowledge, space="dreams")
    with pytest.raises(InputError, match="likelihood: steps must be 1 or more, got 0"):
        attack(seen, knowledge, steps=0)
    with pytest.raises(InputError, match="no messages to attack"):
        run_attack("likelihood", [], knowledge, generator=tiny.draw())
