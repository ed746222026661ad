"""Which parameter a name means: prefixes of wrappers, and the names of LoRA layers in each library's way."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from splitlab.core.errors import InputError
from splitlab.federated.client import pixel_unet
from splitlab.federated.gradient_files import by_parameter
from splitlab.federated.parameter_names import match_names
from splitlab.federated.update import Update, check_update


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return pixel_unet(8, seed=0, channels=(32, 32))


@pytest.fixture(scope="module")
def adapted() -> nn.Module:
    net = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return net


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


PREFIXES = (
    *("module.", "_orig_mod.", "_module.", "unet.", "model.", "_fsdp_wrapped_module.", "net.0."),
    *("module._orig_mod.", "_orig_mod.module.", "pipeline.unet.", "model.diffusion_model."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_prefix_is_taken_off_and_said(prefix: str, unet: nn.Module) -> None:
    names = names_of(unet)
    found, words = match_names([prefix + name for name in names], unet)
    assert found == {prefix + name: name for name in names}
    assert words == (f"names matched to the model's, e.g. {prefix}{names[0]} is {names[0]}",)
    some = [name for name in names if name.startswith("mid_block")]
    assert list(match_names([prefix + name for name in some], unet)[0].values()) == some


def test_wrappers_inside_names_are_taken_off(unet: nn.Module) -> None:
    names = names_of(unet)
    inner = [name.replace("mid_block.", "mid_block._fsdp_wrapped_module.") for name in names]
    assert list(match_names(inner, unet)[0].values()) == names
    mixed = [name if number % 2 else f"module.{name}" for number, name in enumerate(names)]
    assert list(match_names(mixed, unet)[0].values()) == names


def test_a_model_may_be_the_one_that_has_the_prefix(unet: nn.Module) -> None:
    whole, names = nn.Module(), names_of(unet)
    whole.net = unet
    assert list(match_names(names, whole)[0].values()) == [f"net.{name}" for name in names]
    whole.twin = pixel_unet(8, seed=0, channels=(32, 32))
    assert match_names(names, whole)[0] == {name: name for name in names}


def test_other_parts_of_a_pipeline_are_left_out_and_said(unet: nn.Module) -> None:
    names = names_of(unet)
    found, words = match_names([*names, "vae.encoder.conv_in.weight", "text_encoder.layer.bias"], unet)
    assert list(found) == names
    assert words == (
        "vae.encoder.conv_in.weight, text_encoder.layer.bias left out: no part of the denoiser's gradient",
    )


def test_names_that_mean_nothing_or_one_thing_twice_are_refused(unet: nn.Module) -> None:
    names = names_of(unet)
    value = torch.ones(unet.get_parameter(names[0]).shape)
    (named,), _ = by_parameter({"elsewhere.first": value}, unet, "gradient")
    with pytest.raises(InputError, match=r"this UNet2DModel has no parameter elsewhere\.first; load the architecture"):
        check_update(Update(named, "gradient", "epsilon", 8, ""), unet)
    with pytest.raises(InputError, match="mean one parameter; give each once"):
        match_names([*(f"module.{name}" for name in names), names[0]], unet)


def old(name: str) -> str:
    name = re.sub(r"\.to_out\.0\.lora_", ".processor.to_out_lora.lora_", name)
    name = re.sub(r"\.(to_[qkv])\.lora_", r".processor.\1_lora.lora_", name)
    return name.replace(".lora_A.default", ".down").replace(".lora_B.default", ".up")


def kohya(name: str) -> str:
    path, letter = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", name).groups()
    return f"lora_unet_{path.replace('.', '_')}.lora_{'down' if letter == 'A' else 'up'}.weight"


LIBRARIES = {
    "the model's": lambda name: name,
    "peft's file": lambda name: "base_model.model." + name.replace(".default", ""),
    "diffusers' file": lambda name: "unet." + name.replace(".default", ""),
    "another adapter's": lambda name: name.replace(".default", ".mine"),
    "diffusers' before peft": lambda name: "unet." + old(name),
    "diffusers' between": lambda name: name.replace(".lora_A.default", ".lora.down").replace(
        ".lora_B.default", ".lora.up"
    ),
    "kohya's": kohya,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_lora_names_of_every_library(library: str, adapted: nn.Module, unet: nn.Module) -> None:
    names = [name for name in names_of(adapted) if ".lora_" in name]
    assert len(names) > 10
    given = [LIBRARIES[library](name) for name in names]
    assert list(match_names(given, adapted)[0].values()) == names
    with pytest.raises(InputError, match="of adapters, and this UNet2DModel has none: add those that the client"):
        match_names(given, unet)


def test_alphas_of_kohya_are_left_out(adapted: nn.Module) -> None:
    names = [kohya(name) for name in names_of(adapted) if ".lora_" in name]
    alphas = [name.split(".")[0] + ".alpha" for name in names]
    found, words = match_names([*names, *dict.fromkeys(alphas)], adapted)
    assert list(found) == names
    assert "left out" in words[0]


def test_a_wrapped_layer_has_the_name_it_had(adapted: nn.Module) -> None:
    inner = [name for name in names_of(adapted) if ".base_layer." in name]
    found, _ = match_names([name.replace(".base_layer", "") for name in inner], adapted)
    assert list(found.values()) == inner
