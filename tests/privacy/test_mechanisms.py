import copy
import math

import pytest
import torch
from torch import nn
from world import tiny

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.diffusion.trainable import TRAINABLE, check_optimizer, mark_trainable, merge_lora, transformers_of
from splitlab.dp.conditioning import TextEmbedder, denoiser, make_conditioning
from splitlab.federated.defences import share_protected
from splitlab.federated.defences.dp_sgd import PerExample
from splitlab.federated.private_client import private_update
from splitlab.federated.update import check_update
from splitlab.privacy import mechanisms as engine
from splitlab.privacy.mechanisms import clip_and_sum, clipped_sum, norms, private_gradient

CLASSES = tuple(tiny.PROMPTS[:3])


def model_of(
    base: Base, trainable: str = "attention", kind: str = "class", *, from_block: int = 0, double: bool = True
):
    """A denoiser with some part of it trainable, every trained weight moved off special values."""
    prompts = [CLASSES[i % 3] for i in range(4)]
    conditioning = make_conditioning(base, kind, prompts, classes=CLASSES)
    model = denoiser(base, conditioning)
    mark_trainable(model.unet, trainable, from_block=from_block, rank=2)
    draw = tiny.draw(7)
    with torch.no_grad():  # LoRA's second factor starts at zero, where half of the gradients vanish
        for parameter in engine.trainable_parameters(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    conditions = conditioning.conditions
    if double:
        model = model.double()
        conditions = conditions.double() if conditions.is_floating_point() else conditions
    return model, conditions


def inputs_of(conditions: torch.Tensor, *, double: bool = True, seed: int = 0):
    draw, n = tiny.draw(seed), len(conditions)
    dtype = torch.float64 if double else torch.float32
    latents = torch.randn(n, 4, 4, 4, generator=draw, dtype=dtype)
    noise = torch.randn(n, 4, 4, 4, generator=draw, dtype=dtype)
    return latents, conditions, torch.randint(1000, (n,), generator=draw), noise


def looped(model: nn.Module, inputs) -> dict[str, torch.Tensor]:
    """Per-sample gradients the slow way: one backward pass per sample, no hooks, nothing shared."""
    parameters = engine.trainable_parameters(model)
    rows = []
    for index in range(len(inputs[0])):
        loss = model(*(x[index : index + 1] for x in inputs)).sum()
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def hooked(model: nn.Module, inputs):
    with engine.per_sample_hooks(model):
        return engine.per_sample_gradients(model, inputs)[0]


def relative_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest over parameters; those whose gradient vanishes (a softmax ignores key biases) go by the others'."""
    assert found.keys() == truth.keys()
    floor = 1e-6 * norms({n: g.unsqueeze(0) for n, g in truth.items()}).item()
    return max(float((found[n] - truth[n]).norm() / truth[n].norm().clamp_min(floor)) for n in truth)


CASES = [(name, "class", 0) for name in TRAINABLE] + [("attention", "text", 2), ("lora", "none", 1)]


@pytest.mark.parametrize(("trainable", "kind", "from_block"), CASES)
def test_hooks_give_each_samples_own_gradient(base: Base, trainable: str, kind: str, from_block: int):
    model, conditions = model_of(base, trainable, kind, from_block=from_block)
    inputs = inputs_of(conditions)
    assert relative_error(hooked(model, inputs), looped(model, inputs)) <= 1e-10


def test_a_text_model_called_as_pipelines_do_has_no_gradient_per_sample(base: Base):
    """What `TextEmbedder` is for: CLIP's position look-up has one row for the whole batch."""
    encoder = copy.deepcopy(base.text_encoder).requires_grad_(False)
    encoder.embeddings.position_embedding.requires_grad_(True)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, ids):
            return self.encoder(ids).last_hidden_state.square().mean((1, 2))

    ids = torch.randint(5, (3, base.tokenizer.model_max_length), generator=tiny.draw())
    with pytest.raises(InputError, match=r"position_embedding.*no per-sample gradient for 3 samples"):
        hooked(Plain(), (ids,))

    class Ours(Plain):
        def forward(self, ids):
            return TextEmbedder(self.encoder)(ids).square().mean((1, 2))

    assert relative_error(hooked(Ours(), (ids,)), looped(Ours(), (ids,))) < 1e-5


def test_hooks_leave_the_model_as_it_was(base: Base):
    model, conditions = model_of(base)
    model.train()
    hooked(model, inputs_of(conditions))
    assert all(layer.training for layer in model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_folding_averages_an_images_draws_before_it_is_clipped(base: Base):
    model, conditions = model_of(base)
    images, k, bound = len(conditions), 3, 1e-3
    inputs = inputs_of(conditions.repeat_interleave(k, 0))
    single = looped(model, inputs)
    expected = {name: torch.zeros_like(g[0]) for name, g in single.items()}
    for image in range(images):
        mean = {name: g[image * k : (image + 1) * k].mean(0) for name, g in single.items()}
        size = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
        for name, g in mean.items():
            expected[name] += g * min(1.0, bound / size)
    found = clipped_sum(model, inputs, max_grad_norm=bound, multiplicity=k).total
    assert relative_error(found, expected) <= 1e-10
    late, _ = clip_and_sum(single, bound)  # clipping first lets an image count K times: another sum
    assert relative_error({name: g / k for name, g in late.items()}, expected) > 1e-3


@pytest.mark.parametrize("physical_batch", [1, 2, 5, 6, 100])
def test_chunks_change_nothing(base: Base, physical_batch: int):
    model, conditions = model_of(base)
    inputs = inputs_of(conditions.repeat_interleave(2, 0))
    whole = clipped_sum(model, inputs, max_grad_norm=0.01, multiplicity=2)
    parts = clipped_sum(model, inputs, max_grad_norm=0.01, multiplicity=2, physical_batch=physical_batch)
    assert relative_error(parts.total, whole.total) <= 1e-12
    torch.testing.assert_close(parts.losses, whole.losses)
    torch.testing.assert_close(parts.norms, whole.norms)


def test_an_empty_batch_runs_nothing_forward_and_is_noised_all_the_same(base: Base):
    model, conditions = model_of(base, double=False)
    inputs = inputs_of(conditions[:0], double=False)
    model.unet.forward = None  # a forward pass would fail
    clipped = clipped_sum(model, inputs, max_grad_norm=1.0)
    assert len(clipped.losses) == len(clipped.norms) == 0
    assert all((g == 0).all() for g in clipped.total.values())
    released = private_gradient(
        model, inputs, max_grad_norm=2.0, noise_multiplier=3.0, expected_batch=4.0, generator=tiny.draw()
    )
    values = torch.cat([g.flatten() for g in released.values()])
    assert values.std() == pytest.approx(2.0 * 3.0 / 4.0, rel=0.05)


@pytest.mark.parametrize("bound", [1e-6, 1e-3, 0.1, 10.0])
def test_no_sample_exceeds_the_clip_norm(base: Base, bound: float):
    """One sample at a time through the same code: the sum is that sample's share."""
    model, conditions = model_of(base, "unet", double=False)
    inputs = inputs_of(conditions, double=False)
    with engine.per_sample_hooks(model):
        gradients, _ = engine.per_sample_gradients(model, inputs)
    sizes = norms(gradients)
    for index in range(len(sizes)):
        share, _ = clip_and_sum({name: g[index : index + 1] for name, g in gradients.items()}, bound)
        size = math.sqrt(sum(float(g.double().square().sum()) for g in share.values()))
        assert size <= bound * (1 + 1e-6)
        assert size == pytest.approx(min(bound, float(sizes[index])), rel=1e-5)


def test_norms_of_many_small_entries_do_not_read_low():
    gradients = {"weight": torch.full((2, 1_000_003), 0.001)}
    assert norms(gradients).tolist() == pytest.approx(
        [math.sqrt(1_000_003) * float(torch.tensor(0.001))] * 2, rel=1e-12
    )


def test_a_sample_without_finite_gradient_counts_as_zero():
    gradients = {
        "a": torch.tensor([[1.0, 0.0], [math.nan, 1.0], [math.inf, 0.0], [0.0, 0.0]]),
        "b": torch.ones(4, 2, 2),
    }
    total, sizes = clip_and_sum(gradients, 1.0)
    expected, _ = clip_and_sum({name: g[[0, 3]] for name, g in gradients.items()}, 1.0)
    assert torch.isfinite(sizes).tolist() == [True, False, False, True]
    for name in expected:
        torch.testing.assert_close(total[name], expected[name])


def test_the_noise_has_the_size_that_the_accountant_is_told():
    total = {"a": torch.zeros(500, 400), "b": torch.zeros(300_000)}
    released = engine.release(total, 0.3, 1.7, expected_batch=50.0, generator=tiny.draw(3))
    values = torch.cat([g.flatten() for g in released.values()])
    assert values.std() / (0.3 * 1.7 / 50.0) == pytest.approx(1.0, abs=0.01)
    assert abs(values.mean()) < 5 * 0.3 * 1.7 / 50.0 / math.sqrt(500_000)
    again = engine.release(total, 0.3, 1.7, expected_batch=50.0, generator=tiny.draw(3))
    assert all(torch.equal(released[name], again[name]) for name in total)
    assert not torch.equal(released["a"].flatten()[:1000], released["b"][:1000])


def test_private_equals_plain_where_nothing_is_clipped_or_noised(base: Base):
    model, conditions = model_of(base, "transformers")
    inputs = inputs_of(conditions.repeat_interleave(2, 0))
    private = private_gradient(
        model,
        inputs,
        max_grad_norm=math.inf,
        noise_multiplier=0.0,
        expected_batch=float(len(conditions)),
        generator=tiny.draw(),
        multiplicity=2,
    )
    plain, losses = engine.plain_gradient(
        model, inputs, expected_batch=float(len(conditions)), multiplicity=2, physical_batch=4
    )
    loss = model(*inputs).mean()
    loss.backward()
    vanilla = {name: p.grad for name, p in engine.trainable_parameters(model).items()}
    assert relative_error(private, vanilla) <= 1e-12
    assert relative_error(plain, vanilla) <= 1e-12
    assert losses.mean() == pytest.approx(loss.item())


def test_poisson_batches_have_binomial_sizes():
    """Mean and variance of 4,000 batches of Binomial(60, 0.2), and no two samples go together more than chance."""
    draw = tiny.draw(5)
    drawn = torch.zeros(4000, 60)
    for batch in drawn:
        batch[engine.poisson_sample(60, 0.2, generator=draw)] = 1
    sizes = drawn.sum(1)
    assert sizes.mean() == pytest.approx(12.0, abs=4 * math.sqrt(9.6 / 4000))
    assert sizes.var() == pytest.approx(9.6, rel=0.1)
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 6 / math.sqrt(4000)
    assert len(engine.poisson_sample(60, 1.0, generator=draw)) == 60


def test_layers_without_per_sample_gradients_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.curve = nn.PReLU()

        def forward(self, x):
            return self.curve(self.first(x)).sum(1)

    for layer, text in ((nn.BatchNorm1d(2), r"'1' \(BatchNorm1d\)"), (nn.PReLU(), r"'1' \(PReLU\).*freeze it")):
        model = nn.Sequential(nn.Linear(2, 2), layer, nn.Flatten(0))
        with pytest.raises(InputError, match=text):
            clipped_sum(model, (torch.zeros(3, 2),), max_grad_norm=1.0)
    model = Odd()
    model.curve.requires_grad_(False)
    clipped_sum(model, (torch.ones(3, 2),), max_grad_norm=1.0)
    with pytest.raises(InputError, match="3 rows are no whole number of samples with 2 draws"):
        clipped_sum(model, (torch.ones(3, 2),), max_grad_norm=1.0, multiplicity=2)
    with pytest.raises(InputError, match="nothing would be trained"):
        clipped_sum(model.requires_grad_(False), (torch.ones(3, 2),), max_grad_norm=1.0)


def test_batch_norm_that_uses_the_batch_is_refused_even_where_it_is_not_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False, track_running_stats=False), nn.Flatten(0))
    with pytest.raises(InputError, match="mixes the samples"):
        clipped_sum(model, (torch.zeros(3, 2),), max_grad_norm=1.0)


def test_an_unused_parameter_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "spare": nn.Linear(2, 1)})
    model.forward = lambda x: model["used"](x)[:, 0]  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"'spare.weight' has no per-sample gradient"):
        clipped_sum(model, (torch.ones(3, 2),), max_grad_norm=1.0)


@pytest.mark.parametrize(("bound", "sigma"), [(0.0, 1.0), (math.inf, 1.0), (1.0, -1.0), (math.nan, 0.0)])
def test_impossible_mechanisms_are_refused(bound: float, sigma: float):
    with pytest.raises(InputError, match="max_grad_norm"):
        private_gradient(
            nn.Linear(2, 1),
            (torch.ones(3, 2),),
            max_grad_norm=bound,
            noise_multiplier=sigma,
            expected_batch=1.0,
            generator=tiny.draw(),
        )


def test_a_private_client_shares_what_per_example_clipping_of_its_gradient_gives(base: Base):
    """Two implementations: hooks in one pass here, one backward pass per example in `update_defences`."""
    truth = tiny.update_truth(base, n=3)
    unet = copy.deepcopy(base.unet)
    settings = {"alphas_cumprod": base.alphas_cumprod, "max_grad_norm": 0.01, "trainable": "transformers"}
    update = private_update(unet, truth, noise_multiplier=0.0, generator=tiny.draw(), **settings)
    defence = PerExample(max_grad_norm=0.01)
    arguments = {"alphas_cumprod": base.alphas_cumprod, "trainable": "attention"}  # its name for whole transformers
    other = share_protected(unet, truth, defence, generator=tiny.draw(), **arguments)
    assert relative_error(update.gradients, other.gradients) < 1e-4
    check_update(update, base.unet)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), base.unet.parameters(), strict=True))
    assert not any(p.requires_grad for p in unet.parameters())


def test_a_federations_noise_adds_up_to_the_same(base: Base):
    """Central: none on the clients. Distributed: the shares' sum has the whole. Local: each message has it."""
    sigma, n, bound = 1.5, 4, 0.1
    truth = tiny.update_truth(base, n=2)

    def noise_of(trust: str, sigma: float, seed: int) -> torch.Tensor:
        update = private_update(
            base.unet,
            truth,
            alphas_cumprod=base.alphas_cumprod,
            max_grad_norm=bound,
            noise_multiplier=sigma,
            generator=tiny.draw(seed),
            trust=trust,
            n_clients=n,
        )
        return torch.cat([g.flatten() for g in update.gradients.values()]) * len(truth)

    bare = noise_of("local", 0.0, 0)
    assert torch.equal(noise_of("central", sigma, 1), bare)
    assert (noise_of("local", sigma, 2) - bare).std() == pytest.approx(sigma * bound, rel=0.05)
    total = sum(noise_of("distributed", sigma, seed) - bare for seed in range(n))
    assert total.std() == pytest.approx(sigma * bound, rel=0.05)
    with pytest.raises(InputError, match="'nobody' is unknown"):
        noise_of("nobody", sigma, 0)


def test_trainable_sets_are_nested_and_cut_from_the_kth_block(base: Base):
    sizes = {}
    for name in TRAINABLE:
        unet = copy.deepcopy(base.unet)
        names = mark_trainable(unet, name, rank=2)
        assert set(names) == {n for n, p in unet.named_parameters() if p.requires_grad}
        sizes[name] = set(names)
    assert sizes["attention"] < sizes["blocks"] < sizes["transformers"] < sizes["unet"]
    assert all(".lora_" in name for name in sizes["lora"])
    blocks = transformers_of(base.unet)
    assert [name.partition("_")[0] for name in blocks] == ["down"] * 2 + ["mid"] + ["up"] * 4
    for name in ("attention", "lora"):
        unet = copy.deepcopy(base.unet)
        names = mark_trainable(unet, name, from_block=3, rank=2)
        assert names
        assert {n.partition(".transformer_blocks")[0] for n in names} == set(blocks[3:])


def test_unknown_sets_and_blocks_are_refused(base: Base):
    unet = copy.deepcopy(base.unet)
    with pytest.raises(InputError, match=r"'attn' is unknown.*attention"):
        mark_trainable(unet, "attn")
    with pytest.raises(InputError, match="from_block 7: the U-Net has 7 transformers"):
        mark_trainable(unet, "attention", from_block=7)


def test_an_optimiser_of_other_parameters_is_refused(base: Base):
    model, _ = model_of(base)
    parameters = engine.trainable_parameters(model)
    check_optimizer(model, torch.optim.SGD(parameters.values(), lr=1.0))
    for wrong in (list(model.parameters()), list(parameters.values())[1:]):
        with pytest.raises(InputError, match="not in the optimiser"):
            check_optimizer(model, torch.optim.SGD(wrong, lr=1.0))


def test_merged_adapters_compute_what_they_computed_beside_the_weights(base: Base):
    model, conditions = model_of(base, "lora")
    inputs = inputs_of(conditions)
    before = model(*inputs)
    merge_lora(model.unet)
    torch.testing.assert_close(model(*inputs), before)
    assert model.unet.state_dict().keys() == base.unet.state_dict().keys()


@pytest.mark.parametrize("kind", ["class", "text", "none"])
def test_before_the_first_step_the_model_is_the_public_base(base: Base, kind: str):
    prompts = [CLASSES[2], CLASSES[0], CLASSES[2]]
    conditioning = make_conditioning(base, kind, prompts, classes=CLASSES)
    latents, conditions, timesteps, noise = inputs_of(conditioning.conditions, double=False)
    text = base.encode_prompts(prompts if kind != "none" else [""] * 3)
    predicted = base.unet(base.noised(latents, noise, timesteps), timesteps, text).sample
    expected = (predicted - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(denoiser(base, conditioning)(latents, conditions, timesteps, noise), expected)


def test_a_prompt_of_no_class_is_named_and_classes_are_needed(base: Base):
    with pytest.raises(InputError, match="'a cat' is none of the 3 classes"):
        make_conditioning(base, "class", ["a cat"], classes=CLASSES)
    with pytest.raises(InputError, match="needs `classes`"):
        make_conditioning(base, "class", [CLASSES[0]])
    with pytest.raises(InputError, match="'label' is unknown"):
        make_conditioning(base, "label", [CLASSES[0]])
