"""Reconstructing images from gradients: on tiny models, from honest random starts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from world import tiny

from splitlab.core.errors import InputError
from splitlab.diffusion.metrics import mse
from splitlab.federated.attacks import INVERSIONS, ON_IMAGES
from splitlab.federated.attacks.baselines import dlg, inverting_gradients, variation
from splitlab.federated.attacks.gidm import gidm, gidm_plus
from splitlab.federated.attacks.gradient_matching import known_noise
from splitlab.federated.attacks.matching import DISTANCES, Matcher, layer_weights
from splitlab.federated.attacks.noisy_inputs import find_noisy
from splitlab.federated.attacks.optimise import lbfgs
from splitlab.federated.attacks.patches import Layer, SpanTest, choose_layers, find_layers
from splitlab.federated.attacks.problem import Problem
from splitlab.federated.attacks.residual import solve_residual, tail
from splitlab.federated.attacks.unknown_noise import unknown_noise
from splitlab.federated.client import InversionKnowledge, noised, pixel_unet, share, training_loss
from splitlab.federated.defences import protect, share_protected
from splitlab.federated.defences.bits import Quantise
from splitlab.federated.defences.clip import Clip
from splitlab.federated.defences.soteria import Soteria
from splitlab.federated.defences.top_k import TopK
from splitlab.federated.update import Update, UpdateTruth

SIZE = 8
SCHEDULE = torch.linspace(0.9999, 0.98, 1000).cumprod(0)
MODEL = pixel_unet(SIZE, seed=0, channels=(32, 32))
"""32 outputs for the 4x4 positions of the lower level: its gradients span the patches of up to two images."""
SMALL = pixel_unet(SIZE, seed=0, channels=(8, 8))
"""Too narrow for that."""


def _images(n: int, *, seed: int) -> Tensor:
    images = tiny.small_set(n, seed=seed).images
    return torch.nn.functional.interpolate(images, size=(SIZE, SIZE), mode="area")


def _case(
    n: int, *, batch: int = 1, t: tuple[int, ...] = (100,), objective: str = "epsilon", small: bool = False
) -> tuple[list[Update], InversionKnowledge, UpdateTruth]:
    """Return n updates, what the server knows, and the truth, noise granted."""
    model = SMALL if small else MODEL
    clean = _images(n * batch, seed=3)
    times = torch.tensor((list(t) * n * batch)[: n * batch])
    truth = UpdateTruth(clean, times, torch.randn(clean.shape, generator=tiny.draw(5)))
    parts = [truth[i * batch : (i + 1) * batch] for i in range(n)]
    updates = [share(model, part, alphas_cumprod=SCHEDULE, objective=objective) for part in parts]
    known = InversionKnowledge(model, SCHEDULE, batch_size=batch, timesteps=times, noise=truth.noise)
    return updates, known, truth


ATTACKS: dict[str, tuple[Callable, dict]] = {
    "dlg": (dlg, {"n_evals": 8}),
    "inverting_gradients": (inverting_gradients, {"n_evals": 8}),
    "gidm": (gidm, {"latent_evals": 2, "pixel_evals": 6, "sampler_steps": 2, "lr": 0.05}),
    "gidm_plus": (gidm_plus, {"n_evals": 6}),
    "known_noise": (known_noise, {"n_evals": 8}),
    "unknown_noise": (unknown_noise, {"n_evals": 8, "n_starts": 1, "start": "random"}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_leaves_its_start_repeats_and_modifies_nothing(name: str) -> None:
    attack, options = ATTACKS[name]
    updates, known, _ = _case(2, small=True)
    before = [{k: v.clone() for k, v in update.gradients.items()} for update in updates]
    weights = {k: v.clone() for k, v in known.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in known.model.parameters()]
    told: list[float] = []
    result = attack(updates, known, generator=tiny.draw(), callback=lambda *a: told.append(a[3]), **options)
    again = attack(updates, known, generator=tiny.draw(), **options)
    assert result.images.shape == (2, 3, 8, 8)
    assert result.images.abs().max() <= 1
    assert len(told) == len(result.objective) <= result.n_evals
    assert min(result.objective) < result.objective[0]
    assert torch.isfinite(result.final).all()
    assert result.history[0][0] == 1
    assert not torch.equal(result.history[0][1], result.images)
    assert torch.equal(result.images, again.images)
    assert result.cpu_s > 0
    for update, gradients in zip(updates, before, strict=True):
        assert all(torch.equal(update.gradients[k], v) for k, v in gradients.items())
    assert all(torch.equal(v, weights[k]) for k, v in known.model.state_dict().items())
    assert [parameter.requires_grad for parameter in known.model.parameters()] == flags


def test_the_noise_need_not_be_known() -> None:
    updates, known, truth = _case(3)
    known = replace(known, noise=None)
    result = unknown_noise(updates, known, generator=tiny.draw())
    assert mse(result.images, truth.clean).max() < 1e-4
    assert result.noise is not None
    assert mse(result.noise, truth.noise).max() < 1e-2
    assert result.final.max() < 1e-4


def test_two_images_in_one_update_velocity_prediction() -> None:
    updates, known, truth = _case(1, batch=2, t=(100, 400), objective="v_prediction")
    known = replace(known, noise=None, timesteps=None, batch_size=None)
    result = unknown_noise(updates, known, generator=tiny.draw())
    assert torch.equal(result.timesteps, truth.timesteps)
    assert mse(result.images, truth.clean).max() < 1e-3


def test_the_patch_test_as_a_start_when_the_noise_is_known() -> None:
    updates, known, truth = _case(1)
    result = known_noise(updates, known, generator=tiny.draw(), start="patches", n_evals=3)
    assert mse(result.images, truth.clean).max() < 1e-4


def test_matching_finds_the_image_when_the_noise_is_known() -> None:
    updates, known, truth = _case(1, t=(250,), small=True)
    result = known_noise(updates, known, generator=tiny.draw(), n_evals=60)
    start = 0.3 * torch.randn(1, 192, generator=tiny.draw()).reshape(1, 3, 8, 8)
    assert mse(result.clean, truth.clean)[0] < 0.5 * mse(start, truth.clean)[0]


@pytest.mark.parametrize("name", ["known_noise", "unknown_noise", "dlg"])
def test_random_gradients_give_no_image(name: str) -> None:
    updates, known, truth = _case(2)
    draw = tiny.draw(9)
    nonsense = [u.map(lambda v: v.square().mean().sqrt() * torch.randn(v.shape, generator=draw)) for u in updates]
    options = {"n_evals": 12} | ({"n_starts": 1, "n_iterations": 20} if name == "unknown_noise" else {})
    result = ATTACKS[name][0](nonsense, known, generator=tiny.draw(), **options)
    guess = _images(12, seed=8).mean(0, keepdim=True).expand_as(truth.clean)
    assert mse(result.images, truth.clean).mean() >= mse(guess, truth.clean).mean()


def test_the_patch_test_is_zero_at_the_truth_only() -> None:
    updates, known, truth = _case(2)
    problem = Problem(updates, known)
    index = torch.zeros(1, dtype=torch.int64)
    names = list(updates[0].gradients)
    layers = find_layers(
        problem.model, names, lambda x: problem.predict(x, truth.timesteps[:1], index), torch.zeros(1, 3, SIZE, SIZE)
    )
    chosen = choose_layers(layers, batch=1, unknowns=problem.unknowns)
    assert [layer.name for layer in chosen] == ["down_blocks.0.downsamplers.0.conv"]
    test = SpanTest(problem.model, chosen, problem.gradients, batch=1)
    both = torch.arange(2)
    signal, sigma = problem.rates(truth.timesteps)
    noisy = signal * truth.clean + sigma * truth.noise
    right = test.losses(lambda x: problem.predict(x, truth.timesteps, both), noisy, both)
    swapped = test.losses(lambda x: problem.predict(x, truth.timesteps, both), noisy.flip(0), both)
    assert right.max() < 1e-6
    assert swapped.min() > 1e-2


def test_a_defended_update_starts_until_two_starts_agree() -> None:
    """Its test is nowhere 0, and one start alone may have ended in a false minimum."""
    updates, known, truth = _case(2)
    problem = Problem([protect(update, Quantise(8), generator=tiny.draw(0)) for update in updates], known)
    found = find_noisy(problem, generator=tiny.draw(1), n_starts=12, n_evals=150)
    assert found is not None
    assert found.value.min() > 1e-6
    assert 4 <= found.starts < 12
    assert mse(found.noisy, noised(SCHEDULE, truth.clean, truth.noise, truth.timesteps)).max() < 0.02


def test_an_exact_update_is_not_settled_by_false_minima() -> None:
    """Starts cut short agree on nothing in particular: only an update that cannot reach 0 may take that for an end."""
    updates, known, _ = _case(2)
    found = find_noisy(Problem(updates, known), generator=tiny.draw(1), n_starts=6, n_evals=2)
    assert found is not None
    assert found.starts == 6


def test_layers_with_more_positions_than_outputs_are_not_tested() -> None:
    assert not Layer("wide", 0, positions=65, width=288, outputs=64).is_spanned(1)
    assert Layer("wide", 0, positions=64, width=288, outputs=64).is_spanned(1)
    assert not Layer("wide", 0, positions=64, width=288, outputs=64).is_spanned(2)
    assert choose_layers([Layer("few", 0, 2, 4, 8)], batch=1, unknowns=100) == []


def test_the_residual_solves_the_linear_system() -> None:
    updates, known, truth = _case(1)
    problem = Problem(updates, known)
    signal, sigma = problem.rates(truth.timesteps)
    noisy = signal * truth.clean + sigma * truth.noise
    solved = solve_residual(problem, 0, noisy, truth.timesteps, tail(problem))
    assert mse(solved.prediction - solved.residual, truth.noise)[0] < 1e-3
    assert solved.misfit < 1e-6


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_slopes_of_distances_agree_with_autograd(distance: str) -> None:
    found = {n: torch.randn(2, *s, generator=tiny.draw(i)) for i, (n, s) in enumerate({"a": (3, 2), "b": (4,)}.items())}
    wanted = {name: torch.randn(value.shape, generator=tiny.draw(7)) for name, value in found.items()}
    weights = {"a": torch.tensor([0.5, 2.0]), "b": torch.tensor([1.0, 0.0])}
    own = [value.requires_grad_(True) for value in found.values()]
    values, slopes = DISTANCES[distance](found, wanted, weights)
    for name, slope in zip(found, torch.autograd.grad(values.sum(), own), strict=True):
        torch.testing.assert_close(slopes[name].detach(), slope)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_tape_agrees_with_autograd(batch: int) -> None:
    updates, known, truth = _case(2, batch=batch, small=True)
    problem = Problem(updates, known)
    matcher = Matcher(problem)
    z = torch.randn(2, batch * problem.unknowns, generator=tiny.draw(1))
    values, slopes = matcher.from_clean(truth.noise)(z)
    for number in range(2):
        own = slice(number * batch, (number + 1) * batch)
        clean = z[number].reshape(batch, 3, 8, 8).requires_grad_(True)
        parameters = {n: p.detach().requires_grad_(True) for n, p in problem.model.named_parameters()}
        loss = training_loss(
            problem.model,
            clean,
            truth.timesteps[own],
            truth.noise[own],
            alphas_cumprod=SCHEDULE,
            parameters=parameters,
        )
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        weights = layer_weights(updates[number].gradients)
        value = sum(
            weights[n] * (g - updates[number].gradients[n]).square().sum()
            for n, g in zip(parameters, found, strict=True)
        )
        (slope,) = torch.autograd.grad(value, clean)
        torch.testing.assert_close(values[number], value.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(slopes[number], slope.flatten(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_vanish_at_the_truth(distance: str) -> None:
    updates, known, truth = _case(2, small=True)
    matcher = Matcher(Problem(updates, known), distance=distance)
    value, _ = matcher.from_clean(truth.noise)(truth.clean.flatten(1))
    other, _ = matcher.from_clean(truth.noise)(truth.clean.flip(0).flatten(1))
    assert value.abs().max() < 1e-5
    assert (value < 0.1 * other).all()


def test_a_cosine_does_not_see_the_length() -> None:
    updates, known, truth = _case(1, small=True)
    longer = updates[0].map(lambda v: 3 * v)
    flat = truth.clean.flatten(1)
    values = {
        name: Matcher(Problem(longer, known), distance=name).from_clean(truth.noise)(flat)[0] for name in DISTANCES
    }
    assert values["cosine"].max() < 1e-5
    assert values["normalised"].min() > 0.1


def test_annealing_counts_the_last_layers_first() -> None:
    weights = layer_weights({"first": torch.ones(4), "last": 2 * torch.ones(4)}, share=0.5)
    assert weights["first"] == 0
    assert weights["last"] == 1 / 16


def test_a_silent_tensor_does_not_pass_on_rounding_errors() -> None:
    weights = layer_weights({"loud": torch.ones(100), "silent": torch.full((100,), 1e-12)})
    assert weights["silent"] * 100 * 1e-24 < 1e-12


def test_lbfgs_solves_several_problems_as_if_they_were_alone() -> None:
    def objective(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_(True)
        value = (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(1)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    start = torch.randn(4, 6, generator=tiny.draw(), dtype=torch.float64)
    kept = start.clone()
    together = lbfgs(objective, start, n_evals=300)
    alone = lbfgs(objective, start[1:2], n_evals=300)
    assert together.value.max() < 1e-8
    assert together.value[1] == pytest.approx(float(alone.value[0]), abs=1e-8)
    assert torch.equal(start, kept)


def test_the_timestep_logits_of_gidm_plus_receive_a_gradient() -> None:
    updates, known, _ = _case(1, t=(900,), small=True)
    near = gidm_plus(updates, known, generator=tiny.draw(), n_evals=1, timestep_lr=0.0)
    moved = gidm_plus(updates, known, generator=tiny.draw(), n_evals=5, timestep_lr=10.0)
    assert near.timesteps is not None
    assert moved.timesteps is not None
    assert int(near.timesteps[0]) in (499, 500)
    assert int(moved.timesteps[0]) not in (499, 500)


def test_total_variation_of_a_ramp() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert variation(ramp).item() == 1.0


@pytest.mark.parametrize("fact", ["timesteps", "noise"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_need_what_their_records_say(attack: str, fact: str) -> None:
    updates, known, _ = _case(1, small=True)
    function, options = ATTACKS[attack]
    denied = replace(known, **{fact: None})
    if fact in INVERSIONS[attack].needs:
        with pytest.raises(InputError, match=rf"knowledge\.{fact}"):
            function(updates, denied, generator=tiny.draw(), **options)
    else:
        function(updates, denied, generator=tiny.draw(), **options)


def test_every_attack_on_images_is_tested() -> None:
    assert set(ATTACKS) == set(ON_IMAGES)


def test_bad_input_is_named() -> None:
    updates, known, _ = _case(2, small=True)
    with pytest.raises(InputError, match="at least one"):
        Problem([], known)
    with pytest.raises(InputError, match=r"knowledge\.noise has 2 entries"):
        known_noise(updates[:1], replace(known, timesteps=known.timesteps[:1]), generator=tiny.draw())
    with pytest.raises(InputError, match="differs from the first"):
        Problem([updates[0], replace(updates[1], objective="v_prediction")], known)
    with pytest.raises(InputError, match="distance 'l7'"):
        known_noise(updates, known, generator=tiny.draw(), distance="l7")
    with pytest.raises(InputError, match="sampler_steps"):
        gidm(updates, known, generator=tiny.draw(), sampler_steps=0)


def test_clipping_is_only_a_rescaling():
    updates, known, truth = _case(2)
    clipped = [protect(update, Clip(1e-3), generator=tiny.draw(0)) for update in updates]
    blind = replace(known, noise=None)
    found = unknown_noise(clipped, blind, generator=tiny.draw(1))
    assert mse(found.clean, truth.clean).max() < 0.02
    exact = known_noise(clipped, known, generator=tiny.draw(1), start="patches", n_evals=20)
    assert mse(exact.clean, truth.clean).max() < 1e-3


def test_a_scale_free_distance_is_blind_to_length_and_sees_direction():
    updates, known, truth = _case(2)
    problem = Problem(updates, known)
    doubled = Problem([update.map(lambda g: 2 * g) for update in updates], known)
    z = truth.clean.flatten(1)
    for one in (problem, doubled):
        value, _ = Matcher(one, distance="scale_free").from_clean(known.noise)(z)
        assert value.max() < 1e-6
    value, _ = Matcher(problem, distance="scale_free").from_clean(known.noise)(z + 0.3)
    assert value.min() > 1e-4


def test_withheld_entries_do_not_count():
    updates, known, truth = _case(1)
    sparse = [protect(update, TopK(0.5), generator=tiny.draw(0)) for update in updates]
    value, _ = Matcher(Problem(sparse, known)).from_clean(known.noise)(truth.clean.flatten(1))
    assert value.max() < 1e-9


def test_the_residual_leaves_withheld_entries_out():
    _, known, truth = _case(1)
    told = {"alphas_cumprod": SCHEDULE, "generator": tiny.draw(0)}
    pruned = share_protected(MODEL, truth, Soteria(0.5), **told)
    assert pruned.gradients["conv_out.weight"].flatten(2).abs().sum((0, 2)).eq(0).sum() == 16
    found = unknown_noise(pruned, replace(known, noise=None), generator=tiny.draw(1))
    assert mse(found.clean, truth.clean).max() < 1e-3
