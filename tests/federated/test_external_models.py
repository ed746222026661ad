"""Gradients of models of other code bases are attacked: time embeddings are found, layers are tried, not assumed."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from world import lookalikes, tiny
from world.foreign import Predict, gradient, images, made, psnr_db
from world.lookalikes import CLASSES, SIZE
from world.tiny import ALPHAS

from splitlab import attack_gradient
from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import image_hint_controlnet
from splitlab.diffusion.denoisers import ControlledUNet
from splitlab.federated.attacks.problem import Problem
from splitlab.federated.attacks.time_layers import TimeProbe
from splitlab.federated.client import InversionKnowledge, pixel_unet
from splitlab.federated.external_model import external_model
from splitlab.federated.update import Update


def plain(model: nn.Module, noisy: Tensor, t: Tensor) -> Tensor:
    return model(noisy, t)


def labelled(model: nn.Module, noisy: Tensor, t: Tensor) -> Tensor:
    return model(noisy, t, torch.full((len(noisy),), 3))


def of_levels(model: nn.Module, noisy: Tensor, t: Tensor) -> Tensor:
    alphas = ALPHAS[t][:, None, None, None]
    sigma, scaled = ((1 - alphas) / alphas).sqrt(), noisy / alphas.sqrt()
    return (scaled - model(scaled, sigma.flatten())) / sigma


FOREIGN: dict[str, tuple[Callable[[], nn.Module], Predict, dict[str, Any]]] = {
    "sinusoids": (lookalikes.SineUnet, plain, {"size": SIZE}),
    "learnt frequencies": (lambda: lookalikes.SineUnet(learned=True), plain, {"size": SIZE}),
    "learned variance": (lambda: lookalikes.SineUnet(n_out=2), lambda m, x, t: m(x, t)[:, :3], {"size": SIZE}),
    "checkpointed": (lookalikes.GuidedUNet, plain, {}),
    "labels": (lambda: lookalikes.GuidedUNet(num_classes=CLASSES), labelled, {}),
    "noise levels": (lookalikes.NoiseLevelNet, of_levels, {"call": of_levels}),
    "transformer": (lookalikes.DiffusionTransformer, labelled, {"size": SIZE}),
    "table": (lookalikes.TableNet, lambda m, x, t: m(x, t)[0], {"size": SIZE}),
    "convolutions": (lookalikes.ConvTimeNet, lambda m, x, t: m(x, t.float())["sample"], {"size": SIZE}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_other_code_bases_give_their_images(name: str) -> None:
    kind, run, options = FOREIGN[name]
    model, clean = made(kind), images(1)
    shared, _ = gradient(model, clean, [137], run)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name != "learned variance" else "ignore")
        found = attack_gradient(shared, model=model, alphas_cumprod=ALPHAS, **options)
    print(f"{name}: PSNR {psnr_db(found.images, clean):.1f} dB")
    assert found.timesteps.tolist() == [137]
    assert psnr_db(found.images, clean) > 45
    if run is labelled:
        assert found.class_labels.tolist() == [3]


@pytest.mark.parametrize("name", ["sinusoids", "table", "convolutions"])
def test_two_images_of_a_foreign_model(name: str) -> None:
    """Without a bias the row space tells the timesteps; pairs are told apart where the tested layers see no time."""
    kind, run, options = FOREIGN[name]
    model, clean = made(kind), images(2)
    shared, _ = gradient(model, clean, [500, 100], run)
    found = attack_gradient(shared, model=model, alphas_cumprod=ALPHAS, **options)
    assert found.timesteps.tolist() == [100, 500]
    assert psnr_db(found.images, clean) > 40
    assert psnr_db(found.images[1:], clean[:1]) > 40


def test_a_learned_variance_is_said_to_be_left_out() -> None:
    kind, run, options = FOREIGN["learned variance"]
    model = made(kind)
    shared, _ = gradient(model, images(1), [137], run)
    with pytest.warns(
        UserWarning, match="6 channels are predicted; the loss is taken to be the first 3' squared error"
    ):
        attack_gradient(shared, model=model, alphas_cumprod=ALPHAS, attack="timesteps", **options)


def test_inputs_need_be_neither_square_nor_coloured() -> None:
    clean = images(1, 1, 8, 12)
    model = pixel_unet(SIZE, seed=0, channels=(32, 32), in_channels=1)
    shared, _ = gradient(model, clean, [137], lambda m, x, t: m(x, t).sample)
    found = attack_gradient(shared, model=model, size=(8, 12), alphas_cumprod=ALPHAS)
    assert found.images.shape == (1, 1, 8, 12)
    assert psnr_db(found.images, clean) > 45


def test_a_config_may_give_height_and_width_or_neither() -> None:
    model, clean = pixel_unet(SIZE, seed=0, channels=(32, 32)), images(1, 3, 8, 16)
    shared, _ = gradient(model, clean, [137], lambda m, x, t: m(x, t).sample)
    model.register_to_config(sample_size=[8, 16])
    assert attack_gradient(shared, model=model, alphas_cumprod=ALPHAS).images.shape == (1, 3, 8, 16)
    model = UNet2DModel.from_config(dict(model.config) | {"sample_size": None})
    with pytest.raises(InputError, match=r"sample_size is null or absent\); say size=<height and width>"):
        attack_gradient(shared, model=model)
    model = UNet2DModel.from_config(dict(model.config) | {"sample_size": "large"})
    with pytest.raises(InputError, match=r"expected a whole number, or \[height, width\], got 'large'"):
        attack_gradient(shared, model=model)


def time_layers(model: nn.Module, **facts: Any) -> list[str]:
    probe = TimeProbe(InversionKnowledge(model, ALPHAS, **facts), (3, SIZE, SIZE))
    layers = probe.all()
    assert probe.first() == layers[0]
    inputs = probe.inputs(layers)
    assert {len(value) for value in inputs.values()} == {1000}
    return [layer.name for layer in layers]


def test_the_layers_that_see_the_timestep_are_found_whatever_they_are_called() -> None:
    own = pixel_unet(SIZE, seed=0, channels=(32, 32))
    projections = [f"{name}.time_emb_proj" for name, m in own.named_modules() if getattr(m, "time_emb_proj", None)]
    assert time_layers(own) == ["time_embedding.linear_1", "time_embedding.linear_2", *projections]
    assert time_layers(made(lookalikes.SineUnet)) == ["time_mlp.0", "time_mlp.2", "mlp"]
    assert time_layers(made(lookalikes.TableNet)) == ["steps"]
    guided = external_model(made(lookalikes.GuidedUNet), None)
    assert time_layers(guided)[:3] == ["time_embed.0", "time_embed.2", "middle_block.0.emb_layers.1"]


def test_the_tabulated_embedding_is_the_models_own() -> None:
    own = pixel_unet(SIZE, seed=0, channels=(32, 32))
    probe = TimeProbe(InversionKnowledge(own, ALPHAS), (3, SIZE, SIZE))
    assert torch.equal(probe.inputs([probe.first()])["time_embedding.linear_1"], own.time_proj(torch.arange(1000)))


def problem_of(model: nn.Module, run: Predict, size: int = SIZE) -> Problem:
    shared, _ = gradient(model, images(1), [137], run)
    known = InversionKnowledge(model.requires_grad_(False), ALPHAS, timesteps=torch.tensor([137]))
    return Problem(Update(shared, "gradient", "epsilon", size, ""), known)


def test_gradients_that_are_no_products_are_told_from_those_that_are() -> None:
    problem = problem_of(made(lookalikes.TableNet), lambda m, x, t: m(x, t)[0])
    names = set(problem.gradients[0])
    assert names - problem.products == {"steps.weight", "second.weight"}
    own = pixel_unet(SIZE, seed=0, channels=(32, 32))
    assert problem_of(own, lambda m, x, t: m(x, t).sample).products == {name for name, _ in own.named_parameters()}


def test_a_layer_in_front_of_a_norm_of_single_channels_is_not_tested() -> None:
    """Its gradient lacks the patches' mean, so that the truth itself would fail the test."""
    problem = problem_of(external_model(made(lookalikes.GuidedUNet), None), plain)
    gradients = problem.gradients[0]
    strengths = [torch.linalg.svdvals(gradients[f"middle_block.{k}.in_layers.2.weight"].flatten(1)) for k in (0, 1)]
    assert strengths[0][15] < 1e-6 * strengths[0][0]
    assert strengths[1][15] > 1e-4 * strengths[1][0]


class _LossyBlock(lookalikes.GuidedBlock):
    """Checkpoints a method that nothing tells to be its forward."""

    inner = lookalikes.GuidedBlock._forward
    _forward = property()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return lookalikes.checkpoint(self.inner, (x, emb), self.parameters())


def test_second_derivatives_that_are_lost_are_noticed() -> None:
    model = made(lookalikes.GuidedUNet)
    model.middle_block = nn.ModuleList([_LossyBlock(64, 16)])
    shared, _ = gradient(model, images(1), [137], plain)
    with pytest.raises(InputError, match=r"cannot run on this GuidedUNet .*checkpointing"):
        attack_gradient(shared, model=model, alphas_cumprod=ALPHAS)


@pytest.mark.parametrize("frozen_table", [False, True])
def test_class_labels_are_read_off_or_tried(frozen_table: bool) -> None:
    model = made(
        lambda: UNet2DModel(
            sample_size=SIZE,
            block_out_channels=(32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=CLASSES,
        )
    )
    clean = images(1)
    shared, _ = gradient(model, clean, [137], lambda m, x, t: m(x, t, torch.tensor([2])).sample)
    if frozen_table:
        del shared["class_embedding.weight"]
    found = attack_gradient(shared, model=model, alphas_cumprod=ALPHAS)
    assert found.class_labels.tolist() == [2]
    assert psnr_db(found.images, clean) > 45
    granted = attack_gradient(shared, model=model, alphas_cumprod=ALPHAS, class_labels=2)
    assert torch.equal(granted.images, found.images)
    if frozen_table:
        with pytest.raises(InputError, match="there are 5, too many ways to assign them to 4 image"):
            attack_gradient(shared, model=model, alphas_cumprod=ALPHAS, batch_size=4)


def test_a_text_model_needs_no_base_if_its_text_is_granted(base: Base) -> None:
    clean, text = torch.randn(1, 4, 8, 8, generator=tiny.draw(1)), torch.randn(1, 5, 16, generator=tiny.draw(2))
    unet = copy.deepcopy(base.unet).requires_grad_(True)
    shared, noise = gradient(unet, clean, [137], lambda m, x, t: m(x, t, text).sample)
    told = {"model": unet, "size": 8, "alphas_cumprod": ALPHAS}
    assert attack_gradient(shared, attack="timesteps", **told).timesteps.tolist() == [137]
    facts = {"noise": noise.numpy(), "timesteps": 137}
    found = attack_gradient(shared, attack="known_noise", text=text.tolist(), **facts, n_evals=60, **told)
    assert psnr_db(found.clean, clean) > 30
    assert found.images is not None
    with pytest.raises(InputError, match="needs text, and there is none"):
        attack_gradient(shared, **told)


def test_a_stock_controlnet_is_attacked_in_front_of_its_base(base: Base, tmp_path) -> None:
    net = image_hint_controlnet(base, seed=0).eval()
    with torch.no_grad():
        for parameter in (*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=tiny.draw(1)))
    net.save_pretrained(tmp_path / "controlnet")
    whole, size = ControlledUNet(base.unet, net), 4 * base.pipeline.vae_scale_factor
    text, hint = base.encode_prompts(tiny.PROMPTS[:1]), torch.rand(1, 3, size, size, generator=tiny.draw(2))
    clean = torch.randn(1, 4, 4, 4, generator=tiny.draw(3))
    noise, t = torch.randn(clean.shape, generator=tiny.draw(5)), torch.tensor([137])
    alphas = base.alphas_cumprod[t][:, None, None, None]
    loss = (whole(alphas.sqrt() * clean + (1 - alphas).sqrt() * noise, t, text, hint) - noise).square().mean()
    names, parameters = zip(*net.named_parameters(), strict=True)
    shared = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for model in (net, tmp_path / "controlnet"):
        assert attack_gradient(shared, model=model, base=base, attack="timesteps").timesteps.tolist() == [137]
    assert attack_gradient(shared, model=net, base=base, attack="prompts").prompts == (tiny.PROMPTS[0],)
    told = {"text": tiny.PROMPTS[0], "hint_latents": hint[0], "timesteps": [137], "noise": noise}
    found = attack_gradient(shared, model=net, base=base, attack="known_noise", **told, n_evals=40)
    assert min(found.objective) < 0.5 * found.objective[0]
    with pytest.raises(InputError, match="stands in front of a U-Net; say base="):
        attack_gradient(shared, model=net)


def test_models_that_cannot_be_attacked_say_why(tmp_path) -> None:
    one = {"conv.weight": torch.ones(3, 3, 1, 1)}

    def module(forward: Callable) -> nn.Module:
        net = nn.Module()
        net.conv, net.forward = nn.Conv2d(3, 3, 1), forward
        return net

    def refused(model: Any, **told: Any) -> str:
        with pytest.raises(InputError) as caught:
            attack_gradient(one, **({"model": model, "size": 8, "attack": "timesteps"} | told))
        return str(caught.value)

    deaf = module(lambda noisy, t: noisy)
    assert "no layer of this Module sees the timestep alone" in refused(deaf)
    assert "does not say the size of its input" in refused(deaf, size=None)
    assert "channels: expected a whole number of 1 or more, got 0" in refused(deaf, channels=0)
    assert "returns [2, 1, 8, 8] for noisy inputs [2, 3, 8, 8]" in refused(module(lambda noisy, t: noisy[:, :1]))
    assert "returns a NoneType, no prediction" in refused(module(lambda noisy, t: None))
    assert "cannot be called with noisy inputs [2, 3, 8, 8] and timesteps [0, 999] (TypeError" in refused(
        module(lambda noisy, t, depth: noisy)
    )
    assert "no model; name a directory that diffusers' save_pretrained wrote" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert f"a whole pipeline; name the folder of its denoiser, such as {tmp_path / 'unet'}" in refused(tmp_path)
    short = made(lambda: lookalikes.TableNet(n_timesteps=100))
    table = {"steps.weight": torch.ones(100, 32)}
    with pytest.raises(InputError, match=r"IndexError.*check .*the length of alphas_cumprod"):
        attack_gradient(table, model=short, size=8, attack="timesteps")
    shared, _ = gradient(short, images(1), [37], lambda m, x, t: m(x, t)[0])
    with pytest.raises(InputError, match="GIDM\\+ needs a model that takes fractional timesteps"):
        attack_gradient(shared, model=short, size=8, attack="gidm_plus", alphas_cumprod=ALPHAS[:100])


def test_a_wrong_schedule_is_doubted() -> None:
    model, clean = made(lookalikes.ConvTimeNet), images(1)
    shared, _ = gradient(model, clean, [600], lambda m, x, t: m(x, t.float())["sample"])
    with pytest.warns(UserWarning, match=r"% of the pixels found lie outside \[-1, 1\]: check alphas_cumprod"):
        attack_gradient(shared, model=model, size=SIZE, alphas_cumprod=ALPHAS**2)
    with pytest.warns(UserWarning, match="so they are likely wrong: check the length of alphas_cumprod"):
        attack_gradient(shared, model=model, size=SIZE, alphas_cumprod=ALPHAS[:300], attack="timesteps")
