"""What a client shares is the gradient of its loss, all of it and nothing else; files that do not fit are named."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from world import tiny
from world.tiny import ALPHAS, update_truth

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import latent_hint_controlnet
from splitlab.diffusion.denoisers import ControlledUNet, predict
from splitlab.federated.client import (
    InversionKnowledge,
    noised,
    pixel_unet,
    share,
    share_each,
    target_of,
    trainable_names,
)
from splitlab.federated.update import (
    Update,
    UpdateTruth,
    check_update,
    model_digest,
    read_update,
    read_update_truth,
    write_update,
    write_update_truth,
)


@pytest.fixture(scope="module")
def pixel() -> nn.Module:
    return pixel_unet(8, seed=0, channels=(8, 16))


def controlled(base: Base) -> ControlledUNet:
    model = ControlledUNet(copy.deepcopy(base.unet), latent_hint_controlnet(base).eval())
    with torch.no_grad():  # zero convolutions at zero let nothing through
        for name, parameter in model.controlnet.named_parameters():
            if "controlnet_down" in name or "controlnet_mid" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=tiny.draw(len(name))) * 0.1)
    return model


def by_hand(model: nn.Module, truth: UpdateTruth, *call: Tensor) -> dict[str, Tensor]:
    """The same gradients through the model's own parameters and .backward()."""
    model = copy.deepcopy(model).requires_grad_(True)
    alphas = ALPHAS[truth.timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * truth.clean + (1 - alphas).sqrt() * truth.noise
    output = model(noisy, truth.timesteps, *call)
    F.mse_loss(output if isinstance(output, Tensor) else output.sample, truth.noise).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    scale = max(float(value.abs().max()) for value in other.values())
    return all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6 * scale) for name in one)


def test_a_pixel_model_shares_the_gradient_of_all_its_parameters(pixel: nn.Module):
    truth = update_truth()
    update = share(pixel, truth, alphas_cumprod=ALPHAS)
    assert set(update.gradients) == {name for name, _ in pixel.named_parameters()}
    assert close(update.gradients, by_hand(pixel, truth))
    assert (update.kind, update.objective, update.size, update.defence) == ("gradient", "epsilon", 8, "none")


@pytest.mark.parametrize("trainable", ["all", "attention"])
def test_a_latent_model_shares_what_it_trains(base: Base, trainable: str):
    truth = update_truth(base)
    update = share(base.unet, truth, alphas_cumprod=ALPHAS, trainable=trainable)
    expected = {n for n, _ in base.unet.named_parameters() if trainable == "all" or "attentions." in n}
    assert set(update.gradients) == expected
    assert close(update.gradients, by_hand(base.unet, truth, truth.text))


def test_a_controlnet_client_shares_the_controlnet_and_not_the_frozen_unet(base: Base):
    model, truth = controlled(base), update_truth(base)
    update = share(model, truth, alphas_cumprod=ALPHAS)
    assert set(update.gradients) == {name for name, _ in model.named_parameters() if name.startswith("controlnet.")}
    assert close(update.gradients, by_hand(model, truth, truth.text, truth.hint_latents))


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank correction, named as peft names its parts."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("trainable", ["marked", "lora"])
def test_lora_clients_share_their_adapters_only(base: Base, trainable: str):
    model = copy.deepcopy(base.unet)
    for module in list(model.modules()):
        if hasattr(module, "to_v") and isinstance(module.to_v, nn.Linear):
            module.to_v = LoraLinear(module.to_v)
    update = share(model, update_truth(base), alphas_cumprod=ALPHAS, trainable=trainable)
    assert update.gradients
    assert all("lora_" in name for name in update.gradients)
    assert any(value.any() for name, value in update.gradients.items() if "lora_B" in name)
    silent = [value for name, value in update.gradients.items() if "lora_A" in name]
    assert silent
    assert not any(value.any() for value in silent)  # B starts at zero


def test_sharing_leaves_the_model_as_it_was(pixel: nn.Module):
    before = {name: value.clone() for name, value in pixel.state_dict().items()}
    share(pixel, update_truth(), alphas_cumprod=ALPHAS, kind="fedavg", local_steps=2, lr=0.1)
    assert all(torch.equal(value, before[name]) for name, value in pixel.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in pixel.parameters())


def test_the_batch_gradient_is_the_mean_of_the_examples(pixel: nn.Module):
    truth = update_truth(n=3)
    whole = share(pixel, truth, alphas_cumprod=ALPHAS)
    each = share_each(pixel, truth, alphas_cumprod=ALPHAS)
    mean = {name: torch.stack([u.gradients[name] for u in each]).mean(0) for name in whole.gradients}
    assert len(each) == 3
    assert close(whole.gradients, mean)


@pytest.mark.parametrize("steps", [None, 3])
def test_a_weight_difference_is_what_sgd_does(pixel: nn.Module, steps: int | None):
    truth = update_truth(steps=steps)
    update = share(pixel, truth, alphas_cumprod=ALPHAS, kind="fedavg", local_steps=3, lr=0.05)
    model = copy.deepcopy(pixel).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        timesteps, noise = (
            (truth.timesteps, truth.noise) if steps is None else (truth.timesteps[step], truth.noise[step])
        )
        noisy = noised(ALPHAS, truth.clean, noise, timesteps)
        optimizer.zero_grad()
        F.mse_loss(model(noisy, timesteps).sample, noise).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    difference = {name: (p - after[name]).detach() for name, p in pixel.named_parameters()}
    assert max(float((difference[n] - g).abs().max()) for n, g in update.gradients.items()) < 1e-6
    assert max(float(value.abs().max()) for value in difference.values()) > 1e-3


def test_the_mean_gradient_of_one_local_step_is_the_gradient(pixel: nn.Module):
    gradient = share(pixel, update_truth(), alphas_cumprod=ALPHAS)
    step = share(pixel, update_truth(), alphas_cumprod=ALPHAS, kind="fedavg", lr=1.0)
    mean = step.mean_gradient()
    assert max(float((mean[n] - g).abs().max()) for n, g in gradient.gradients.items()) < 1e-6


def test_v_and_the_noisy_image_give_the_image_back():
    truth = update_truth()
    alphas = ALPHAS[truth.timesteps].view(-1, 1, 1, 1)
    noisy = noised(ALPHAS, truth.clean, truth.noise, truth.timesteps)
    v = target_of("v_prediction", ALPHAS, truth.clean, truth.noise, truth.timesteps)
    assert torch.allclose(alphas.sqrt() * noisy - (1 - alphas).sqrt() * v, truth.clean, atol=1e-5)
    assert target_of("epsilon", ALPHAS, truth.clean, truth.noise, truth.timesteps) is truth.noise


def test_objectives_give_different_gradients(pixel: nn.Module):
    one, other = (share(pixel, update_truth(), alphas_cumprod=ALPHAS, objective=o) for o in ("epsilon", "v_prediction"))
    assert not close(one.gradients, other.gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_update_crosses_a_file_bit_for_bit(pixel: nn.Module, tmp_path: Path, dtype: torch.dtype):
    sent = share(pixel, update_truth(), alphas_cumprod=ALPHAS, dtype=dtype, kind="fedavg", local_steps=2, lr=0.1)
    write_update(tmp_path / "u.safetensors", sent)
    read = read_update(tmp_path / "u.safetensors", model=pixel)
    assert replace(read, gradients={}) == replace(sent, gradients={})
    assert all(torch.equal(value, read.gradients[name]) for name, value in sent.gradients.items())
    assert {value.dtype for value in read.gradients.values()} == {dtype}


def test_the_file_holds_gradients_and_public_facts_only(pixel: nn.Module, tmp_path: Path):
    sent = share(pixel, update_truth(), alphas_cumprod=ALPHAS)
    write_update(tmp_path / "u", sent)
    tensors, meta = checkpoint.load(tmp_path / "u")
    assert set(tensors) == {name for name, _ in pixel.named_parameters()}
    public = {"kind", "objective", "size", "model", "defence", "local_steps", "lr", "version"}
    assert set(meta) == {"update"}
    assert set(meta["update"]) == public


def test_truth_crosses_a_file_of_its_own(base: Base, tmp_path: Path):
    truth = update_truth(base)
    write_update_truth(tmp_path / "t", truth)
    read = read_update_truth(tmp_path / "t")
    assert read.prompts == truth.prompts
    assert torch.equal(read.noise, truth.noise)
    assert torch.equal(read.text, truth.text)
    assert read.images is None
    with pytest.raises(
        InputError, match=r"t: it has no header of an update; plain gradients are for `splitlab\.attack_gradient`"
    ):
        read_update(tmp_path / "t")
    write_update(tmp_path / "u", Update({"w": torch.ones(1)}, "gradient", "epsilon", 8, ""))
    with pytest.raises(InputError, match="u: not the truth of an update"):
        read_update_truth(tmp_path / "u")


def test_an_update_may_be_of_an_input_that_is_not_square(pixel: nn.Module, tmp_path: Path):
    truth = replace(update_truth(), clean=torch.zeros(2, 3, 8, 16), noise=torch.ones(2, 3, 8, 16))
    write_update(tmp_path / "u", share(pixel, truth, alphas_cumprod=ALPHAS))
    assert read_update(tmp_path / "u", model=pixel).size == (8, 16)


def spoilt(update: Update, name: str, value: Tensor | None) -> Update:
    gradients = {n: g for n, g in update.gradients.items() if n != name}
    return replace(update, gradients=gradients if value is None else gradients | {name: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda u: spoilt(u, "transformer.weight", torch.ones(2)),
            "has no parameter transformer.weight; load the arch",
        ),
        (
            lambda u: spoilt(u, "conv_in.weight", torch.ones(4, 3, 3, 3)),
            r"shapes that differ from this UNet2DModel's: conv_in.weight \(4, 3, 3, 3\) for \(8, 3, 3, 3\)",
        ),
        (lambda u: spoilt(u, "conv_in.bias", torch.full((8,), torch.nan)), "conv_in.bias holds NaN or infinity"),
        (lambda u: spoilt(u, "conv_in.bias", torch.full((8,), torch.inf)), "conv_in.bias holds NaN or infinity"),
        (lambda u: spoilt(u, "conv_in.bias", torch.ones(8, dtype=torch.int8)), "conv_in.bias is not of a floating"),
        (lambda u: u.map(torch.zeros_like), "every gradient is zero, so it says nothing about the images"),
        (lambda u: replace(u, gradients={}), "it holds no gradients; share at least one"),
        (lambda u: replace(u, model="ab" * 32), f"taken at weights {'ab' * 6}, this UNet2DModel has"),
    ],
)
def test_an_update_of_another_model_or_of_nothing_is_refused_by_name(pixel: nn.Module, change, says: str):
    good = share(pixel, update_truth(), alphas_cumprod=ALPHAS)
    check_update(good, pixel)
    with pytest.raises(InputError, match=says):
        check_update(change(good), pixel)


def test_gradients_of_another_architecture_are_named(pixel: nn.Module, tmp_path: Path):
    other = pixel_unet(8, seed=0, channels=(8, 16, 16))
    write_update(tmp_path / "u", share(other, update_truth(), alphas_cumprod=ALPHAS))
    with pytest.raises(InputError, match=r"u: this UNet2DModel has no parameter down_blocks\.1\.\S+, .* and \d+ more"):
        read_update(tmp_path / "u", model=pixel)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "update version 2, expected 1; share it again"),
        ({"kind": "sum"}, "kind 'sum' is unknown; choose one of gradient, fedavg"),
        ({"objective": "x0"}, "objective 'x0' is unknown; choose one of epsilon, v_prediction"),
        ({"size": "8"}, r"u: header\.size: expected a whole number, or \[height, width\], got '8'"),
        ({"size": [8, 0]}, r"u: header\.size: expected a whole number, or \[height, width\], got \[8, 0\]"),
        ({"key": 1}, "unknown key key"),
        ({"local_steps": 0}, "local_steps must be 1 or more"),
        ({"kind": "fedavg", "lr": 0.0}, "lr must be positive and finite, got 0.0"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path: Path, change: dict, says: str):
    write_update(tmp_path / "u", Update({"w": torch.ones(1)}, "gradient", "epsilon", 8, ""))
    tensors, meta = checkpoint.load(tmp_path / "u")
    checkpoint.save(tmp_path / "u", tensors, {"update": meta["update"] | change})
    with pytest.raises(InputError, match=says):
        read_update(tmp_path / "u")


def test_a_header_that_lacks_a_field_is_refused_by_name(tmp_path: Path):
    checkpoint.save(tmp_path / "u", {"w": torch.ones(1)}, {"update": {"version": 1, "kind": "gradient"}})
    with pytest.raises(InputError, match="objective, size, model, defence, local_steps, lr is missing"):
        read_update(tmp_path / "u")


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="gone: no such file"):
        read_update(tmp_path / "gone")


def test_what_cannot_be_shared_is_refused(pixel: nn.Module, base: Base):
    with pytest.raises(InputError, match="trainable 'some' is unknown; choose one of all, attention, lora, marked"):
        trainable_names(pixel, "some")
    with pytest.raises(InputError, match="no parameter of this UNet2DModel is 'lora', so nothing would be shared"):
        share(pixel, update_truth(), alphas_cumprod=ALPHAS, trainable="lora")
    with pytest.raises(InputError, match="a UNet2DConditionModel needs text, and there is none"):
        predict(base.unet, torch.zeros(1, 4, 4, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="draws for 2 local steps, not 4; give one per step"):
        share(pixel, update_truth(steps=2), alphas_cumprod=ALPHAS, kind="fedavg", local_steps=4, lr=0.1)
    with pytest.raises(InputError, match=r"is not finite in torch\.float32; lower the learning rate"):
        share(pixel, update_truth(), alphas_cumprod=ALPHAS, kind="fedavg", local_steps=3, lr=1e30)


def test_equal_weights_have_equal_digests(pixel: nn.Module):
    assert model_digest(pixel) == model_digest(pixel_unet(8, seed=0, channels=(8, 16)))
    assert model_digest(pixel) != model_digest(pixel_unet(8, seed=1, channels=(8, 16)))


def test_knowledge_names_what_was_granted(pixel: nn.Module):
    assert InversionKnowledge(pixel, ALPHAS).granted == ()
    assert InversionKnowledge(pixel, ALPHAS, noise=torch.zeros(1), batch_size=1).granted == ("batch_size", "noise")
