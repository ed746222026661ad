"""Timesteps are read off exactly, from real updates; from noise nothing is, and a frozen embedding is said to be."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from world import tiny
from world.tiny import ALPHAS

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import latent_hint_controlnet
from splitlab.diffusion.denoisers import ControlledUNet
from splitlab.federated.attacks.timesteps import TimestepsFound, timesteps
from splitlab.federated.client import InversionKnowledge, pixel_unet, share
from splitlab.federated.defences import protect
from splitlab.federated.defences.bits import Quantise
from splitlab.federated.defences.clip import Clip
from splitlab.federated.defences.noise import GaussianNoise
from splitlab.federated.defences.top_k import TopK
from splitlab.federated.update import Update, UpdateTruth

FIRST = "time_embedding.linear_1"


@pytest.fixture(scope="module")
def pixel() -> nn.Module:
    return pixel_unet(8, seed=0, channels=(32,))


def truth_at(*chosen: int, seed: int = 0) -> UpdateTruth:
    truth = tiny.update_truth(n=len(chosen), seed=seed)
    return replace(truth, timesteps=torch.tensor(chosen))


def find(update: Update, model: nn.Module, **options) -> TimestepsFound:
    batch_size = options.pop("batch_size", None)
    knowledge = InversionKnowledge(model, ALPHAS, batch_size=batch_size)
    return timesteps(update, knowledge, generator=tiny.draw(), **options)


def embedding_only(name: str) -> bool:
    return name.startswith(FIRST)


def embedding_updates(model: nn.Module, *, local_steps: int = 0, lr: float = 0.1) -> dict[str, Tensor]:
    """The embedding's gradients, or weight differences, at all timesteps `[T, ...]`; the network's output stands in."""
    start = {n: p.detach().expand(1000, *p.shape) for n, p in model.time_embedding.named_parameters()}
    draw = tiny.draw(1)

    def output(weights: dict[str, Tensor], proj: Tensor, back: Tensor) -> Tensor:
        return torch.func.functional_call(model.time_embedding, weights, (proj,)) @ back

    gradient = torch.func.vmap(torch.func.grad(output), in_dims=(0, 0, None))
    weights, result = start, {}
    for _ in range(max(local_steps, 1)):
        back = torch.randn(start["linear_2.bias"].shape[1], generator=draw)
        result = gradient(weights, model.time_proj(torch.arange(1000)), back)
        weights = {name: value - lr * result[name] for name, value in weights.items()}
    result = {name: start[name] - weights[name] for name in start} if local_steps else result
    return {f"time_embedding.{name}": value for name, value in result.items() if name.startswith("linear_1")}


@pytest.mark.parametrize(
    ("dtype", "scale", "steps"),
    [
        (torch.float32, 1.0, 0),
        (torch.float16, 1e-2, 0),
        (torch.bfloat16, 1.0, 0),
        (torch.float32, 1e-6, 0),
        (torch.float32, 1.0, 4),
    ],
    ids=["fp32", "fp16", "bf16", "clipped", "fedavg"],
)
def test_every_single_timestep_is_exact(pixel: nn.Module, dtype: torch.dtype, scale: float, steps: int):
    everything = embedding_updates(pixel, local_steps=steps)
    kind = {"kind": "fedavg", "local_steps": steps, "lr": 0.1} if steps else {"kind": "gradient"}
    for step in range(1000):
        gradients = {name: (value[step] * scale).to(dtype) for name, value in everything.items()}
        found = find(Update(gradients, objective="epsilon", size=8, model="", **kind), pixel)
        assert found.timesteps.tolist() == [step]


@pytest.mark.parametrize("step", [0, 1, 20, 100, 250, 600, 900, 998, 999])
def test_a_weight_difference_after_four_local_steps_gives_the_timestep(pixel: nn.Module, step: int):
    update = share(
        pixel,
        truth_at(step),
        alphas_cumprod=ALPHAS,
        kind="fedavg",
        local_steps=4,
        lr=0.01,
        trainable=lambda name: True,
    )
    assert find(update, pixel).timesteps.tolist() == [step]


def test_local_steps_with_their_own_timesteps_give_all_of_them(pixel: nn.Module):
    truth = tiny.update_truth(n=2, steps=4)
    truth = replace(truth, timesteps=torch.tensor([[3, 999], [100, 250], [600, 850], [421, 707]]))
    update = share(pixel, truth, alphas_cumprod=ALPHAS, kind="fedavg", local_steps=4, lr=0.1)
    assert find(update, pixel).timesteps.tolist() == [3, 100, 250, 421, 600, 707, 850, 999]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_sets_of_distinct_timesteps_are_exact_and_their_number_is_found(pixel: nn.Module, n: int, dtype: torch.dtype):
    for seed in range(3):
        chosen = sorted(torch.randperm(1000, generator=tiny.draw(seed))[:n].tolist())
        truth = truth_at(*chosen, seed=seed)
        update = share(pixel, truth, alphas_cumprod=ALPHAS, dtype=dtype, trainable=embedding_only)
        found = find(update, pixel)
        assert found.timesteps.tolist() == chosen
        assert found.n_repeats is None
        assert found.residuals[chosen].max() < 0.5 * found.residuals.median()


def test_neighbouring_timesteps_are_told_apart(pixel: nn.Module):
    update = share(pixel, truth_at(500, 501), alphas_cumprod=ALPHAS, trainable=embedding_only)
    assert find(update, pixel).timesteps.tolist() == [500, 501]


def test_repeats_are_found_by_rank_where_the_batch_size_is_known(pixel: nn.Module):
    update = share(pixel, truth_at(5, 700, 5), alphas_cumprod=ALPHAS, trainable=embedding_only)
    found = find(update, pixel, batch_size=3)
    assert (found.timesteps.tolist(), found.n_repeats) == ([5, 700], 1)


def test_latent_models_and_controlnets_give_their_timesteps_too(base: Base):
    truth = replace(tiny.update_truth(base), timesteps=torch.tensor([41, 640]))
    update = share(base.unet, truth, alphas_cumprod=ALPHAS, objective="v_prediction")
    assert find(update, base.unet).timesteps.tolist() == [41, 640]

    model = ControlledUNet(copy.deepcopy(base.unet), latent_hint_controlnet(base).eval())
    with pytest.raises(
        InputError, match=r"gradient of controlnet\.time_embedding\.linear_1\.weight is zero; .* zero conv"
    ):
        find(share(model, truth, alphas_cumprod=ALPHAS), model)
    with torch.no_grad():
        for parameter in model.controlnet.controlnet_down_blocks.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=tiny.draw()) * 0.1)
    assert find(share(model, truth, alphas_cumprod=ALPHAS), model).timesteps.tolist() == [41, 640]


def test_the_ratio_of_weight_and_bias_is_the_embedding(pixel: nn.Module):
    update = share(pixel, truth_at(321), alphas_cumprod=ALPHAS)
    weight, bias = (update.gradients[f"time_embedding.linear_1.{kind}"].double() for kind in ("weight", "bias"))
    ratio = weight.T @ bias / bias.square().sum()
    assert torch.allclose(ratio.float(), pixel.time_proj(torch.tensor([321]))[0], atol=1e-5)


@pytest.mark.parametrize("defence", [Clip(1e-4), Quantise(8), TopK(0.9), GaussianNoise(0.3)], ids=str)
def test_mild_defences_leave_the_timestep(pixel: nn.Module, defence):
    update = protect(share(pixel, truth_at(250), alphas_cumprod=ALPHAS), defence, generator=tiny.draw())
    assert find(update, pixel).timesteps.tolist() == [250]


def test_all_layers_withstand_more_noise_than_the_first(pixel: nn.Module):
    hits = {"embedding": 0, "all": 0}
    for seed in range(6):
        truth = truth_at(100 * seed + 7, seed=seed)
        update = share(pixel, truth, alphas_cumprod=ALPHAS)
        noisy = protect(update, GaussianNoise(5.0), generator=tiny.draw(seed))
        for layers in hits:
            found = find(noisy, pixel, layers=layers, batch_size=1)
            hits[layers] += found.timesteps.tolist() == truth.timesteps.tolist()
    assert hits["all"] == 6
    assert hits["embedding"] < 6


@pytest.mark.parametrize("fraction", [0.1, 0.02])
def test_a_sparse_update_leaves_a_single_timestep(fraction: float):
    """The first layer keeps nothing: what is left of the residual blocks' projections tells."""
    model = pixel_unet(16, seed=0, channels=(32, 64))
    image, noise = (torch.randn(1, 3, 16, 16, generator=tiny.draw(seed)) for seed in (1, 2))
    truth = UpdateTruth(image.clamp(-1, 1), torch.tensor([100]), noise)
    update = protect(share(model, truth, alphas_cumprod=ALPHAS), TopK(fraction), generator=tiny.draw())
    assert not update.gradients[f"{FIRST}.weight"].any()
    assert find(update, model).timesteps.tolist() == [100]


def test_a_sparse_update_of_several_timesteps_is_not_taken_for_one(pixel: nn.Module):
    update = protect(share(pixel, truth_at(5, 700), alphas_cumprod=ALPHAS), TopK(0.9), generator=tiny.draw())
    assert find(update, pixel).timesteps.tolist() == [5, 700]


def test_random_gradients_give_no_better_than_chance(pixel: nn.Module):
    names, draw = [f"{FIRST}.weight", f"{FIRST}.bias"], tiny.draw()
    hits = guesses = 0
    for step in torch.randint(1000, (200,), generator=draw).tolist():
        gradients = {name: torch.randn(pixel.get_parameter(name).shape, generator=draw) for name in names}
        found = find(Update(gradients, "gradient", "epsilon", 8, ""), pixel)
        hits += step in found.timesteps
        guesses += len(found.timesteps)
    assert guesses < 600  # it does not name half the schedule to be right
    assert hits <= 4  # 0.2 expected per 200 single guesses; 4 or more has a chance below 1e-3 for up to 3 guesses


def test_a_frozen_time_embedding_is_said_to_be_the_reason(pixel: nn.Module):
    update = share(pixel, truth_at(5), alphas_cumprod=ALPHAS)
    without = {name: value for name, value in update.gradients.items() if not name.startswith("time_embedding")}
    for gradients in (without, without | {f"{FIRST}.weight": torch.zeros(128, 32)}):
        with pytest.raises(InputError, match=r"timesteps are not recoverable: .* frozen"):
            find(replace(update, gradients=gradients), pixel, layers="embedding")
        assert find(replace(update, gradients=gradients), pixel).timesteps.tolist() == [5]  # by the residual blocks
    attention = share(pixel, truth_at(5), alphas_cumprod=ALPHAS, trainable="attention")
    for layers in ("strongest", "embedding", "all"):
        with pytest.raises(InputError, match="timesteps are not recoverable"):
            find(attention, pixel, layers=layers)


def test_models_and_options_that_do_not_fit_are_refused(pixel: nn.Module):
    update = share(pixel, truth_at(5), alphas_cumprod=ALPHAS)
    with pytest.raises(InputError, match="layers must be 'strongest', 'embedding' or 'all', got 'some'"):
        find(update, pixel, layers="some")
    with pytest.raises(InputError, match="this UNet2DModel has no parameter"):
        find(update, pixel_unet(8, seed=0, channels=(8, 16)))
    deaf = nn.Module()
    deaf.conv, deaf.forward = nn.Conv2d(3, 3, 1), lambda noisy, timesteps: deaf.conv(noisy)
    with pytest.raises(
        InputError, match=r"no layer of this Module sees the timestep alone; grant knowledge\.timesteps"
    ):
        find(Update({"conv.weight": torch.ones(3, 3, 1, 1)}, "gradient", "epsilon", 8, ""), deaf)
