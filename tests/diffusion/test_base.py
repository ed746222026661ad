import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from world import tiny

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import base as base_module
from splitlab.diffusion.base import Base, encoded, load_base


@pytest.fixture
def copied(base_path: Path, tmp_path: Path) -> Path:
    """Return a copy of the base model to damage."""
    return Path(shutil.copytree(base_path, tmp_path / "copied"))


def test_the_same_weights_have_the_same_digest_and_others_another(base: Base, copied: Path, tmp_path: Path):
    assert load_base(copied).digest == base.digest
    assert load_base(tiny.save_base(tmp_path / "other", seed=1)).digest != base.digest


def test_nothing_of_a_base_is_trainable_or_in_training_mode(base: Base):
    for part in (base.vae, base.unet, base.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_stable_diffusion_1_5_layout_has_its_shapes(sd15_base: Base):
    assert sd15_base.latent_shape(64) == (4, 8, 8)
    assert sd15_base.n_timesteps == 1000
    assert sd15_base.text_shape == (16, 16)
    # Golden: ᾱ of Stable Diffusion's schedule, scaled-linear betas 0.00085 to 0.012, worked out apart in float64
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(sd15_base.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=0)


def test_a_missing_directory_says_how_to_get_one(tmp_path: Path):
    with pytest.raises(InputError, match=r"base model .*nowhere: cannot be loaded: .*dvc pull"):
        load_base(tmp_path / "nowhere")


def test_a_base_without_its_text_encoder_is_refused(copied: Path):
    shutil.rmtree(copied / "text_encoder")
    with pytest.raises(InputError, match=r"base model .*copied: cannot be loaded"):
        load_base(copied)


def test_a_base_that_declares_no_text_encoder_is_refused(copied: Path):
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(
        InputError, match=r"base model .*copied: (it has no text_encoder|cannot be loaded.*text_encoder)"
    ):
        load_base(copied)


def test_damaged_weights_are_refused(copied: Path):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"base model .*copied: cannot be loaded"):
        load_base(copied)


def test_a_base_that_predicts_v_is_refused(copied: Path):
    scheduler = DDIMScheduler.from_pretrained(copied / "scheduler", prediction_type="v_prediction")
    scheduler.save_pretrained(copied / "scheduler")
    with pytest.raises(InputError, match=r"it predicts 'v_prediction'; S1 needs a noise-predicting"):
        load_base(copied)


def test_pickled_weights_are_never_read(copied: Path):
    # a model that offers only the old .bin format is refused rather than loaded
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(copied)


def test_a_prompt_that_is_too_long_is_quoted(base: Base):
    long = "red circle with navy background " * 5
    with pytest.raises(
        InputError, match=r"prompt 1, 'red circle .*, has \d+ tokens, the text model takes 16: shorten it"
    ):
        base.encode_prompts(["red circle with navy background", long])


def test_prompts_are_encoded_as_the_pipeline_encodes_them(base: Base):
    prompts = ["red circle with navy background", "", "red circle with navy background", "lime circle"]
    expected, _ = base.pipeline.encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(base.encode_prompts(prompts), expected)


def test_an_image_size_the_vae_cannot_halve_is_refused(base: Base, sd15_base: Base):
    with pytest.raises(InputError, match="18x18 pixels do not fit the VAE; use a multiple of 4"):
        base.encode(torch.zeros(1, 3, 18, 18))
    with pytest.raises(InputError, match="use a multiple of 8"):
        sd15_base.latent_shape(20)


def test_encode_is_the_scaled_posterior_mean_whatever_the_batch(base: Base, private: ImageSet):
    # the scaling factor of the tiny base is 0.5
    expected = 0.5 * base.vae.encode(private.images).latent_dist.mean
    torch.testing.assert_close(base.encode(private.images), expected)
    torch.testing.assert_close(base.encode(private.images, batch=5), expected)
    assert expected.shape == (12, *base.latent_shape(16))


def test_decode_undoes_the_scaling_and_stays_in_range(base: Base):
    latents = 3 * torch.randn(3, 4, 4, 4, generator=tiny.draw())
    expected = base.vae.decode(latents / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(base.decode(latents), expected)
    torch.testing.assert_close(base.decode(latents, batch=2), expected)


def test_noised_agrees_with_diffusers_and_denoised_inverts_it(base: Base):
    draw = tiny.draw()
    latents, noise = (torch.randn(6, 4, 4, 4, generator=draw) for _ in range(2))
    timesteps = torch.tensor([0, 1, 250, 500, 998, 999])
    noisy = base.noised(latents, noise, timesteps)
    torch.testing.assert_close(noisy, base.pipeline.scheduler.add_noise(latents, noise, timesteps))
    # at t = 999, 1/sqrt(ᾱ) is 15: float32's rounding is multiplied by that
    torch.testing.assert_close(base.denoised(noisy, noise, timesteps), latents, rtol=1e-4, atol=1e-5)


def test_encoded_data_come_from_the_cache_the_second_time(
    base: Base, private: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = encoded(base, private, cache=tmp_path)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(base_module.Base, "encode", forbidden)
    monkeypatch.setattr(base_module.Base, "encode_prompts", forbidden)
    second = encoded(base, private, cache=tmp_path)
    for name in ("latents", "hint_latents", "text"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        # the layout too: it decides how a convolution rounds, and so whether a resumed run ends the same
        assert getattr(first, name).stride() == getattr(second, name).stride()
    with pytest.raises(AssertionError, match="encoded again"):
        encoded(base, private.subset([1, 0]), cache=tmp_path)  # other content, other key
    with pytest.raises(AssertionError, match="encoded again"):
        encoded(base, private)


def test_encoded_fields_are_the_encoders_outputs(base: Base, private: ImageSet):
    whole = encoded(base, private)
    assert torch.equal(whole.latents, base.encode(private.images))
    assert torch.equal(whole.hint_latents, base.encode(private.hints))
    assert torch.equal(whole.text, base.encode_prompts(private.prompts))
    part = whole[torch.tensor([3, 1])]
    assert len(part) == 2
    assert torch.equal(part.text[1], whole.text[1])


def test_loading_a_base_warns_of_nothing(base_path: Path, diffusers_log: pytest.LogCaptureFixture):
    load_base(base_path)
    assert [record.message for record in diffusers_log.records] == []


def test_the_pipeline_of_a_base_is_an_ordinary_one(base_path: Path, base: Base):
    pipeline = StableDiffusionPipeline.from_pretrained(base_path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("lime circle", height=16, width=16, num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 16, 16)
    assert torch.equal(pipeline.unet.conv_in.weight, base.unet.conv_in.weight)
