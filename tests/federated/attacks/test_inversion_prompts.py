"""Prompts are read off the shipped base's cross-attention gradients; from noise, or where it has none, nothing is."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.diffusion.base import Base, load_base
from splitlab.diffusion.controlnet import latent_hint_controlnet
from splitlab.diffusion.denoisers import ControlledUNet
from splitlab.federated.attacks.prompt_search import PrefixEncoder
from splitlab.federated.attacks.prompts import PromptsFound, prompts
from splitlab.federated.client import InversionKnowledge, pixel_unet, share
from splitlab.federated.defences import protect
from splitlab.federated.defences.noise import GaussianNoise
from splitlab.federated.update import Update, UpdateTruth

pytestmark = pytest.mark.skipif(
    not (ROOT / "models/base/model_index.json").exists(),
    reason="the shipped base model is missing; `make data` pulls it",
)

ONE = ("hot pink circle with dark sea green background",)
TWO = ("medium violet red circle with white background", "medium spring green circle with plum background")
FOUR = (*TWO, "crimson circle with gainsboro background", "a photograph of a face")


@pytest.fixture(scope="module")
def shipped() -> Base:
    return load_base(ROOT / "models/base")


def batch(base: Base, texts: tuple[str, ...], *, seed: int = 0) -> UpdateTruth:
    draw, n = tiny.draw(seed), len(texts)
    latents, noise = (torch.randn(n, 4, 8, 8, generator=draw) for _ in range(2))
    timesteps = torch.randint(1000, (n,), generator=draw)
    hints = torch.randn(n, 4, 8, 8, generator=draw)
    return UpdateTruth(latents, timesteps, noise, base.encode_prompts(texts), hints, prompts=texts)


def cross_attention(name: str) -> bool:
    return "attn2.to_" in name


def find(update: Update, base: Base, model: nn.Module | None = None, **options) -> PromptsFound:
    knowledge = InversionKnowledge(model or base.unet, base.alphas_cumprod, base)
    return prompts(update, knowledge, generator=tiny.draw(), **options)


def shared(base: Base, texts: tuple[str, ...], **arguments) -> Update:
    arguments = {"trainable": cross_attention} | arguments
    return share(base.unet, batch(base, texts), alphas_cumprod=base.alphas_cumprod, **arguments)


def test_states_of_prefixes_are_the_text_models_own(shipped: Base):
    encoder, ids = PrefixEncoder(shipped.text_encoder), shipped.token_ids(TWO)
    states = shipped.encode_prompts(TWO)
    prefixes = encoder.start(int(ids[0, 0]))[torch.tensor([0, 0])]
    for position in range(1, ids.shape[1]):
        ahead = encoder.candidates(prefixes, torch.arange(713))
        prefixes = encoder.extend(prefixes, torch.arange(2), ids[:, position])
        assert torch.allclose(ahead[torch.arange(2), ids[:, position]], states[:, position], atol=1e-5)
    assert torch.allclose(prefixes.states, states, atol=1e-5)
    assert torch.equal(prefixes.tokens, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "texts", [ONE, TWO, ("",), ("teal circle with puf background",)], ids=["one", "two", "empty", "odd"]
)
def test_prompts_are_exact_and_their_number_is_found(shipped: Base, texts: tuple[str, ...], dtype: torch.dtype):
    found = find(shared(shipped, texts, dtype=dtype), shipped)
    assert set(found.prompts) == set(texts)
    assert found.unexplained < 2
    assert found.evidence.min() > 20


def test_four_prompts_are_exact(shipped: Base):
    found = find(shared(shipped, FOUR), shipped)
    assert set(found.prompts) == set(FOUR)
    assert found.rank <= 61  # 64 dimensions, four times 16 positions, one start token


def test_equal_prompts_count_once(shipped: Base):
    assert find(shared(shipped, ONE * 2), shipped).prompts == ONE


def test_a_weight_difference_and_a_controlnet_give_prompts_too(shipped: Base):
    update = shared(shipped, ONE, kind="fedavg", local_steps=4, lr=0.01, objective="v_prediction")
    assert find(update, shipped).prompts == ONE

    model = ControlledUNet(copy.deepcopy(shipped.unet), latent_hint_controlnet(shipped).eval())
    with torch.no_grad():
        for parameter in model.controlnet.controlnet_down_blocks.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=tiny.draw()) * 0.1)
    update = share(model, batch(shipped, ONE), alphas_cumprod=shipped.alphas_cumprod)
    assert find(update, shipped, model).prompts == ONE


def test_noise_hides_prompts(shipped: Base):
    noisy = protect(shared(shipped, ONE), GaussianNoise(1.0), generator=tiny.draw())
    assert find(noisy, shipped, rounds=0).prompts != ONE


def test_random_gradients_give_no_prompt(shipped: Base):
    update, draw = shared(shipped, ONE), tiny.draw()
    for _ in range(3):
        found = find(update.map(lambda value: torch.randn(value.shape, generator=draw)), shipped)
        assert ONE[0] not in found.prompts
        assert len(found.prompts) <= 1


def test_what_makes_prompts_unrecoverable_is_said(shipped: Base):
    hidden = batch(shipped, ONE)
    hidden = replace(hidden, text=torch.zeros_like(hidden.text))
    update = share(shipped.unet, hidden, alphas_cumprod=shipped.alphas_cumprod, trainable=cross_attention)
    with pytest.raises(InputError, match="all of these gradients are zero"):
        find(update, shipped)
    frozen = shared(shipped, ONE, trainable=lambda name: not cross_attention(name))
    with pytest.raises(
        InputError, match="prompts are not recoverable: the update has no gradient of a cross-attention"
    ):
        find(frozen, shipped)
    model = pixel_unet(8, seed=0, channels=(8,))
    pixels = share(model, tiny.update_truth(), alphas_cumprod=tiny.ALPHAS)
    with pytest.raises(InputError, match="prompts are not recoverable"):
        find(pixels, shipped, model)
    with pytest.raises(InputError, match=r"need the base model's text encoder and tokenizer; give knowledge\.base"):
        prompts(frozen, InversionKnowledge(shipped.unet, shipped.alphas_cumprod), generator=tiny.draw())
