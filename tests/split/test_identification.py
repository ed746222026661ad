import math

import pytest
import torch
from matched_parts import VARIANTS, identified_by_likelihood, recolour, recoloured
from scipy.stats import norm
from world import tiny

from splitlab.core.seeds import Key
from splitlab.split.attacks.calibration import public_posterior
from splitlab.split.identification import identified_by_both


def gallery(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=tiny.draw(seed))


def everybody(n: int) -> torch.Tensor:
    return torch.stack([torch.cat([torch.tensor([i]), torch.arange(n)[torch.arange(n) != i]]) for i in range(n)])


def test_the_one_that_was_found_exactly_decides():
    images, hints, gallery_indices = gallery(20, 0), gallery(20, 1), everybody(20)
    wrong = images.roll(1, 0)
    near = hints + 0.1 * gallery(20, 2)
    assert identified_by_both(images, hints, images, hints, gallery_indices).all()
    assert identified_by_both(wrong, near, images, hints, gallery_indices).all()
    assert identified_by_both(near, wrong, hints, images, gallery_indices).all()
    assert not identified_by_both(wrong, hints.roll(1, 0), images, hints, gallery_indices).any()
    alike = torch.zeros(20, 3, 8, 8)
    assert not identified_by_both(alike, alike, alike, alike, gallery_indices).any()  # a tie is a miss


def test_two_weak_clues_are_stronger_together():
    images, hints, gallery_indices = gallery(200, 0), gallery(200, 1), everybody(200)
    found = images + 6 * gallery(200, 2), hints + 6 * gallery(200, 3)
    both = identified_by_both(*found, images, hints, gallery_indices).float().mean()
    alone = [
        identified_by_both(f, f, g, g, gallery_indices).float().mean()
        for f, g in zip(found, (images, hints), strict=True)
    ]
    assert both > max(alone) + 0.1
    assert min(alone) > 0.02


def test_the_ideal_attacker_is_right_as_often_as_theory_says():
    # two candidates at distance d in noise of std s: the likelier one is right with probability Φ(d / 2 s)
    private = torch.stack([torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)])
    own = torch.arange(20_000) % 2
    view = private[own, 0] + 2.0 * torch.randn(20_000, 1, 1, 1, generator=tiny.draw())
    gallery_indices = torch.stack([own, 1 - own], 1)
    right = (
        identified_by_likelihood([(view, torch.full((20_000,), 2.0), private)], gallery_indices).float().mean().item()
    )
    assert right == pytest.approx(norm.cdf(3.0 / 4.0), abs=0.012)  # four standard errors
    twice = (
        identified_by_likelihood([(view, torch.full((20_000,), 2.0), private)] * 2, gallery_indices)
        .float()
        .mean()
        .item()
    )
    assert twice == right  # the same view again says nothing new


def test_the_ideal_attacker_does_not_know_which_variant_was_sent():
    # candidates -1 and +1 whose signs are flipped in secret leave the same views: a coin decides
    private = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).view(2, 2, 1, 1, 1)
    view = torch.randn(5000, 1, 1, 1, generator=tiny.draw())
    gallery_indices = torch.tensor([[0, 1]]).expand(5000, 2)
    assert not identified_by_likelihood([(view, torch.ones(5000), private)], gallery_indices).any()
    hint = torch.tensor([0.0, 50.0]).view(2, 1, 1, 1, 1)
    seen = torch.zeros(5000, 1, 1, 1)
    views = [(view, torch.ones(5000), private), (seen, torch.ones(5000), hint)]
    assert identified_by_likelihood(views, gallery_indices).all()  # another view tells them apart


def test_the_public_posterior_is_bayes_rule_and_knows_no_sample_that_is_ruled_out():
    public = torch.tensor([0.0, 1.0, 5.0]).view(3, 1)
    views, std = torch.tensor([[0.2]]), torch.tensor([0.7])
    weights = public_posterior([(views, std, public)])[0]
    density = [math.exp(-((0.2 - x) ** 2) / (2 * 0.49)) for x in (0.0, 1.0, 5.0)]
    torch.testing.assert_close(weights, torch.tensor(density) / sum(density))
    without = public_posterior([(views, std, public)], ruled_out=torch.tensor([0]))[0]
    assert without[0] == 0
    assert without.sum() == pytest.approx(1.0)
    assert public_posterior([(views, std, public)], sharpness=100.0)[0, 0] > 0.999


def test_colours_have_48_symmetries_and_secret_ones_stay_with_their_image():
    data = tiny.small_set(12)
    images = torch.linspace(-0.9, 0.7, 3).view(1, 3, 1, 1)
    seen = {tuple(recolour(images, i).flatten().tolist()) for i in range(len(VARIANTS))}
    assert len(seen) == 48
    hidden, again, other = (recoloured(data, key=Key.published(seed)) for seed in ("a", "a", "b"))
    assert torch.equal(hidden.images, again.images)
    assert not torch.equal(hidden.images, other.images)
    assert len({data.digest, hidden.digest, other.digest}) == 3
    assert torch.equal(hidden.hints, data.hints)
    assert set(hidden.prompts) == {""}
    for own, mine in zip(data.images, hidden.images, strict=True):
        assert any(torch.equal(recolour(own[None], i)[0], mine) for i in range(48))
