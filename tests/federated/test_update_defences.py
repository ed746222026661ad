"""Each defence does what it says to the update, and nothing to its input."""

import pytest
import torch
from torch import Tensor, nn
from world import tiny
from world.tiny import ALPHAS, update_truth

from splitlab.core.errors import InputError
from splitlab.federated.client import pixel_unet, share, share_each
from splitlab.federated.defences import DEFENCES, effects, make_defence, protect, share_protected
from splitlab.federated.defences.aggregation import SecureAggregation, aggregate
from splitlab.federated.defences.bits import Quantise
from splitlab.federated.defences.clip import Clip
from splitlab.federated.defences.dp_sgd import PerExample, dp_sgd
from splitlab.federated.defences.noise import GaussianNoise
from splitlab.federated.defences.sign import Sign
from splitlab.federated.defences.soteria import Soteria, soteria_scores, withhold
from splitlab.federated.defences.top_k import TopK
from splitlab.federated.update import Update

ALL = [
    GaussianNoise(0.5),
    GaussianNoise(0.5, per="update"),
    Clip(0.01),
    TopK(0.1),
    Quantise(8),
    Quantise(4, stochastic=True),
    Sign(),
]


@pytest.fixture(scope="module")
def pixel() -> nn.Module:
    return pixel_unet(8, seed=0, channels=(8, 16))


@pytest.fixture(scope="module")
def update(pixel: nn.Module) -> Update:
    return share(pixel, update_truth(n=3), alphas_cumprod=ALPHAS)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in gradients.values()])


@pytest.mark.parametrize("defence", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_defence_never_modifies_its_input_and_keeps_names_shapes_and_types(update: Update, defence, dtype):
    given = update.map(lambda value: value.to(dtype))
    before = {name: value.clone() for name, value in given.gradients.items()}
    sent = protect(given, defence, generator=tiny.draw())
    assert all(torch.equal(value, before[name]) for name, value in given.gradients.items())
    assert {n: (v.shape, v.dtype) for n, v in sent.gradients.items()} == {
        n: (v.shape, dtype) for n, v in before.items()
    }
    assert any(not torch.equal(value, before[name]) for name, value in sent.gradients.items())
    assert sent.defence == str(defence)


def test_every_defence_on_updates_is_tested():
    assert {type(defence) for defence in ALL} == {record.levels for record in DEFENCES.values() if record.protect}


@pytest.mark.parametrize("defence", ALL, ids=str)
def test_equal_generators_give_equal_updates(update: Update, defence):
    one, other = (protect(update, defence, generator=tiny.draw(3)) for _ in range(2))
    assert all(torch.equal(value, other.gradients[name]) for name, value in one.gradients.items())


def test_defences_are_named_in_the_order_of_their_use(update: Update):
    sent = protect(update, TopK(0.1), generator=tiny.draw())
    assert (
        protect(sent, GaussianNoise(0.1), generator=tiny.draw()).defence == "TopK fraction=0.1, GaussianNoise rel=0.1"
    )


@pytest.mark.parametrize("rel", [0.1, 1.0, 10.0])
def test_noise_has_the_level_it_says(update: Update, rel: float):
    noise = protect(update, GaussianNoise(rel), generator=tiny.draw()).gradients
    large = {name: value for name, value in update.gradients.items() if value.numel() > 1000}
    assert large
    for name, value in large.items():
        added = (noise[name] - value).std()
        assert added / value.square().mean().sqrt() == pytest.approx(rel, rel=0.1)
    whole = flat(protect(update, GaussianNoise(rel, per="update"), generator=tiny.draw()).gradients)
    rms = flat(update.gradients).square().mean().sqrt()
    assert (whole - flat(update.gradients)).std() / rms == pytest.approx(rel, rel=0.02)


def test_no_noise_changes_nothing(update: Update):
    assert torch.equal(
        flat(protect(update, GaussianNoise(0.0), generator=tiny.draw()).gradients), flat(update.gradients)
    )


def test_clipping_only_rescales_and_only_what_is_too_long(update: Update):
    norm = float(flat(update.gradients).norm())
    short = flat(protect(update, Clip(norm / 10), generator=tiny.draw()).gradients)
    assert float(short.norm()) == pytest.approx(norm / 10, rel=1e-5)
    assert torch.allclose(short * 10, flat(update.gradients), rtol=1e-5)
    assert torch.equal(flat(protect(update, Clip(norm * 2), generator=tiny.draw()).gradients), flat(update.gradients))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1.0])
def test_top_k_keeps_the_largest_values_unchanged(update: Update, fraction: float):
    before, after = flat(update.gradients), flat(protect(update, TopK(fraction), generator=tiny.draw()).gradients)
    kept = after != 0
    nonzero = int((before != 0).sum())  # some processors' kernels leave a handful of exact zeros
    assert int(kept.sum()) == pytest.approx(min(fraction * len(before), nonzero), abs=1)
    assert torch.equal(after[kept], before[kept])
    assert fraction == 1.0 or before[kept].abs().min() >= before[~kept].abs().max()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisation_has_the_levels_it_says(update: Update, bits: int):
    sent = protect(update, Quantise(bits), generator=tiny.draw())
    for name, value in update.gradients.items():
        step = value.abs().max() / (2 ** (bits - 1) - 1)
        assert len(sent.gradients[name].unique()) <= 2**bits - 1
        assert (sent.gradients[name] - value).abs().max() <= step * 0.501


def test_stochastic_rounding_is_unbiased():
    update = Update({"w": torch.tensor([1.0, 0.3, -0.12])}, "gradient", "epsilon", 8, "")
    draw = tiny.draw()
    mean = sum(protect(update, Quantise(2, stochastic=True), generator=draw).gradients["w"] for _ in range(4000)) / 4000
    assert torch.allclose(mean, update.gradients["w"], atol=0.03)


def test_signs_keep_the_direction_and_the_mean_size(update: Update):
    sent = protect(update, Sign(), generator=tiny.draw())
    for name, value in update.gradients.items():
        assert torch.equal(sent.gradients[name].sign(), value.sign())
        assert sent.gradients[name].abs().max() == pytest.approx(float(value.abs().mean()), rel=1e-5)


def test_dp_sgd_that_neither_clips_nor_adds_noise_is_the_batch_gradient(pixel: nn.Module, update: Update):
    sent = share_protected(pixel, update_truth(n=3), PerExample(1e9), generator=tiny.draw(), alphas_cumprod=ALPHAS)
    assert torch.allclose(flat(sent.gradients), flat(update.gradients), atol=1e-6)
    assert sent.defence == "PerExample max_grad_norm=1000000000.0"


def test_dp_sgd_clips_each_example_by_itself(pixel: nn.Module):
    each = share_each(pixel, update_truth(n=3), alphas_cumprod=ALPHAS)
    norms = [float(flat(example.gradients).norm()) for example in each]
    bound = sorted(norms)[1]
    sent = dp_sgd(each, PerExample(bound), generator=tiny.draw())
    pairs = zip(each, norms, strict=True)
    expected = sum(flat(example.gradients) * min(1.0, bound / norm) for example, norm in pairs) / 3
    assert torch.allclose(flat(sent.gradients), expected, atol=1e-7)
    assert float(flat(dp_sgd(each, PerExample(1e-3), generator=tiny.draw()).gradients).norm()) <= 1e-3 * (1 + 1e-6)


def test_dp_sgd_adds_noise_to_the_sum_before_dividing(pixel: nn.Module):
    each = share_each(pixel, update_truth(n=3), alphas_cumprod=ALPHAS)
    quiet, noisy = (flat(dp_sgd(each, PerExample(0.5, sigma), generator=tiny.draw()).gradients) for sigma in (0.0, 2.0))
    assert (noisy - quiet).std() == pytest.approx(2.0 * 0.5 / 3, rel=0.02)


def test_per_example_clipping_is_for_gradients(pixel: nn.Module):
    with pytest.raises(InputError, match="per-example clipping is defined on the gradient of one step"):
        share_protected(
            pixel,
            update_truth(),
            PerExample(1.0),
            generator=tiny.draw(),
            alphas_cumprod=ALPHAS,
            kind="fedavg",
            local_steps=2,
            lr=0.1,
        )


def test_secure_aggregation_of_equal_batches_is_the_gradient_of_the_union(pixel: nn.Module):
    truth = update_truth(n=4)
    sent = share_protected(
        pixel,
        truth[:2],
        SecureAggregation(2),
        generator=tiny.draw(),
        others=[truth[2:]],
        alphas_cumprod=ALPHAS,
    )
    assert torch.allclose(flat(sent.gradients), flat(share(pixel, truth, alphas_cumprod=ALPHAS).gradients), atol=1e-6)
    assert sent.defence == "SecureAggregation n_clients=2"


def test_secure_aggregation_refuses_what_does_not_add_up(pixel: nn.Module, update: Update):
    with pytest.raises(InputError, match="3 clients: give the batches of 2 others"):
        share_protected(pixel, update_truth(), SecureAggregation(3), generator=tiny.draw(), alphas_cumprod=ALPHAS)
    other = share(pixel, update_truth(), alphas_cumprod=ALPHAS, objective="v_prediction")
    with pytest.raises(InputError, match="secure aggregation: the updates are not of one model"):
        aggregate([update, other])


def test_soteria_withholds_whole_channels_of_one_layer_only(pixel: nn.Module, update: Update):
    sent = share_protected(pixel, update_truth(n=3), Soteria(0.25), generator=tiny.draw(), alphas_cumprod=ALPHAS)
    changed = [n for n, v in sent.gradients.items() if not torch.allclose(v, update.gradients[n], atol=1e-7)]
    assert changed == ["conv_out.weight"]
    silent = sent.gradients["conv_out.weight"].abs().sum((0, 2, 3)) == 0
    assert int(silent.sum()) == round(0.25 * len(silent))


def test_soteria_withholds_the_channels_that_say_most_about_the_image():
    class TwoPaths(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_out = nn.Conv2d(2, 1, 1)

        def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
            strong, weak = noisy[:, :1] * 3.0, noisy[:, :1] * 1e-3 + 5.0  # the weak channel hardly moves with the image
            return self.conv_out(torch.cat([strong, weak], 1))

    truth = update_truth(n=1)
    truth = type(truth)(truth.clean[:, :1], truth.timesteps, truth.noise[:, :1])
    scores = soteria_scores(TwoPaths(), truth, "conv_out", generator=tiny.draw(), alphas_cumprod=ALPHAS)
    assert scores[1] > 100 * scores[0]  # |r| / |dr/dx|: undoing a change of it would move the image most


def test_soteria_names_a_layer_that_is_missing(pixel: nn.Module, update: Update):
    with pytest.raises(InputError, match="Soteria: the model has no layer 'fc'"):
        soteria_scores(pixel, update_truth(), "fc", generator=tiny.draw(), alphas_cumprod=ALPHAS)
    with pytest.raises(InputError, match=r"Soteria: the update has no gradient of fc\.weight"):
        withhold(update, Soteria(0.5, "fc"), torch.ones(3))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GaussianNoise(-1.0), "GaussianNoise: rel must be 0 or more and finite, got -1.0"),
        (lambda: GaussianNoise(1.0, per="row"), "GaussianNoise: per 'row' is unknown; choose one of tensor, update"),
        (lambda: Clip(0.0), "Clip: max_norm must be positive"),
        (lambda: TopK(0.0), r"TopK: fraction must be in \(0, 1\]"),
        (lambda: TopK(1.5), r"TopK: fraction must be in \(0, 1\]"),
        (lambda: Quantise(1), "bits must be from 2 to 16, got 1; for one bit use Sign"),
        (lambda: PerExample(1.0, -1.0), "PerExample: noise_multiplier must be 0 or more"),
        (lambda: Soteria(2.0), r"Soteria: fraction must be in \(0, 1\]"),
        (lambda: SecureAggregation(0), "SecureAggregation: n_clients must be 1 or more"),
    ],
)
def test_levels_that_mean_nothing_are_refused(make, says: str):
    with pytest.raises(InputError, match=says):
        make()


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("none", None),
        ("noise=0.1", GaussianNoise(0.1)),
        ("clip=2", Clip(2.0)),
        ("top_k=0.01", TopK(0.01)),
        ("bits=8", Quantise(8)),
        ("sign", Sign()),
        ("dp_sgd=0.5", PerExample(1.0, 0.5)),
        ("soteria=0.5", Soteria(0.5)),
        ("aggregation=4", SecureAggregation(4)),
    ],
)
def test_parameter_files_name_defences_and_updates_tell_attackers_what_they_leave(words: str, made):
    assert make_defence(words) == made
    name = words.partition("=")[0]
    assert effects("none" if made is None else str(made)) == set(DEFENCES[name].effects if made else ())
    assert effects("Clip") == {"rescaled"}
    assert effects("Home made=1, Clip max_norm=2") == {"unknown", "rescaled"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "nois=1",
            "defence 'nois=1' is unknown; choose 'none' or <name>=<level>: noise, clip, top_k, bits, sign, dp_sgd",
        ),
        ("noise=much", "defence 'noise=much': 'much' is no number; write noise=<level>"),
        ("noise=-1", "defence 'noise=-1': GaussianNoise: rel must be 0 or more and finite, got -1.0"),
        ("bits=inf", "defence 'bits=inf': 'inf' is no number"),
    ],
)
def test_words_that_name_no_defence_are_refused(words: str, says: str):
    with pytest.raises(InputError, match=says):
        make_defence(words)


def test_what_needs_the_batch_says_so(update: Update):
    with pytest.raises(InputError, match="PerExample needs more than the finished update; use share_protected"):
        protect(update, PerExample(1.0), generator=tiny.draw())
