import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.pixels import to_uint8
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base, encoded, load_base
from splitlab.split.train import train

Change = Callable[[Path], Path | None]

REMOVED = object()


@pytest.fixture
def copied(base_path: Path, tmp_path: Path) -> Path:
    """Return a copy of the base model to change."""
    return Path(shutil.copytree(base_path, tmp_path / "copied"))


def entries(file: str, **values: object) -> Change:
    """Set entries of a JSON file."""

    def change(base: Path) -> None:
        content = json.loads((base / file).read_text()) | values
        (base / file).write_text(json.dumps({key: value for key, value in content.items() if value is not REMOVED}))

    return change


def index(**values: object) -> Change:
    return entries("model_index.json", **values)


def scheduler(name: str = "DDIMScheduler", **values: object) -> Change:
    def change(base: Path) -> None:
        index(scheduler=["diffusers", name])(base)
        entries("scheduler/scheduler_config.json", _class_name=name, **values)(base)

    return change


def unet(**values: object) -> Change:
    return entries("unet/config.json", **values)


def vae(**values: object) -> Change:
    return entries("vae/config.json", **values)


def text(**values: object) -> Change:
    return entries("text_encoder/config.json", **values)


def tokenizer(**values: object) -> Change:
    return entries("tokenizer/tokenizer_config.json", **values)


def removed(name: str) -> Change:
    def change(base: Path) -> None:
        path = base / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def written(name: str, content: str) -> Change:
    def change(base: Path) -> None:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(content)

    return change


def below(name: str) -> Change:
    return lambda base: base / name


def split_tokenizer(base: Path) -> None:
    """Write the two files of old tokenizers in place of the one."""
    model = json.loads((base / "tokenizer/tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (base / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
    (base / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (base / "tokenizer/tokenizer.json").unlink()


def few_tokens(base: Path) -> None:
    """Give the text model fewer embeddings than the tokenizer has tokens."""
    file = base / "text_encoder/model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "token_embedding" in name)
    save_file(tensors | {name: tensors[name][:10].clone()}, file, metadata={"format": "pt"})
    text(vocab_size=10)(base)


def whole_clip(base: Path) -> None:
    """Give the text model the configuration of all of CLIP."""
    whole = json.loads((base / "text_encoder/config.json").read_text())
    text(model_type="clip", architectures=["CLIPModel"], text_config=whole)(base)


def old_layout(base: Path) -> None:
    """Write the configuration of tokenizer, text model and sampler as Stable Diffusion 1.5 has it."""
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = (token | {"content": content} for content in ("<|startoftext|>", "<|endoftext|>"))
    split_tokenizer(base)
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
    (base / "tokenizer/special_tokens_map.json").write_text(json.dumps(special))
    typed = {key: {"__type": "AddedToken"} | value for key, value in special.items() if isinstance(value, dict)}
    (base / "tokenizer/tokenizer_config.json").write_text(
        json.dumps(typed | {"model_max_length": 77, "errors": "replace"})
    )
    text(torch_dtype="float32", dtype=REMOVED, transformers_version="4.22.0.dev0", dropout=0.0)(base)
    scheduler("PNDMScheduler", skip_prk_steps=True, clip_sample=False)(base)


def one_further_down(base: Path) -> Path:
    outer = base.with_name("outer")
    outer.mkdir()
    base.rename(outer / "model")
    return outer


def lora(base: Path) -> Path:
    save_file({"up": torch.zeros(1)}, base / "pytorch_lora_weights.safetensors")
    (base / "model_index.json").unlink()
    shutil.rmtree(base / "unet")
    return base


REFUSED: dict[str, tuple[Change, str]] = {
    "inpainting": (unet(in_channels=9), r"unet: it takes 9 channels, the VAE's latents have 4: it fills holes"),
    "pix2pix": (unet(in_channels=8), r"unet: it takes 8 channels.*edits images \(instruct-pix2pix\)"),
    "upscaler": (unet(in_channels=7), r"unet: it takes 7 channels"),
    "pixels": (unet(in_channels=3), r"unet: it takes 3 channels"),
    "learned-variance": (unet(out_channels=8), r"unet: it returns 8 channels.*variance"),
    "two-latents": (
        vae(latent_channels=16),
        r"unet: it takes 4 channels, the VAE's latents have 16: parts of two models",
    ),
    "two-widths": (unet(cross_attention_dim=32), r"unet: it attends to texts of width 32, the text model's have 16"),
    "sdxl-unet": (unet(addition_embed_type="text_time"), r"addition_embed_type is 'text_time': .*SDXL"),
    "class-embedding": (unet(class_embed_type="timestep"), r"class_embed_type is 'timestep': it is class-conditional"),
    "centred": (unet(center_input_sample=True), "center_input_sample is True: a ControlNet does not centre its input"),
    "time-embedding": (unet(timestep_post_act="silu"), "timestep_post_act is 'silu': a ControlNet cannot copy"),
    "classes": (unet(num_class_embeds=10), r"num_class_embeds is 10: it is class-conditional"),
    "lcm": (unet(time_cond_proj_dim=256), r"time_cond_proj_dim is 256: .*distilled"),
    "deepfloyd": (unet(encoder_hid_dim=4096), r"encoder_hid_dim is 4096: .*DeepFloyd"),
    "kandinsky": (unet(encoder_hid_dim_type="image_proj"), r"encoder_hid_dim_type is 'image_proj': .*Kandinsky"),
    "gligen": (unet(attention_type="gated"), r"attention_type is 'gated': .*GLIGEN"),
    "fourier": (unet(time_embedding_type="fourier"), r"time_embedding_type is 'fourier': a ControlNet cannot copy"),
    "quantised": (unet(quantization_config={"quant_method": "bitsandbytes"}), r"unet: quantised weights"),
    "other-unet": (unet(_class_name="UNet2DModel"), r"unet: its class is UNet2DModel"),
    "blocks": (unet(down_block_types=["Nope", "Nope"]), r"unet: no UNet2DConditionModel can be made of it"),
    "tiny-vae": (vae(_class_name="AutoencoderTiny"), r"vae: its class is AutoencoderTiny"),
    "shifted-vae": (vae(shift_factor=0.1), r"vae: its latents are shifted"),
    "mean-vae": (vae(latents_mean=[0.1, 0, 0, 0]), r"vae: its latents are shifted"),
    "scaling-0": (vae(scaling_factor=0), r"vae: scaling_factor is 0; it is a positive number"),
    "scaling-null": (vae(scaling_factor=None), r"vae: scaling_factor is None"),
    "rgba-vae": (vae(in_channels=4), r"vae: in_channels is 4"),
    "t5": (text(model_type="t5"), r"text_encoder: model_type is t5"),
    "sdxl": (index(_class_name="StableDiffusionXLPipeline"), r"it is for StableDiffusionXLPipeline.*two text encoders"),
    "sd3": (index(_class_name="StableDiffusion3Pipeline"), r"it is for StableDiffusion3Pipeline.*flow matching"),
    "unclip": (index(_class_name="StableUnCLIPPipeline"), r"it is for StableUnCLIPPipeline.*image embeddings"),
    "if": (index(_class_name="IFPipeline"), r"it is for IFPipeline.*pixels"),
    "own-pipeline": (index(_class_name=["mine", "MyPipeline"]), r"it is for MyPipeline, not for Stable Diffusion 1.x"),
    "second-text": (index(text_encoder_2=["transformers", "CLIPTextModel"]), r"it has a text_encoder_2"),
    "transformer": (index(unet=REMOVED, transformer=["diffusers", "Transformer"]), r"it has a transformer"),
    "no-unet": (index(unet=[None, None]), r"model_index.json: it has no unet"),
    "vae-kind": (index(vae=["diffusers", "VQModel"]), r"the class of its vae is VQModel"),
    "index-damaged": (written("model_index.json", "{"), r"model_index.json: damaged"),
    "no-scheduler": (removed("scheduler"), r"scheduler_config.json: cannot be read \(No such file"),
    "v": (scheduler(prediction_type="v_prediction"), r"it predicts 'v_prediction'; S1 needs a noise-predicting"),
    "sample": (scheduler(prediction_type="sample"), r"it predicts 'sample'; S1 needs a noise-predicting"),
    "zero-snr": (scheduler(rescale_betas_zero_snr=True), r"rescale_betas_zero_snr is set: .*no noise prediction leads"),
    "zero-snr-euler": (
        scheduler("EulerDiscreteScheduler", rescale_betas_zero_snr=True),
        r"rescale_betas_zero_snr is set",
    ),
    "no-signal": (scheduler(trained_betas=[0.01] * 999 + [1.0]), r"the betas leave no signal at the end"),
    "flow": (scheduler("FlowMatchEulerDiscreteScheduler"), r"FlowMatchEulerDiscreteScheduler is for flow matching"),
    "flow-sigmas": (scheduler("UniPCMultistepScheduler", use_flow_sigmas=True), r"is for flow matching"),
    "distilled": (scheduler("LCMScheduler"), r"LCMScheduler is no sampler of Stable Diffusion's kind"),
    "edm": (scheduler("EDMEulerScheduler"), r"EDMEulerScheduler is no sampler of Stable Diffusion's kind"),
    "few-steps": (scheduler(num_train_timesteps=500), r"500 timesteps with 500 betas"),
    "few-betas": (scheduler(trained_betas=[0.01] * 10), r"1000 timesteps with 10 betas"),
    "nan-betas": (scheduler(trained_betas=[float("nan")] * 1000), r"does not fall from 1 to 0"),
    "flat-betas": (scheduler(trained_betas=[0.0] + [0.01] * 999), r"does not fall from 1 to 0"),
    "large-betas": (scheduler(trained_betas=[0.01] * 990 + [1.5] * 10), r"does not fall from 1 to 0"),
    "word-betas": (scheduler(beta_start="x"), r"no schedule can be made of it"),
    "spacing": (scheduler(timestep_spacing="wide"), r"no schedule can be made of it \(wide is not supported"),
    "tokens": (few_tokens, r"tokenizer: its tokens are numbered up to \d+, the text model knows 10"),
    "length-word": (tokenizer(model_max_length="77"), r"tokenizer: model_max_length is '77'"),
    "length-not-a-number": (tokenizer(model_max_length=float("nan")), r"tokenizer: model_max_length is nan"),
    "class-empty": (index(_class_name=[]), "its configuration has entries of no type"),
    "channels-list": (unet(in_channels=[4]), "its configuration has entries of no type"),
    "text-config-list": (text(text_config=[1]), "its configuration has entries of no type"),
    "factor-true": (vae(scaling_factor=True), "scaling_factor is True; it is a positive number"),
    "latent-true": (vae(latent_channels=True), "latent_channels is True; it is a whole number"),
    "no-betas": (
        scheduler(beta_start=REMOVED, beta_end=REMOVED),
        r"scheduler_config\.json: it does not say beta_start, beta_end",
    ),
    "length-negative": (tokenizer(model_max_length=-1), r"tokenizer: model_max_length is -1"),
    "no-end": (tokenizer(eos_token=None), r"tokenizer: "),
    "t5-tokenizer": (tokenizer(tokenizer_class="T5Tokenizer"), r"tokenizer: its class is T5Tokenizer"),
    "no-tokenizer": (removed("tokenizer"), r"tokenizer: no tokenizer; it needs tokenizer.json"),
    "no-tokens": (removed("tokenizer/tokenizer.json"), r"tokenizer: no tokenizer; it needs tokenizer.json"),
    "tokenizer-damaged": (written("tokenizer/tokenizer.json", "{}"), r"tokenizer: no tokenizer can be made of it"),
    "unet-alone": (below("unet"), r"UNet2DConditionModel alone; a base needs the folders vae, unet"),
    "text-alone": (below("text_encoder"), r"CLIPTextModel alone; a base needs the folders"),
    "lora": (lora, r"LoRA weights, which are added to a base"),
    "nothing": (below("scheduler"), r"no diffusers model \(scheduler_config.json\)"),
    "outer": (one_further_down, r"the model is one folder further down: name .*outer/model"),
    "one-file": (
        below("unet/diffusion_pytorch_model.safetensors"),
        r"one file, .*from_single_file\('.*'\).save_pretrained",
    ),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_such_model_is_refused_with_the_reason(copied: Path, change: Change, reason: str):
    source = change(copied) or copied
    with pytest.raises(InputError, match=rf"^base model {source}: cannot be loaded: .*{reason}"):
        load_base(source)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_one_pickled_file_is_never_opened(tmp_path: Path, name: str):
    torch.save({"state_dict": {}}, tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(
            InputError, match=rf"{name}: pickled. Opening it runs its code, .*from_single_file\('.*{name}'"
        ):
            load_base(source)


SAME: dict[str, Change] = {
    "no-index": removed("model_index.json"),
    "slow-tokenizer": split_tokenizer,
    "no-tokenizer-config": removed("tokenizer/tokenizer_config.json"),
    "no-length": tokenizer(model_max_length=REMOVED),
    "longer": tokenizer(model_max_length=77),
    "length-without-end": tokenizer(model_max_length=float("inf")),
    "old-scheduler": scheduler(clip_sample=REMOVED, steps_offset=REMOVED),
    "clipped": scheduler(clip_sample=True, steps_offset=0),
    "no-padding": tokenizer(pad_token=None),
    "fast-class": tokenizer(tokenizer_class="CLIPTokenizerFast"),
    "one-width-per-block": unet(cross_attention_dim=[16, 16]),
    "no-size": unet(sample_size=None),
    "no-true-size": unet(sample_size=True),
    "no-vae-size": vae(sample_size=None),
    "list-size": lambda base: (unet(sample_size=[4, 4])(base), vae(sample_size=[16, 16])(base))[0],
    "whole-clip": whole_clip,
    "old-layout": old_layout,
    "safety": index(
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        requires_safety_checker=True,
    ),
    "inpainting-pipeline": index(_class_name="StableDiffusionInpaintPipeline"),
    "controlnet-pipeline": index(_class_name="LatentHintPipeline", controlnet=["splitlab", "LatentHintControlNet"]),
    "lora-beside": written("unet/pytorch_lora_weights.safetensors", ""),
    "training-entries": unet(decay=0.99, optimization_step=7),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_other_ways_to_write_the_same_model_make_the_same_model(base: Base, copied: Path, change: Change):
    change(copied)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of diffusers, about entries that are set right
        other = load_base(copied)
    assert other.digest == base.digest
    assert not other.pipeline.scheduler.config.clip_sample
    assert other.pipeline.scheduler.config.steps_offset == 1
    assert other.text_shape == base.text_shape
    assert isinstance(other.unet.config.sample_size, int)
    prompts = ["lime circle with navy background", "red circle"]
    assert torch.equal(other.encode_prompts(prompts), base.encode_prompts(prompts))
    latents = torch.randn(2, 4, 4, 4, generator=tiny.draw())
    assert torch.equal(other.decode(latents), base.decode(latents))
    assert torch.equal(other.alphas_cumprod, base.alphas_cumprod)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_other_samplers_give_way_to_ddim_on_their_schedule(base: Base, copied: Path, name: str):
    scheduler(name)(copied)
    with pytest.warns(UserWarning, match=rf"sampling is by DDIM on the schedule of its {name}"):
        other = load_base(copied)
    assert isinstance(other.pipeline.scheduler, DDIMScheduler)
    assert not other.pipeline.scheduler.config.clip_sample
    assert torch.equal(other.alphas_cumprod, base.alphas_cumprod)


def test_lora_weights_beside_a_base_are_not_passed_over(base: Base, copied: Path):
    written("pytorch_lora_weights.safetensors", "")(copied)
    with pytest.warns(UserWarning, match=r"pytorch_lora_weights\.safetensors: not read; the base is the model without"):
        assert load_base(copied).digest == base.digest


def test_a_unet_of_stable_diffusion_2_loads(base: Base, copied: Path):
    changes = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    with torch.random.fork_rng(devices=[]):
        UNet2DConditionModel.from_config(dict(base.unet.config) | changes).save_pretrained(copied / "unet")
    other = load_base(copied)
    assert list(other.unet.config.attention_head_dim) == [2, 4]
    assert other.digest != base.digest


def test_betas_given_one_by_one_are_the_schedule(copied: Path):
    betas = torch.linspace(1e-4, 0.02, 1000).tolist()
    scheduler(trained_betas=betas)(copied)
    torch.testing.assert_close(load_base(copied).alphas_cumprod, tiny.ALPHAS)


def test_the_shorter_of_tokenizer_and_text_model_decides(copied: Path):
    tokenizer(model_max_length=12)(copied)
    short = load_base(copied)
    assert short.text_shape == (12, 16)
    assert short.encode_prompts(["lime circle"]).shape == (1, 12, 16)
    with pytest.raises(InputError, match="the text model takes 12"):
        short.encode_prompts(["red circle with navy background " * 3])


def test_a_vae_that_states_no_factor_has_stable_diffusions(copied: Path):
    vae(scaling_factor=REMOVED)(copied)
    assert load_base(copied).vae.config.scaling_factor == 0.18215


def test_encoded_data_are_of_this_scaling_and_tokenizer(base: Base, copied: Path, private: ImageSet, tmp_path: Path):
    encoded(base, private, cache=tmp_path)
    vae(scaling_factor=2.0)(copied)
    tokenizer(model_max_length=12)(copied)
    other = encoded(load_base(copied), private, cache=tmp_path)
    torch.testing.assert_close(other.latents, 4 * encoded(base, private, cache=tmp_path).latents)
    assert other.text.shape[1] == 12


def test_files_of_16_bits_train_and_generate_as_those_of_32(copied: Path, private: ImageSet, tmp_path: Path):
    # as many fine-tuned models are stored: transformers would keep the text model in 16 bits, diffusers not the rest
    for file in copied.rglob("*.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file({name: tensor.float() for name, tensor in half.items()}, file, metadata={"format": "pt"})
    full = load_base(copied)
    for file in copied.rglob("*.safetensors"):
        save_file({n: tensor.half() for n, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    text(dtype="float16")(copied)
    half = load_base(copied)
    assert half.digest == full.digest
    records = []
    for name, base in (("full", full), ("half", half)):
        data = private.subset(range(4))
        records.append(
            train("probe", tiny.config(steps=2), base, data, data, out=tmp_path / name, cache=tmp_path / "c")
        )
    assert records[0] == records[1]


def test_two_loads_are_one_model_wherever_it_lies(
    base: Base, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = tmp_path / "Modèle de base 1.5"
    copied.rename(place)
    (tmp_path / "link").symlink_to(place)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder in (place, *place.iterdir()):
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    before = sorted(os.listdir(place))
    for source in (place, f"{place}/", tmp_path / "link", "~/link", "link", "./link/"):
        assert load_base(source).digest == base.digest
    assert sorted(os.listdir(place)) == before
    place.chmod(0o755)


def test_images_that_are_no_numbers_are_never_returned(base: Base, private: ImageSet):
    latents = torch.zeros(3, 4, 4, 4)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="1 of 3 latents to decode hold NaN or infinity"):
        base.decode(latents)
    with pytest.raises(InputError, match="3 of 3 images that the VAE decodes hold NaN or infinity"):
        base.decode(torch.full((3, 4, 4, 4), 3e38))
    with pytest.raises(InputError, match="1 of 1 latents that the VAE encodes hold NaN"):
        base.encode(torch.full((1, 3, 16, 16), float("nan")))
    with pytest.raises(InputError, match="1 of 3 images hold NaN"):
        to_uint8(latents)
