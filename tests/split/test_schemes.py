import math

import pytest
import torch
from diffusers import ControlNetModel
from torch.nn import functional as F
from world import tiny

from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import LatentHintControlNet, image_hint_controlnet
from splitlab.split.config import SCHEMES, Defences, TrainConfig
from splitlab.split.messages import Truth
from splitlab.split.schemes import Central, Federated, Scheme, Split, SplitGradients, _update, make_scheme
from splitlab.split.train import learning_rate, make_clients
from splitlab.split.wire import from_bytes

STEPS = 8
PRECISION = 1e-4
"""float32 precision of what was learned. AdamW divides by the size of a gradient, so single weights with gradients near
zero magnify rounding; all weights together do not."""

Weights = dict[str, torch.Tensor]


def run_config(**changes: object) -> TrainConfig:
    # a learning rate high enough that the weights, not only the loss, differ visibly after a few steps
    return tiny.config(**({"steps": STEPS, "lr": 5e-3} | changes))


def built(base: Base, data: ImageSet, config: TrainConfig) -> Scheme:
    return make_scheme(base, config, make_clients(base, data, config), data.hints)


def steps_of(scheme: Scheme, config: TrainConfig) -> list:
    return [scheme.step(number, learning_rate(number, config)) for number in range(config.steps)]


def snapshot(model: torch.nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def apart(one: Weights, other: Weights, start: Weights) -> float:
    """Return the distance of two trained models, relative to how far training moved the other; `other` names them."""
    assert set(other) <= set(one)
    gap = sum((one[name] - other[name]).double().square().sum() for name in other)
    way = sum((start[name] - other[name]).double().square().sum() for name in other)
    assert way > 1e-4, "nothing was learned, so agreement would say nothing"
    return float((gap / way).sqrt())


def schedule(step: int, config: TrainConfig) -> float:
    """Return the learning rate as the documentation states it, written anew: 5 % warm-up, then a cosine to zero."""
    warm_up = max(1, int(0.05 * config.steps))
    rise = (step + 1) / warm_up if step < warm_up else 1.0
    return config.lr * rise * (1 + math.cos(math.pi * step / config.steps)) / 2


def reference_central(base: Base, data: ImageSet, config: TrainConfig, truths: list[Truth]):
    """Train centrally with nothing of the package but the draws: diffusers' own ControlNet, scheduler and VAE.

    Yields the loss and the model after each step.
    """
    scale = base.vae.config.scaling_factor
    with torch.no_grad():
        latents, hints = (base.vae.encode(x).latent_dist.mode() * scale for x in (data.images, data.hints))
        text, _ = base.pipeline.encode_prompt(list(data.prompts), "cpu", 1, False)
    model = ControlNetModel.from_unet(base.unet).train()
    # An untrained hint encoder ends in a zero convolution: it adds nothing, and frozen it never will.
    model.controlnet_cond_embedding.requires_grad_(False)
    no_image = torch.zeros(config.batch_size, 3, 32, 32)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.999), weight_decay=0.01)
    for step, truth in enumerate(truths):
        optimizer.param_groups[0]["lr"] = schedule(step, config)
        i, t = truth.indices, truth.timesteps
        noisy = base.pipeline.scheduler.add_noise(latents[i], truth.noise, t)
        down, mid = model(noisy + hints[i], t, text[i], no_image, return_dict=False)
        noise_pred = base.unet(
            noisy, t, text[i], down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        loss = F.mse_loss(noise_pred, truth.noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        yield loss.item(), model


@pytest.mark.parametrize("n_clients", [1, 3])
def test_split_without_defences_is_central_training_as_anybody_would_write_it(
    base: Base, private: ImageSet, n_clients: int
):
    config = run_config(scheme="split", n_clients=n_clients)
    split = built(base, private, config)
    start = snapshot(split.controlnet())
    truths = [step.truth for step in steps_of(built(base, private, config), config)]
    for number, (loss, model) in enumerate(reference_central(base, private, config, truths)):
        step = split.step(number, learning_rate(number, config))
        assert step.loss == pytest.approx(loss, rel=1e-5)
        assert apart(snapshot(model), snapshot(split.controlnet()), start) < PRECISION


@pytest.mark.parametrize("n_clients", [1, 3])
def test_split_without_defences_is_scheme_central_step_by_step(base: Base, private: ImageSet, n_clients: int):
    central, split = (
        built(base, private, run_config(scheme=scheme, n_clients=n_clients)) for scheme in ("central", "split")
    )
    start = snapshot(split.controlnet())
    for number in range(STEPS):
        lr = learning_rate(number, run_config())
        assert split.step(number, lr).loss == pytest.approx(central.step(number, lr).loss, rel=1e-6)
        assert apart(snapshot(split.controlnet()), snapshot(central.controlnet()), start) < PRECISION


@pytest.mark.parametrize("defences", [Defences(), Defences(feature_noise=0.5, matched=True)], ids=str)
def test_the_u_shaped_split_trains_as_the_split_does_though_the_noise_stays(
    base: Base, private: ImageSet, defences: Defences
):
    split, folded = (
        built(base, private, run_config(scheme=scheme, defences=defences)) for scheme in ("split", "u_shaped")
    )
    start = snapshot(split.controlnet())
    for number in range(STEPS):
        lr = learning_rate(number, run_config())
        step = folded.step(number, lr)
        assert step.loss == pytest.approx(split.step(number, lr).loss, rel=1e-5)
        assert apart(snapshot(folded.controlnet()), snapshot(split.controlnet()), start) < PRECISION
        seen = from_bytes(step.message)
        assert seen.noise is None
        assert step.down_bytes >= seen.need("noise_pred").nbytes
        assert step.up_bytes >= seen.need("noise_pred_gradient").nbytes


def test_a_defence_makes_split_training_another(base: Base, private: ImageSet):
    # what makes the two tests above able to fail
    plain = steps_of(built(base, private, run_config()), run_config())
    for defences in (Defences(timestep_floor=600), Defences(symsigmoid=True), Defences(fixed_noise=1.0),
                     Defences(hide_prompts=True)):  # fmt: skip
        config = run_config(defences=defences)
        losses = [step.loss for step in steps_of(built(base, private, config), config)]
        assert losses != pytest.approx([step.loss for step in plain], rel=1e-5), defences


def test_the_reference_notices_a_wrong_schedule(base: Base, private: ImageSet):
    config = run_config(scheme="split")
    split = built(base, private, config)
    start = snapshot(split.controlnet())
    truths = [split.step(number, config.lr).truth for number in range(STEPS)]  # no schedule at all
    *_, (_, model) = reference_central(base, private, config, truths)
    assert apart(snapshot(model), snapshot(split.controlnet()), start) > 100 * PRECISION


def test_split_gradients_is_unsplit_training_of_an_ordinary_controlnet(base: Base, private: ImageSet):
    config = run_config(scheme="split_gradients", seed=4)
    split = built(base, private, config)
    assert isinstance(split, SplitGradients)
    whole = image_hint_controlnet(base, seed=4)
    encoder = list(whole.controlnet_cond_embedding.parameters())
    server = [p for name, p in whole.named_parameters() if not name.startswith("controlnet_cond_embedding")]
    optimizers = [torch.optim.AdamW(group, weight_decay=0.01) for group in (server, encoder)]
    latents = base.encode(private.images)
    text = base.encode_prompts(private.prompts)
    start = snapshot(whole)
    for number in range(STEPS):
        lr = learning_rate(number, config)
        step = split.step(number, lr)
        i, t = step.truth.indices, step.truth.timesteps
        noisy = base.pipeline.scheduler.add_noise(latents[i], step.truth.noise, t)
        down, mid = whole(noisy, t, text[i], (private.hints[i] + 1) / 2, return_dict=False)
        noise_pred = base.unet(
            noisy, t, text[i], down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        loss = F.mse_loss(noise_pred, step.truth.noise)
        whole.zero_grad()
        loss.backward()
        for group, optimizer in zip((server, encoder), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            torch.nn.utils.clip_grad_norm_(group, 1.0)  # each side clips what it holds
            optimizer.step()
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        joined = snapshot(split.controlnet())
        assert apart(snapshot(whole), joined, start) < PRECISION
    client = {name: value for name, value in joined.items() if name.startswith("controlnet_cond_embedding")}
    assert apart(snapshot(whole), client, start) < PRECISION  # on its own too: it is a small part of the whole


def test_split_gradients_returns_the_gradient_of_what_was_sent_and_counts_it(base: Base, private: ImageSet):
    config = run_config(scheme="split_gradients", defences=Defences(half=True))
    step = built(base, private, config).step(0, 1e-3)
    smashed = from_bytes(step.message).need("smashed")
    assert smashed.shape == (3, 16, 4, 4)  # the U-Net's first width at the latents' size
    assert smashed.nbytes < step.down_bytes < smashed.nbytes + 200
    assert step.up_bytes == len(step.message)


def test_split_gradients_hands_out_a_copy(base: Base, private: ImageSet):
    config = run_config(scheme="split_gradients")
    scheme = built(base, private, config)
    joined = scheme.controlnet()
    before = [p.detach().clone() for p in joined.parameters()]
    steps_of(scheme, config)
    assert all(map(torch.equal, before, joined.parameters()))


def test_nothing_comes_back_in_split_and_nothing_leaves_in_central(base: Base, private: ImageSet):
    split = built(base, private, run_config(scheme="split")).step(0, 1e-3)
    assert (split.up_bytes, split.down_bytes) == (len(split.message), 0)
    central = built(base, private, run_config(scheme="central")).step(0, 1e-3)
    assert (central.message, central.truth, central.up_bytes, central.down_bytes) == (None, None, 0, 0)


def test_split_gives_the_server_model_the_public_defences(base: Base, private: ImageSet):
    config = run_config(defences=Defences(symsigmoid=True, hide_prompts=True))
    model = built(base, private, config).controlnet()
    assert isinstance(model, LatentHintControlNet)
    assert (model.config.activation, model.config.hide_prompts) == ("symsigmoid", True)


def test_clients_take_turns(base: Base, private: ImageSet):
    config = run_config(scheme="split", n_clients=3)
    messages = [from_bytes(step.message) for step in steps_of(built(base, private, config), config)]
    assert [(m.client, m.sequence) for m in messages] == [(i % 3, i // 3) for i in range(STEPS)]


def test_federated_averages_what_each_client_alone_would_have_learned(base: Base, private: ImageSet):
    config = run_config(scheme="federated", n_clients=2, local_steps=3, steps=6)
    federated = built(base, private, config)
    start = snapshot(federated.controlnet())
    for number in range(6):
        federated.step(number, 1e-3)
    alone = []
    for client in make_clients(base, private, config):
        central = Central(base, run_config(scheme="central"), [client])
        for number in range(3):
            central.step(number, 1e-3)
        alone.append(snapshot(central.controlnet()))
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    assert apart(snapshot(federated.controlnet()), mean, start) < PRECISION
    assert apart(alone[0], alone[1], start) > 100 * PRECISION


def test_federated_with_one_client_and_one_round_is_central(base: Base, private: ImageSet):
    federated = built(base, private, run_config(scheme="federated", local_steps=STEPS))
    central = built(base, private, run_config(scheme="central"))
    start = snapshot(central.controlnet())
    for scheme in (federated, central):
        steps_of(scheme, run_config())
    assert apart(snapshot(federated.controlnet()), snapshot(central.controlnet()), start) < PRECISION


def test_federated_goes_on_with_new_batches_in_the_second_round(base: Base, private: ImageSet):
    config = run_config(scheme="federated", n_clients=1, local_steps=2, steps=4)
    scheme = built(base, private, config)
    global_weights = []
    for number in range(4):
        step = scheme.step(number, 1e-3)
        global_weights.append(scheme.controlnet().conv_in.weight.clone())
        # the whole model crosses once up and once down per turn, and nothing in between
        size = sum(v.nbytes for v in scheme.controlnet().state_dict().values())
        if number % 2:
            assert size <= step.up_bytes == step.down_bytes < 1.5 * size
        else:
            assert step.up_bytes == step.down_bytes == 0
    assert torch.equal(global_weights[1], global_weights[2])  # changes only when averaged
    assert not torch.equal(global_weights[1], global_weights[3])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_scheme_touches_the_public_models(base: Base, private: ImageSet, scheme: str):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    config = run_config(scheme=scheme)
    steps_of(built(base, private, config), config)
    assert all(torch.equal(before[name], value) for name, value in base.unet.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loss_that_is_not_finite_leaves_the_weights(base: Base, private: ImageSet, scheme: str):
    built_scheme = built(base, private, run_config(scheme=scheme))
    model = next(iter(built_scheme.modules.values()))
    with torch.no_grad():
        model.controlnet_mid_block.bias.fill_(float("nan"))
    if scheme == "federated":  # its client starts from the global weights
        with torch.no_grad():
            built_scheme.modules["controlnet"].controlnet_mid_block.bias.fill_(float("nan"))
    before = model.conv_in.weight.clone()
    assert math.isnan(built_scheme.step(0, 1e-3).loss)
    assert torch.equal(model.conv_in.weight, before)


def test_gradients_are_clipped_to_norm_one_before_the_step():
    # apart from the runs above, whose gradients are too small to be clipped
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    weight.grad = torch.tensor([3.0, 4.0])
    _update(optimizer, 0.1)
    assert weight.tolist() == pytest.approx([-0.06, -0.08], rel=1e-4)  # a step of length 1 times the learning rate
    weight.grad = torch.tensor([0.3, 0.4])
    _update(optimizer, 0.1)
    assert weight.tolist() == pytest.approx([-0.09, -0.12], rel=1e-4)  # a short gradient is left as it is


def test_every_scheme_is_of_the_scheme_protocol(base: Base, private: ImageSet):
    kinds = {"central": Central, "federated": Federated, "split": Split, "split_gradients": SplitGradients}
    for scheme, kind in kinds.items():
        made = built(base, private, run_config(scheme=scheme))
        assert isinstance(made, kind)
        assert isinstance(made, Scheme)
