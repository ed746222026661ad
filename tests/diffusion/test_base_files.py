import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from splitlab.core.errors import InputError
from splitlab.diffusion.base_files import load_model

PARTS: dict[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


@pytest.fixture
def copied(base_path: Path, tmp_path: Path) -> Path:
    """Return a copy of the base model to damage."""
    return Path(shutil.copytree(base_path, tmp_path / "copied"))


def weights(folder: Path) -> Path:
    """Return the one file of weights."""
    return next(folder.glob("*.safetensors"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a part."""
    save_file(change(load_file(weights(folder))), weights(folder), metadata={"format": "pt"})


def half(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_width_come_out_in_32_bits(copied: Path, part: str, dtype: torch.dtype):
    before = load_model(PARTS[part], copied / part).state_dict()
    rewrite(copied / part, lambda tensors: half(tensors, dtype))
    after = load_model(PARTS[part], copied / part)
    assert not after.training
    for name, tensor in after.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name].to(dtype).float())


@pytest.mark.parametrize("part", PARTS)
def test_a_variant_is_read_where_there_is_nothing_else(copied: Path, part: str):
    full = load_model(PARTS[part], copied / part).state_dict()
    plain = weights(copied / part)
    for name in ("non_ema", "fp16"):
        save_file(
            half(load_file(plain)), plain.with_name(plain.name.replace(".safe", f".{name}.safe")), {"format": "pt"}
        )
    assert all(torch.equal(t, full[k]) for k, t in load_model(PARTS[part], copied / part).state_dict().items())
    plain.unlink()
    with pytest.warns(UserWarning, match=rf"{part}: there are weights of the variant 'fp16' only; they are loaded"):
        after = load_model(PARTS[part], copied / part).state_dict()
    assert all(torch.equal(tensor, full[name].half().float()) for name, tensor in after.items())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_and_missing_ones_named(copied: Path, part: str, variant: str | None):
    model = load_model(PARTS[part], copied / part)
    weights(copied / part).unlink()
    size = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    model.save_pretrained(copied / part, max_shard_size=size // 2, variant=variant)
    shards = sorted((copied / part).glob("*-of-*.safetensors"))
    assert len(shards) > 1
    if variant:
        with pytest.warns(UserWarning, match="'fp16' only"):
            after = load_model(PARTS[part], copied / part).state_dict()
    else:
        after = load_model(PARTS[part], copied / part).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    first = sorted(load_file(shards[0]))[0]
    save_file({name: tensor for name, tensor in load_file(shards[0]).items() if name != first}, shards[0])
    with pytest.raises(InputError, match=rf"index.*json: its shards lack {first}; the model is incomplete"):
        load_model(PARTS[part], copied / part)
    shards[0].unlink()
    with pytest.raises(InputError, match=rf"{shards[0].name}: missing; the model is incomplete"):
        load_model(PARTS[part], copied / part)
    for index in (copied / part).glob("*index*"):
        index.unlink()
    with pytest.raises(InputError, match=r"shards without their index"):
        load_model(PARTS[part], copied / part)


LOST = {"vae": "quant_conv", "unet": "mid_block", "text_encoder": "layers.0"}


@pytest.mark.parametrize("part", PARTS)
def test_missing_tensors_are_named_and_counted(copied: Path, part: str):
    lost = [name for name in load_file(weights(copied / part)) if LOST[part] in name]
    rewrite(copied / part, lambda tensors: {name: t for name, t in tensors.items() if name not in lost})
    with pytest.raises(InputError, match=rf"{part}/.*safetensors: {len(lost)} tensors are missing: .*{LOST[part]}"):
        load_model(PARTS[part], copied / part)


@pytest.mark.parametrize("part", PARTS)
def test_tensors_of_another_model_are_refused(copied: Path, part: str):
    rewrite(copied / part, lambda tensors: tensors | {"motion.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"1 tensors belong to another kind .*: motion.weight; use a complete"):
        load_model(PARTS[part], copied / part)


@pytest.mark.parametrize("part", PARTS)
def test_tensors_of_another_shape_are_refused(copied: Path, part: str):
    name = sorted(load_file(weights(copied / part)))[0]
    rewrite(copied / part, lambda tensors: tensors | {name: torch.zeros(7)})
    with pytest.raises(InputError, match=r"1 tensors have other shapes than config.json says: .*\(\[7\] for \["):
        load_model(PARTS[part], copied / part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(copied: Path, part: str, value: float):
    name = sorted(load_file(weights(copied / part)))[0]
    rewrite(copied / part, lambda tensors: tensors | {name: torch.full_like(tensors[name], value)})
    with pytest.raises(InputError, match=r"1 tensors hold NaN or infinity: "):
        load_model(PARTS[part], copied / part)


@pytest.mark.parametrize("part", PARTS)
def test_whole_numbers_are_no_weights(copied: Path, part: str):
    rewrite(copied / part, lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()})
    with pytest.raises(InputError, match=r"tensors are whole numbers: .* quantised weights do not serve"):
        load_model(PARTS[part], copied / part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (lambda whole: b"", "empty"),
        (lambda whole: whole[:1000], "damaged or cut short"),
        (lambda whole: whole[:-4], "damaged or cut short"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "`git lfs pull`"),
    ],
    ids=["empty", "header", "end", "pointer"],
)
def test_damaged_files_are_refused(copied: Path, part: str, content: Callable[[bytes], bytes], problem: str):
    file = weights(copied / part)
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(InputError, match=rf"{part}/{file.name}: .*{problem}"):
        load_model(PARTS[part], copied / part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("content", ["{", "[1]", "", '{"block_out_channels": "seven", "hidden_size": "seven"}'])
def test_damaged_configurations_are_refused(copied: Path, part: str, content: str):
    (copied / part / "config.json").write_text(content)
    with pytest.raises(InputError, match=part):
        load_model(PARTS[part], copied / part)


@pytest.mark.parametrize("part", PARTS)
def test_pickled_weights_are_never_opened(copied: Path, part: str, monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", forbidden)
    file = weights(copied / part)
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    torch.save(load_file(file), file.with_name("diffusion_pytorch_model.bin"))
    load_model(PARTS[part], copied / part)
    file.unlink()
    with pytest.raises(
        InputError, match=r"only pickled weights \(diffusion_pytorch_model.bin, .*use_safetensors=False"
    ):
        load_model(PARTS[part], copied / part)


def test_what_is_not_there_is_listed(copied: Path):
    weights(copied / "unet").rename(copied / "unet" / "model.safetensors")
    with pytest.raises(
        InputError, match=r"no weights; diffusion_pytorch_model.safetensors is missing, there are .*model"
    ):
        load_model(UNet2DConditionModel, copied / "unet")
    (copied / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: cannot be read \(No such file"):
        load_model(UNet2DConditionModel, copied / "unet")


def test_old_names_of_attention_are_understood(copied: Path):
    # as diffusers wrote them before 0.15
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    before = load_model(AutoencoderKL, copied / "vae").state_dict()

    def renamed(name: str) -> str:
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        return name

    rewrite(copied / "vae", lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})
    assert any("proj_attn" in name for name in load_file(weights(copied / "vae")))
    after = load_model(AutoencoderKL, copied / "vae").state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_old_text_models_with_buffers_and_prefixes_are_understood(copied: Path):
    before = load_model(CLIPTextModel, copied / "text_encoder").state_dict()

    def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        prefixed = {f"text_model.{name}": tensor for name, tensor in bare.items()}
        return prefixed | {
            "text_model.embeddings.position_ids": torch.arange(16)[None],
            "text_projection.weight": torch.zeros(16, 16),
            "vision_model.embeddings.class_embedding": torch.zeros(16),
        }

    rewrite(copied / "text_encoder", older)
    after = load_model(CLIPTextModel, copied / "text_encoder").state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_entries_of_the_configuration_can_be_replaced(copied: Path):
    config = json.loads((copied / "vae" / "config.json").read_text())
    (copied / "vae" / "config.json").write_text(json.dumps(config | {"sample_size": None}))
    assert load_model(AutoencoderKL, copied / "vae", sample_size=8).config.sample_size == 8
