"""Per-image measures. Images come in [-1, 1]; every function returns one number per image."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from skimage.color import rgb2gray
from skimage.feature import canny
from skimage.filters import threshold_otsu
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn.functional import max_pool2d

DATA_RANGE = 2.0


def mse(images: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean squared error of images in [-1, 1]."""
    return (images - truth).square().mean((1, 2, 3))


def psnr_db(images: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio, dB, peak-to-peak range 2; equal images give 100."""
    return 10 * torch.log10(DATA_RANGE**2 / mse(images, truth).clamp_min(DATA_RANGE**2 * 1e-10))


def ssim(images: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Structural similarity (Wang et al. 2004), 11x11 Gaussian window, as scikit-image computes it.

    It is defined for intensities, which are not negative, hence [0, 1]; variances of flat pictures cancel, hence
    float64.
    """
    first, second = (((part.double() + 1.0) / 2.0).numpy() for part in (images, truth))
    options = {"channel_axis": 0, "data_range": 1.0, "gaussian_weights": True, "use_sample_covariance": False}
    values = [structural_similarity(a, b, **options) for a, b in zip(first, second, strict=True)]
    return torch.tensor(values, dtype=torch.float32)


def disc_mask(image: Float[Tensor, "3 h w"]) -> Bool[Tensor, "h w"]:
    """Locate the disc of a shapes image: pixels that differ from the border's median colour, by Otsu's threshold."""
    pixels = image.permute(1, 2, 0).numpy()
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=2)
    if np.ptp(distance) < 1e-3:
        return torch.zeros(distance.shape, dtype=torch.bool)
    return torch.from_numpy(distance > threshold_otsu(distance))


def outline_mask(hint: Float[Tensor, "3 h w"]) -> Bool[Tensor, "h w"]:
    """Return the disc that a shapes hint outlines, also where the image cuts it off.

    A circle is fitted to the bright pixels by weighted algebraic least squares (Kåsa 1976).
    """
    brightness = hint.mean(0).numpy().astype(np.float64)
    rows, columns = np.nonzero(brightness > 0.0)
    height, width = brightness.shape
    if len(rows) < 3:
        return torch.zeros(height, width, dtype=torch.bool)
    weight = brightness[rows, columns] + 1.0
    design = np.stack([columns, rows, np.ones(len(rows))], axis=1) * weight[:, None]
    solution, *_ = np.linalg.lstsq(design, (columns**2 + rows**2) * weight, rcond=None)
    centre_x, centre_y = solution[0] / 2, solution[1] / 2
    radius = np.sqrt(max(solution[2] + centre_x**2 + centre_y**2, 0.0)) + 0.5  # the line is drawn inwards
    y, x = np.mgrid[:height, :width]
    return torch.from_numpy((x - centre_x) ** 2 + (y - centre_y) ** 2 <= radius**2)


def iou(masks: Bool[Tensor, "n h w"], truth: Bool[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Intersection over union; two empty masks agree perfectly."""
    union = (masks | truth).sum((1, 2)).float()
    return torch.where(union > 0, (masks & truth).sum((1, 2)) / union.clamp_min(1), 1.0)


def disc_iou(images: Float[Tensor, "n 3 h w"], hints: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Control localisation for shapes: overlap of each image's disc with the disc its hint outlines."""
    found = torch.stack([disc_mask(image) for image in images])
    wanted = torch.stack([outline_mask(hint) for hint in hints])
    return iou(found, wanted)


def edge_map(image: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
    """Return an image's Canny edges as the photo hints have them: white on black in [-1, 1]."""
    edges = canny(rgb2gray((image.permute(1, 2, 0).numpy() + 1.0) / 2.0), sigma=1.0)
    return torch.from_numpy(np.where(edges, 1.0, -1.0)).float().expand(3, -1, -1)


def edge_f1(images: Float[Tensor, "n 3 h w"], hints: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """F1 of each image's Canny edges against a hint, one pixel of tolerance.

    Precision: share of the image's edge pixels with one of the hint in the 3x3 pixels around; recall the other way
    round (boundary detection's F-measure: Martin et al. 2004). White noise reaches 0.44 on small photographs, where
    edges are everywhere: whether a hint was followed is for `edge_control` to say.
    """
    found = torch.stack([edge_map(image)[:1] for image in images]).gt(0).float()
    wanted = hints.mean(1, keepdim=True).gt(0).float()
    near_found, near_wanted = (max_pool2d(edges, 3, stride=1, padding=1) for edges in (found, wanted))
    precision, recall = (
        (edges * near).sum((1, 2, 3)) / edges.sum((1, 2, 3)).clamp_min(1.0)
        for edges, near in ((found, near_wanted), (wanted, near_found))
    )
    return 2 * precision * recall / (precision + recall).clamp_min(1e-12)


def edge_control(images: Float[Tensor, "n 3 s s"], hints: Float[Tensor, "n 3 s s"]) -> Float[Tensor, " n"]:
    """Control localisation for photographs: `edge_f1` with the hint less its mean with the hint turned and mirrored.

    The seven other symmetries of the square have as many edges elsewhere. 0: edges are not where the hint wants them,
    however many there are.
    """
    quarters = [hints.rot90(k, (2, 3)) for k in range(4)]
    elsewhere = torch.stack([edge_f1(images, other) for other in (*quarters[1:], *(q.flip(3) for q in quarters))])
    return edge_f1(images, hints) - elsewhere.mean(0)


def identified(
    images: Float[Tensor, "n c h w"], gallery: Float[Tensor, "m c h w"], gallery_indices: Int[Tensor, "n k"]
) -> Bool[Tensor, " n"]:
    """Say whether, of the gallery images in its gallery, the first is the one nearest to each image.

    Nearest in mean squared error; a tie is a miss.
    """
    flat = images.flatten(1).double(), gallery.flatten(1).double()
    distances = torch.cdist(*flat).gather(1, gallery_indices)
    return distances[:, 0] < distances[:, 1:].min(1).values


def draw_galleries(
    n_private: int, indices: Int[Tensor, " n"], size: int, generator: torch.Generator
) -> Int[Tensor, "n k"]:
    """Draw, for each private index, a gallery of `size` distinct indices, the own one first."""
    rows = []
    for index in indices.tolist():
        others = torch.randperm(n_private - 1, generator=generator)[: size - 1]
        rows.append(torch.cat([torch.tensor([index]), others + (others >= index)]))
    return torch.stack(rows)
