from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from world import tiny

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import (
    LatentHintControlNet,
    LatentHintPipeline,
    control_pipeline,
    generate,
    image_hint_controlnet,
    latent_hint_controlnet,
    predict_noise,
    symsigmoid,
    symsigmoid_inverse,
)


def awake(model: ControlNetModel, seed: int = 0) -> ControlNetModel:
    """Shake all weights: a fresh ControlNet's zero convolutions would hide every difference."""
    draw = tiny.draw(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def inputs(base: Base, batch: int = 2, size: int = 16) -> tuple[torch.Tensor, ...]:
    draw = tiny.draw(5)
    noisy, hint = (torch.randn(batch, *base.latent_shape(size), generator=draw) for _ in range(2))
    return noisy, torch.randint(1000, (batch,), generator=draw), torch.randn(batch, 16, 16, generator=draw), hint


def residuals(model: ControlNetModel, *arguments: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(*arguments)
    return [*output.down_block_res_samples, output.mid_block_res_sample]


def test_symsigmoid_has_known_values():
    # Golden: |x| (2 sigmoid(x) - 1) = x tanh(x/2) for x >= 0; tanh(1/2) = 0.46211715726 and tanh(1) = 0.76159415596
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    expected = torch.tensor([-2 * 0.76159415596, -0.46211715726, 0.0, 0.46211715726, 2 * 0.76159415596])
    torch.testing.assert_close(symsigmoid(x), expected.double(), rtol=1e-6, atol=0)


def test_symsigmoid_inverse_undoes_symsigmoid():
    magnitudes = torch.logspace(-4, 3, 4001, dtype=torch.float64)
    x = torch.cat([-magnitudes.flip(0), torch.zeros(1).double(), magnitudes])
    torch.testing.assert_close(symsigmoid_inverse(symsigmoid(x)), x, rtol=1e-9, atol=0)


def test_symsigmoid_inverse_is_exact_near_zero_too():
    # the exact value x tanh(x/2), because 2 sigmoid(x) - 1 itself cancels there
    x = torch.logspace(-6, 0, 500, dtype=torch.float64)
    torch.testing.assert_close(symsigmoid_inverse(x * torch.tanh(x / 2)), x, rtol=1e-9, atol=0)


def test_symsigmoid_inverse_keeps_float32():
    x = torch.linspace(-5, 5, 101)
    back = symsigmoid_inverse(symsigmoid(x))
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-3)  # flat at 0: float32's rounding is magnified there


def test_a_fresh_controlnet_changes_nothing(base: Base):
    noisy, timesteps, text, hint = inputs(base)
    fresh = latent_hint_controlnet(base)
    assert all(not residual.any() for residual in residuals(fresh, noisy, timesteps, text, hint))
    with torch.no_grad():
        plain = base.unet(noisy, timesteps, text).sample
        controlled = predict_noise(base.unet, noisy, timesteps, text, fresh(noisy, timesteps, text, hint))
    torch.testing.assert_close(controlled, plain)


@pytest.mark.parametrize("activation", ["none", "symsigmoid"])
def test_a_latent_hint_is_added_in_front_of_an_ordinary_controlnet(base: Base, activation: str):
    noisy, timesteps, text, hint = inputs(base)
    model = awake(latent_hint_controlnet(base, activation=activation))
    plain = ControlNetModel.from_unet(base.unet).eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing
    assert all(name.startswith("controlnet_cond_embedding") for name in missing)
    # an untrained hint encoder of diffusers ends in a zero convolution, so any image adds nothing
    image = torch.randn(2, 3, 32, 32, generator=tiny.draw())
    summed = noisy + hint if activation == "none" else symsigmoid(noisy + hint)
    for one, other in zip(
        residuals(model, noisy, timesteps, text, hint), residuals(plain, summed, timesteps, text, image), strict=True
    ):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other)


def test_the_two_halves_are_the_whole(base: Base):
    noisy, timesteps, text, hint = inputs(base)
    model = awake(latent_hint_controlnet(base, activation="symsigmoid", hide_prompts=True))
    whole = residuals(model, noisy, timesteps, text, hint)
    with torch.no_grad():
        server = model.forward_smashed(model.smash(noisy, hint), timesteps, text)
    parts = [*server.down_block_res_samples, server.mid_block_res_sample]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_hidden_prompts_are_zeros_to_the_controlnet(base: Base):
    noisy, timesteps, text, hint = inputs(base)
    hiding, seeing = (awake(latent_hint_controlnet(base, hide_prompts=hide)) for hide in (True, False))
    zeros = torch.zeros_like(text)
    hidden = residuals(hiding, noisy, timesteps, text, hint)
    assert all(map(torch.equal, hidden, residuals(hiding, noisy, timesteps, zeros, hint)))
    assert all(map(torch.equal, hidden, residuals(seeing, noisy, timesteps, zeros, hint)))
    assert not torch.equal(hidden[-1], residuals(seeing, noisy, timesteps, text, hint)[-1])


@pytest.mark.parametrize(("activation", "hide_prompts"), [("none", False), ("symsigmoid", True), ("symsigmoid", False)])
def test_saving_keeps_options_and_outputs_and_warns_of_nothing(
    base: Base, tmp_path: Path, diffusers_log: pytest.LogCaptureFixture, activation: str, hide_prompts: bool
):
    model = awake(latent_hint_controlnet(base, activation=activation, hide_prompts=hide_prompts))
    model.save_pretrained(tmp_path / "c")
    again = LatentHintControlNet.from_pretrained(tmp_path / "c").eval()
    assert (again.config.activation, again.config.hide_prompts) == (activation, hide_prompts)
    arguments = inputs(base)
    assert all(map(torch.equal, residuals(model, *arguments), residuals(again, *arguments)))
    assert [record.message for record in diffusers_log.records] == []
    # the warning that would be there: a class that does not know the options gives it
    ControlNetModel.from_pretrained(tmp_path / "c")
    assert "activation" in diffusers_log.text


def test_an_ordinary_controlnet_is_saved_and_loaded_without_a_warning(
    base: Base, tmp_path: Path, diffusers_log: pytest.LogCaptureFixture
):
    model = awake(image_hint_controlnet(base, seed=0))
    model.save_pretrained(tmp_path / "c")
    again = ControlNetModel.from_pretrained(tmp_path / "c").eval()
    noisy, timesteps, text, _ = inputs(base)
    hint = torch.rand(2, 3, 16, 16, generator=tiny.draw())
    arguments = (noisy, timesteps, text, hint)
    assert all(map(torch.equal, residuals(model, *arguments), residuals(again, *arguments)))
    assert [record.message for record in diffusers_log.records] == []


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(InputError, match="activation 'relu' is unknown; choose one of none, symsigmoid"):
        LatentHintControlNet(activation="relu")


def test_the_hint_encoder_is_seeded_and_leaves_the_global_random_state(base: Base):
    before = torch.get_rng_state()
    one, same, other = (image_hint_controlnet(base, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    name = "controlnet_cond_embedding.conv_in.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("world", ["tiny", "sd15"])
@pytest.mark.parametrize("kind", ["latent hints", "image hints"])
def test_generate_follows_seed_and_hint(base: Base, sd15_base: Base, world: str, kind: str):
    models, size = (base, 16) if world == "tiny" else (sd15_base, 64)
    data = tiny.small_set(2, size=size)
    latent = kind == "latent hints"
    model = awake(latent_hint_controlnet(models) if latent else image_hint_controlnet(models, seed=0))
    pipeline = control_pipeline(models, model)
    assert isinstance(pipeline, LatentHintPipeline) == latent

    def pictures(hints: torch.Tensor, seed: int, batch: int = 64) -> torch.Tensor:
        return generate(pipeline, data.prompts, hints, generator=tiny.draw(seed), steps=3, batch=batch)

    made = pictures(data.hints, 0)
    assert made.shape == data.images.shape
    assert made.min() >= -1
    assert made.max() <= 1
    assert made.std() > 0.01
    assert torch.equal(made, pictures(data.hints, 0))
    assert not torch.equal(made, pictures(data.hints, 1))
    assert not torch.equal(made, pictures(data.hints.flip(-1), 0))


def test_images_that_are_no_numbers_are_not_returned(base: Base):
    model = awake(latent_hint_controlnet(base))
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    data = tiny.small_set(2)
    with pytest.raises(InputError, match="2 of 2 generated images hold NaN or infinity"):
        generate(control_pipeline(base, model), data.prompts, data.hints, generator=tiny.draw(), steps=3)


def test_the_pipeline_encodes_hints_as_training_does(base: Base):
    data = tiny.small_set(2)
    pipeline = control_pipeline(base, latent_hint_controlnet(base))
    prepared = pipeline.prepare_image((data.hints + 1) / 2, 16, 16, 2, 1, "cpu", torch.float32)
    torch.testing.assert_close(prepared, base.encode(data.hints))
