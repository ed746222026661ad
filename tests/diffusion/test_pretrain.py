import copy
import importlib
import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import load_base
from splitlab.diffusion.controlnet import control_pipeline, generate, latent_hint_controlnet
from splitlab.diffusion.pretrain import (
    MAX_TOKENS,
    PretrainConfig,
    _average,
    _batch_shares,
    make_scheduler,
    make_tokenizer,
    make_vae,
    pretrain,
    standardise,
)

# the package exports a function of the module's name
module = importlib.import_module("splitlab.diffusion.pretrain")

SHIPPED = ROOT / "models" / "base"

CONFIG = PretrainConfig(
    vae_steps=5,
    vae_batch=4,
    vae_channels=(8, 8, 8),
    unet_steps=5,
    unet_batch=4,
    unet_channels=(8, 16),
    text_width=16,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def public() -> dict[str, ImageSet]:
    return {name: tiny.small_set(8, size=32, seed=i) for i, name in enumerate(("shapes", "photos", "digits"))}


@pytest.fixture(scope="module")
def made(public: dict[str, ImageSet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    curves = pretrain(public, folder / "base", config=CONFIG, cache=folder / "cache")
    assert set(curves) == {"vae", "unet"}
    return folder / "base"


def weights(base: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*.safetensors")}
    assert len(found) == 3  # VAE, U-Net, text model
    return found


@pytest.mark.parametrize("phase", ["vae", "unet"])
def test_an_interrupted_pretraining_ends_bit_for_bit_the_same(
    public: dict[str, ImageSet], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
):
    whole = module.generator
    steps: list[tuple[object, ...]] = []

    def interrupted(*purpose: object) -> torch.Generator:
        steps.append(purpose)
        if purpose == (CONFIG.seed, phase, 3) and steps.count(purpose) == 1:
            raise KeyboardInterrupt
        return whole(*purpose)

    monkeypatch.setattr(module, "generator", interrupted)
    options = {"config": CONFIG, "cache": tmp_path / "cache"}
    with pytest.raises(KeyboardInterrupt):
        pretrain(public, tmp_path / "base", **options)
    assert not (tmp_path / "base").exists()
    pretrain(public, tmp_path / "base", **options)
    assert weights(tmp_path / "base") == weights(made)
    assert steps.count((CONFIG.seed, phase, 2)) == 2  # repeated from the checkpoint after step 2,
    assert steps.count((CONFIG.seed, phase, 1)) == 1  # not from the start


def test_curves_are_the_same_after_an_interruption_and_end_with_a_loss(public: dict[str, ImageSet], tmp_path: Path):
    first = pretrain(public, tmp_path / "a", config=CONFIG, cache=tmp_path)
    again = pretrain(public, tmp_path / "b", config=CONFIG, cache=tmp_path)  # everything from the last checkpoints
    assert first == again
    assert all(len(curve) == 1 and 0 < curve[0] < 10 for curve in first.values())  # fewer than 50 steps: one mean


def test_another_config_does_not_go_on_from_a_checkpoint(public: dict[str, ImageSet], made: Path, tmp_path: Path):
    other = PretrainConfig(**(vars(CONFIG) | {"seed": 1}))
    pretrain(public, tmp_path / "a", config=CONFIG, cache=tmp_path / "cache")
    pretrain(public, tmp_path / "b", config=other, cache=tmp_path / "cache")
    assert weights(tmp_path / "a") == weights(made)
    assert not set(weights(tmp_path / "a").values()) & set(weights(tmp_path / "b").values())


def test_a_stable_diffusion_pipeline_loads_the_base_and_generates(made: Path, diffusers_log: pytest.LogCaptureFixture):
    pipeline = StableDiffusionPipeline.from_pretrained(made, safety_checker=None)
    assert [record.message for record in diffusers_log.records if record.levelno >= logging.WARNING] == []
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("red circle with navy background", height=32, width=32, num_inference_steps=2, output_type="pt")
    assert images.images.shape == (1, 3, 32, 32)
    assert torch.isfinite(images.images).all()
    assert pipeline.vae.config.scaling_factor == 1.0


def test_the_base_serves_the_whole_package(made: Path, public: dict[str, ImageSet]):
    base = load_base(made)
    assert base.latent_shape(32) == (4, 8, 8)
    data = public["shapes"].subset([0, 1])
    pipeline = control_pipeline(base, latent_hint_controlnet(base))
    assert generate(pipeline, data.prompts, data.hints, generator=tiny.draw(), steps=2).shape == (2, 3, 32, 32)


def test_latents_of_the_public_shapes_are_standardised(made: Path, public: dict[str, ImageSet]):
    latents = load_base(made).encode(public["shapes"].images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_standardising_changes_latents_but_not_pictures(public: dict[str, ImageSet]):
    images = public["photos"].images
    vae = make_vae(CONFIG).eval()
    draw = tiny.draw()
    with torch.no_grad():
        for parameter in (vae.quant_conv.bias, vae.quant_conv.weight, vae.post_quant_conv.bias):
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
        other = copy.deepcopy(vae)
        standardise(other, images)
        before, after = vae.encode(images).latent_dist, other.encode(images).latent_dist
        assert (before.mean - after.mean).abs().max() > 0.1
        torch.testing.assert_close(
            vae.decode(before.mean).sample, other.decode(after.mean).sample, rtol=1e-3, atol=1e-4
        )
        # the posterior's spread is scaled with its mean
        ratio = before.mean.std((0, 2, 3)) / after.mean.std((0, 2, 3))
        torch.testing.assert_close(after.std * ratio[:, None, None], before.std, rtol=1e-3, atol=1e-6)


def test_a_folder_of_other_models_is_refused_before_the_first_step(public: dict[str, ImageSet], tmp_path: Path):
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("weeks of work")
    with pytest.raises(InputError, match="which splitlab did not write; it stays"):
        pretrain(public, tmp_path / "out", config=PretrainConfig(), cache=tmp_path / "cache")
    assert weights.read_text() == "weeks of work"


def test_a_loss_that_is_not_finite_names_the_step(public: dict[str, ImageSet], tmp_path: Path):
    config = PretrainConfig(**(vars(CONFIG) | {"vae_lr": 1e38}))
    with pytest.raises(InputError, match=r"VAE: the loss is (nan|inf) at step \d; lower its learn"):
        pretrain(public, tmp_path / "base", config=config, cache=tmp_path)
    assert not (tmp_path / "base").exists()


def test_every_shapes_prompt_fits_the_text_model():
    tokenizer = make_tokenizer(tiny.PROMPTS)
    lengths = [len(ids) for ids in tokenizer(list(tiny.PROMPTS)).input_ids]
    assert max(lengths) <= MAX_TOKENS


def test_prompts_unlike_those_of_the_fit_are_spelled_not_lost():
    tokenizer = make_tokenizer(tiny.PROMPTS)
    ids = tokenizer("zebra-7").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "zebra-7"


def test_the_noise_schedule_is_stable_diffusions():
    # Golden: Rombach et al. 2022's released configuration v1-inference.yaml, linear_start 0.00085, linear_end 0.012
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(make_scheduler().alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=0)
    assert make_scheduler().alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=5e-5)


def test_batches_are_shared_out_as_configured():
    shares = {"shapes": 0.6, "photos": 0.25, "digits": 0.15}
    drawn = [_batch_shares(shares, 48, tiny.draw(seed)) for seed in range(200)]
    assert all(sum(counts.values()) == 48 for counts in drawn)
    for name, share in shares.items():
        # 9,600 draws: a standard error of at most 0.005
        assert sum(counts[name] for counts in drawn) / 9600 == pytest.approx(share, abs=0.02)


def test_averaging_moves_by_one_minus_the_decay():
    average, current = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        for parameter, value in (
            (average.weight, 1.0),
            (average.bias, 0.0),
            (current.weight, 2.0),
            (current.bias, 4.0),
        ):
            parameter.fill_(value)
    _average(average, current, 0.75)
    assert (average.weight.item(), average.bias.item()) == (1.25, 1.0)


@pytest.mark.skipif(not SHIPPED.exists(), reason="the shipped base is not here; `dvc pull` fetches it")
def test_the_shipped_base_reconstructs_shapes_and_standardises_latents():
    base = load_base(SHIPPED)
    data = tiny.small_set(32, size=32, seed=123)
    latents = base.encode(data.images)
    error = (base.decode(latents) - data.images).square().mean((1, 2, 3))
    # the field notes report 33 to 39 dB for a VAE of this kind; 25 dB is what a 4x4-patch PCA reaches untrained
    assert (10 * torch.log10(4 / error)).mean() > 28
    assert base.latent_shape(32) == (4, 8, 8)
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.5
