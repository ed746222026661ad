"""What a privately fine-tuned model is worth: accuracy on real data of a classifier trained on its samples, and FID.

Both follow the evaluation of DP-LDM (Liu, Lyu et al. 2024, sec. 5) at the size of this world: a small convolutional
network in place of a ResNet, and the features of one trained on public data in place of Inception's, named so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.core.errors import InputError
from splitlab.core.schedule import cosine
from splitlab.core.seeds import generator
from splitlab.dp.public import warped

WARP = 0.1
"""Of the images that a classifier is trained on (`splitlab.dp.public.warped`)."""

WIDTH = 64
"""Features of the classifier's last hidden layer, and so of the Fréchet distance."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier of images.

    Attributes:
        body: images -> features `[b, WIDTH]`.
        head: features -> logits.
    """

    body: nn.Module
    head: nn.Module

    @torch.no_grad()
    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return the last hidden layer of images in [-1, 1]."""
        return torch.cat([self.body(part) for part in images.split(500)])

    def accuracy(self, images: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"]) -> float:
        """Return the share of images whose label is the most likely one."""
        with torch.no_grad():
            return float((self.head(self.features(images)).argmax(1) == labels).double().mean())


def joint_accuracy(
    classifiers: Sequence[Classifier], images: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"]
) -> float:
    """Return the share of images whose label is the likeliest by the mean of the classifiers' probabilities."""
    with torch.no_grad():
        votes = torch.stack([each.head(each.features(images)).softmax(1) for each in classifiers]).mean(0)
    return float((votes.argmax(1) == labels).double().mean())


def train_classifier(
    images: Float[Tensor, "n 3 h w"],
    labels: Int[Tensor, " n"],
    *,
    n_classes: int,
    seed: int,
    steps: int = 500,
    batch: int = 128,
    lr: float = 1e-3,
) -> Classifier:
    """Train a classifier on images in [-1, 1], seen under small warps, rotations, scalings, shifts and noise.

    Its settings are the same for every model that is judged, and were chosen without the private test split.

    Raises:
        InputError: there are no images, or a label lies outside the classes.
    """
    if not len(images) or int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise InputError(f"{len(images)} images with labels outside 0 to {n_classes - 1}: give images of the classes")
    body, head = _network(images.shape[-1], n_classes, seed)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=lr, weight_decay=0.01)
    draw = generator("classifier", seed)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=draw)
        logits = head(body(_varied(images[chosen], draw)))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        for group in optimizer.param_groups:
            group["lr"] = cosine(lr, step, steps, warm_up=50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return Classifier(body.eval(), head.eval())


def _network(size: int, n_classes: int, seed: int) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (3, 32, 64, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        flat = 64 * math.ceil(size / 8) ** 2
        body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, WIDTH), nn.ReLU())
        return body, nn.Linear(WIDTH, n_classes)


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    n, images = len(images), warped(images, std=WARP, generator=generator)
    scale, angle = (1 + 0.15 * _uniform(n, generator)), 0.2 * _uniform(n, generator)
    turn = torch.stack([scale * angle.cos(), -angle.sin(), angle.sin(), scale * angle.cos()], 1).view(n, 2, 2)
    shift = 0.12 * torch.stack([_uniform(n, generator), _uniform(n, generator)], 1)[..., None]
    grid = F.affine_grid(torch.cat([turn, shift], 2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + 0.05 * torch.randn(images.shape, generator=generator)


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * 2 - 1


def frechet_distance(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> float:
    """Return |μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½) of two sets of features (Heusel et al. 2017, eq. 6).

    Raises:
        InputError: fewer samples than features, so that a covariance is not determined.
    """
    if min(len(first), len(second)) <= first.shape[1]:
        raise InputError(f"{len(first)} and {len(second)} samples for {first.shape[1]} features: give more samples")
    one, other = (features.double().numpy() for features in (first, second))
    covariances = [np.cov(part, rowvar=False) for part in (one, other)]
    roots = np.linalg.eigvals(covariances[0] @ covariances[1])  # of a product of two positive matrices: real, >= 0
    cross = np.sqrt(np.clip(roots.real, 0.0, None)).sum()
    gap = one.mean(0) - other.mean(0)
    return float(gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross)
