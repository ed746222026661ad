"""Scale, sign and kind of an update: told, or found from the noise; and what is not as it was taken is doubted."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from world import lookalikes
from world.foreign import attacked, gradient, images, made, psnr_db, run
from world.tiny import ALPHAS

from splitlab.federated.attacks.scale import clipped_to
from splitlab.federated.update import Update

N = 3 * 8 * 8


def times(shared: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: value * factor for name, value in shared.items()}


def length(shared: dict[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in shared.values()]).norm())


@pytest.mark.parametrize("factor", [65536.0, 0.25, N, 1e-4, -1.0, -0.25, 1 / 3, 16384.0, 1e8, -1e-8])
def test_usual_factors_are_found_and_said(factor: float, model: nn.Module, shared: dict[str, Tensor]) -> None:
    found, words = attacked(times(shared, factor), model)
    assert found.scale == pytest.approx(factor, rel=1e-6)
    assert psnr_db(found.images, images(1)) > 60
    assert f"is taken to be {factor:.6g} times that of the mean loss" in words


def test_the_gradient_as_it_should_be_needs_no_words(model: nn.Module, shared: dict[str, Tensor]) -> None:
    found, words = attacked(shared, model)
    assert (found.scale, words) == (1.0, "")


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        (3.7, {"scale": 3.7}),
        (-3.7, {"scale": 3.7, "sign": -1}),
        (0.1, {"lr": 0.1}),
        (0.1, {}),
        (-0.1, {"lr": 0.1}),
        (0.5, {"lr": 0.1, "steps": 5}),
    ],
)
def test_what_is_told_is_used(
    factor: float,
    told: dict[str, Any],
    model: nn.Module,
    shared: dict[str, Tensor],
) -> None:
    kind = {} if "scale" in told else {"kind": "weight_difference"}
    found, words = attacked(times(shared, factor), model, **told, **kind)
    assert psnr_db(found.images, images(1)) > 60
    assert ("what 5 local steps add up to is taken for one step's gradient" in words) == ("steps" in told)


@pytest.mark.parametrize("told", [{}, {"clipped": True}])
def test_clipped_gradients_are_known_by_their_length(
    told: dict[str, Any],
    model: nn.Module,
    shared: dict[str, Tensor],
) -> None:
    """Their scale is known as well as the noise's variance: to 5 % for 192 numbers, so 35 dB."""
    found, words = attacked(times(shared, 1 / length(shared)), model, **told)
    assert found.scale == pytest.approx(1 / length(shared), rel=0.15)
    assert psnr_db(found.images, images(1)) > 30
    assert ("its length is 1, as of a gradient clipped to it" in words) == (not told)
    assert "where the noise found has unit variance (from" in words
    update = Update(times(shared, 1.001 / length(shared)), "gradient", "epsilon", 8, "")
    assert clipped_to([update]) is None


def test_a_scale_of_no_use_is_doubted(model: nn.Module, shared: dict[str, Tensor]) -> None:
    _, words = attacked(times(shared, float(N)), model, scale=1.0)
    assert "the noise found has mean square" in words
    _, words = attacked(times(shared, 3.7), model, scale=4.2)
    assert "an image is smoother, as added noise never makes it" in words


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
def test_the_wrong_objective_is_doubted(objective: str, model: nn.Module) -> None:
    alphas, clean = ALPHAS[400], images(1)

    def turned(net: nn.Module, noisy: Tensor, t: Tensor) -> Tensor:
        """Return what makes the loss of `gradient` that of v-prediction, whose target is v in place of the noise."""
        noise = (noisy - alphas.sqrt() * clean) / (1 - alphas).sqrt()
        return run(net, noisy, t) - (alphas.sqrt() * noise - (1 - alphas).sqrt() * clean) + noise

    losses = {"epsilon": run, "v_prediction": turned}
    gradients = {name: gradient(model, clean, [400], loss)[0] for name, loss in losses.items()}
    found, words = attacked(gradients[objective], model, objective=objective)
    assert psnr_db(found.images, clean) > 60
    assert not words
    other = next(name for name in gradients if name != objective)
    _, words = attacked(gradients[objective], model, objective=other, scale=1.0, sign=1)
    assert "check objective, alphas_cumprod" in words


def test_a_wrong_schedule_is_doubted_by_the_noise_it_leaves(model: nn.Module, shared: dict[str, Tensor]) -> None:
    found, words = attacked(shared, model, alphas_cumprod=ALPHAS**1.5)
    assert psnr_db(found.images, images(1)) < 40
    assert "an image is smoother, as added noise never makes it" in words


def test_a_model_of_other_weights_is_doubted(model: nn.Module, shared: dict[str, Tensor]) -> None:
    other = made(lookalikes.ConvTimeNet)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    _, words = attacked(shared, other, n_starts=2)
    assert (
        "of the gradient stay unexplained, so the images may be wrong: the client may have had other weights" in words
    )


def test_images_that_were_fitted_only_are_doubted(model: nn.Module, shared: dict[str, Tensor]) -> None:
    part = {name: value for name, value in shared.items() if name.startswith("embed")}
    _, words = attacked(part, model, n_starts=1, n_evals=20)
    assert "others may fit as well: see whether another seed= gives the same images" in words


def test_attacks_as_published_say_that_they_find_no_scale(model: nn.Module, shared: dict[str, Tensor]) -> None:
    clean = images(1)
    noise = gradient(model, clean, [137], run)[1]
    told = {"attack": "inverting_gradients", "n_evals": 2, "noise": noise, "timesteps": 137}
    assert "inverting_gradients finds no scale or sign" in attacked(shared, model, **told)[1]
    assert "finds no scale" not in attacked(shared, model, **told, scale=1.0, sign=1)[1]
