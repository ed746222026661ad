import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from world import tiny

from splitlab.data.generate import rendered_digits
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics


@pytest.fixture(scope="module")
def shapes() -> ImageSet:
    return tiny.small_set(24, size=32, seed=7)


def noise_like(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.rand(images.shape, generator=tiny.draw(seed)) * 2 - 1


def test_the_metric_of_the_truth_is_perfect(shapes: ImageSet):
    assert (metrics.mse(shapes.images, shapes.images) == 0).all()
    assert metrics.psnr_db(shapes.images, shapes.images).tolist() == pytest.approx([100.0] * 24)
    assert metrics.ssim(shapes.images, shapes.images).tolist() == pytest.approx([1.0] * 24)
    masks = torch.stack([metrics.disc_mask(image) for image in shapes.images])
    assert (metrics.iou(masks, masks) == 1).all()


def test_psnr_of_a_known_error():
    # Golden: a shift of 0.2 is an MSE of 0.04; 10 log10(2^2 / 0.04) = 20 dB. A shift of 2, the whole range, is 0 dB.
    truth = torch.full((2, 3, 16, 16), -1.0)
    shifted = truth + torch.tensor([0.2, 2.0])[:, None, None, None]
    assert metrics.mse(shifted, truth).tolist() == pytest.approx([0.04, 4.0], rel=1e-5)
    assert metrics.psnr_db(shifted, truth).tolist() == pytest.approx([20.0, 0.0], abs=1e-4)


def test_every_image_has_its_own_number(shapes: ImageSet):
    mixed = torch.cat([shapes.images[:1], noise_like(shapes.images[1:])])
    for measure, perfect in ((metrics.psnr_db, 100.0), (metrics.ssim, 1.0)):
        values = measure(mixed, shapes.images)
        assert values.shape == (24,)
        assert values[0].item() == pytest.approx(perfect)
        assert (values[1:] < 0.5 * perfect).all()
    assert metrics.ssim(mixed[:1], shapes.images[:1]).shape == (1,)


def test_ssim_is_the_formula_of_the_paper(shapes: ImageSet):
    # Wang et al. 2004, eq. 13, with K1 = 0.01, K2 = 0.03 and a Gaussian window of sigma 1.5, on intensities in [0, 1];
    # the mean leaves out the border where the window does not fit.
    noisy = (shapes.images + 0.3 * torch.randn(shapes.images.shape, generator=tiny.draw())).clamp(-1, 1)
    x, y = (((part.double() + 1) / 2).numpy() for part in (noisy, shapes.images))

    def blur(part: np.ndarray) -> np.ndarray:
        return gaussian_filter(part, sigma=(0, 0, 1.5, 1.5), truncate=3.5)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    expected = values[..., 5:-5, 5:-5].mean((1, 2, 3))
    assert metrics.ssim(noisy, shapes.images).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_iou_of_known_overlaps():
    left, right, none = torch.zeros(3, 4, 4, dtype=torch.bool)
    left[:, :2], right[:, 1:3] = True, True
    values = metrics.iou(torch.stack([left, left, none, none]), torch.stack([left, right, left, none]))
    # columns 0-1 against 1-2: one shared of three; two empty masks agree
    assert values.tolist() == pytest.approx([1.0, 1 / 3, 0.0, 1.0])


def test_discs_are_found_where_their_hints_are(shapes: ImageSet):
    overlap = metrics.disc_iou(shapes.images, shapes.hints)
    assert overlap.min() > 0.8  # one pixel along the edge of the smallest disc is a tenth of it
    assert overlap.mean() > 0.9
    # the overlap that two unrelated discs have by chance
    assert metrics.disc_iou(shapes.images, shapes.hints.roll(1, 0)).mean() < 0.4


def test_an_outline_that_the_frame_cuts_off_is_completed():
    # a ring of radius 10 around the left edge's middle: only its right half is in the picture
    y, x = np.mgrid[:32, :32]
    distance = np.hypot(x, y - 16)
    ring = np.where(np.abs(distance - 10) < 0.5, 1.0, -1.0)
    mask = metrics.outline_mask(torch.from_numpy(ring).float().expand(3, -1, -1))
    wanted = torch.from_numpy(distance <= 10.5)
    assert metrics.iou(mask[None], wanted[None]).item() > 0.95


def test_a_picture_without_disc_or_outline_has_an_empty_mask():
    flat = torch.full((3, 32, 32), 0.3)
    assert not metrics.disc_mask(flat).any()
    assert not metrics.outline_mask(torch.full((3, 32, 32), -1.0)).any()


def test_edges_of_an_image_match_the_hint_drawn_from_it():
    digits = list(rendered_digits(8, np.random.default_rng(0), "x"))
    images = torch.from_numpy(np.stack([d.image for d in digits])).permute(0, 3, 1, 2).float() / 127.5 - 1
    hints = torch.from_numpy(np.stack([d.hint for d in digits]))[:, None].expand(-1, 3, -1, -1).float() / 127.5 - 1
    own = metrics.edge_f1(images, hints)
    assert own.min() > 0.95
    assert metrics.edge_f1(images, hints.roll(1, 0)).mean() < 0.6


def test_edges_agree_with_themselves_within_a_pixel_and_nothing_drawn_agrees_with_nothing():
    picture = torch.full((1, 3, 32, 32), -1.0)
    picture[:, :, 8:24, 8:24] = 1.0
    hint = metrics.edge_map(picture[0])[None]
    assert metrics.edge_f1(picture, hint).item() == 1.0
    assert metrics.edge_f1(picture.roll(1, 3), hint).item() == 1.0
    assert metrics.edge_f1(picture.roll(6, 3), hint).item() < 0.7
    assert metrics.edge_f1(torch.zeros_like(picture), hint).item() == 0.0
    half = hint.clone()
    half[..., :16] = -1.0  # half of what is drawn was asked for, all that was asked for is drawn
    assert 0.6 < metrics.edge_f1(picture, half).item() < 0.75


def test_whoever_follows_no_hint_agrees_with_it_in_every_turn_alike():
    noise = torch.rand(24, 3, 32, 32, generator=tiny.draw()) * 2 - 1
    pictures = torch.full((24, 3, 32, 32), -1.0)
    for i, picture in enumerate(pictures):
        picture[:, 2 + i // 6 * 6 : 8 + i // 6 * 6, 2 + i % 6 * 4 : 8 + i % 6 * 4] = 1.0
    hints = torch.stack([metrics.edge_map(picture) for picture in pictures])
    assert metrics.edge_f1(noise, hints).mean() > 0.1
    assert metrics.edge_control(noise, hints).abs().mean() < 0.05
    assert metrics.edge_control(pictures, hints).mean() > 0.5


def test_the_truth_identifies_itself_and_noise_is_at_chance():
    draw = tiny.draw()
    n, k = 1000, 10
    private = torch.rand(50, 3, 4, 4, generator=draw) * 2 - 1
    own = torch.randint(50, (n,), generator=draw)
    gallery_indices = metrics.draw_galleries(50, own, k, draw)
    assert metrics.identified(private[own], private, gallery_indices).all()
    assert not metrics.identified(private[own], private, gallery_indices.roll(1, 1)).any()
    guesses = torch.rand(n, 3, 4, 4, generator=draw) * 2 - 1
    hits = metrics.identified(guesses, private, gallery_indices).float().mean().item()
    # some private images are nearer to everything than others, which widens the binomial's 0.0095 a little
    assert hits == pytest.approx(1 / k, abs=4 * math.sqrt(0.1 * 0.9 / n))


def test_a_tie_is_a_miss():
    # a picture that occurs twice in a gallery identifies nobody
    image = torch.rand(1, 3, 4, 4, generator=tiny.draw())
    gallery = torch.stack([image[0], image[0], image[0] + 1])
    assert not metrics.identified(image, gallery, torch.tensor([[0, 1, 2]])).any()
    assert metrics.identified(image, gallery, torch.tensor([[0, 2]])).all()


@pytest.mark.parametrize("size", [2, 10, 50])
def test_galleries_hold_distinct_indices_with_the_own_one_first(size: int):
    own = torch.arange(50).repeat(4)
    rows = metrics.draw_galleries(50, own, size, tiny.draw())
    assert rows.shape == (200, size)
    assert torch.equal(rows[:, 0], own)
    assert all(len(set(row)) == size for row in rows.tolist())
    assert rows.min() >= 0
    assert rows.max() <= 49


def test_every_other_index_is_equally_likely_in_a_gallery():
    rows = metrics.draw_galleries(10, torch.full((9000,), 4), 2, tiny.draw())
    counts = torch.bincount(rows[:, 1], minlength=10)
    assert counts[4] == 0
    others = counts[[0, 1, 2, 3, 5, 6, 7, 8, 9]]
    assert (others - 1000).abs().max() < 150  # five standard deviations of a binomial with 9,000 draws at 1/9


def test_inputs_are_not_modified(shapes: ImageSet):
    images, hints = shapes.images.clone(), shapes.hints.clone()
    metrics.disc_iou(images, hints)
    metrics.edge_control(images, hints)
    metrics.psnr_db(images, hints)
    assert torch.equal(images, shapes.images)
    assert torch.equal(hints, shapes.hints)
