"""The same image, sent again in every epoch: noise that is drawn anew averages out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from splitlab.core.progress import Callback
from splitlab.split.attacks.calibration import Calibration, CalibrationSet, principal
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import FLOOR, averaged, labelled, latent_view, summed, used_fields
from splitlab.split.attacks.posterior import denoise
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.messages import Knowledge, Observation, Reconstruction, senders


@torch.no_grad()
def accumulation(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    batch: Annotated[int, Option("samples per U-Net call", least=1)] = 128,
) -> Reconstruction:
    """Find out which messages show one image, average their views, and denoise the average.

    Views of one image, latents + s_i n_i, are averaged with weights 1 / s_i² (the least variance among unbiased
    estimates); what remains is a view of standard deviation (Σ 1 / s_i²)^-1/2, which the public U-Net denoises at the
    matching timestep as in `posterior`. Which samples belong together is not told but found (`link`), by the recovered
    hints where there are any and by the views themselves, among the samples of one client.

    Needs `timesteps` and `noisy_latents`. Samples that were linked share one reconstruction. The objective is how many
    images had been found after each sample that was linked.
    """
    # Step 1: reduce the messages to views, and play the client on public data.
    seen, base = labelled(observations, knowledge), knowledge.base
    view, std = latent_view(seen, knowledge)
    calibration_set = CalibrationSet(seen, observations, knowledge, generator)
    raw_hints = calibration_set.clamp(hint_latents(seen, observations, knowledge))

    # Step 2: link the samples that show one image.
    features = Features.of(view, std, raw_hints, calibration_set)
    labels, n_images = link(features, senders(observations), threshold(calibration_set), callback=callback)

    # Step 3: average each image's views, and denoise the average.
    counts = summed(torch.ones(len(labels)), labels)
    once = knowledge.defences.per_image_noise
    merged, merged_std = averaged(view, std.clamp_min(FLOOR), labels, once=once)
    merged_std = torch.where(merged_std > FLOOR, merged_std, 0.0)  # exact ones stay exact
    text = seen.encoder_hidden_states
    text = None if text is None else summed(text, labels) / counts[:, None, None]
    latents = denoise(merged, merged_std, knowledge, text=text, batch=batch)
    latents = _calibrated(latents, merged_std, calibration_set, knowledge, text is not None, generator)

    hints, used = None, used_fields(seen)
    if raw_hints is not None:
        mean_hints = summed(raw_hints, labels) / counts[:, None, None, None]
        merged_hints = calibration_set.hints(mean_hints, None if once else counts)
        hints, used = base.decode(torch.as_tensor(merged_hints))[labels], (*used, "smashed")
    return Reconstruction(base.decode(latents)[labels], hints, used=used, objective=tuple(n_images), n_evals=1)


def _calibrated(
    latents: Tensor,
    std: Tensor,
    calibration_set: CalibrationSet,
    knowledge: Knowledge,
    prompted: bool,
    generator: torch.Generator,
) -> Tensor:
    """Shrink as `posterior` does, by what denoising achieves on public latents at the averages' noise levels."""
    truth = calibration_set.latents
    levels = std[torch.randint(len(std), (len(truth),), generator=generator)]
    views = truth + levels * torch.randn(truth.shape, generator=generator)
    text = calibration_set.text if prompted else None
    return Calibration(levels, denoise(views, levels, knowledge, text=text), truth)(std, latents)


@dataclass(frozen=True)
class Features:
    """What samples are compared by: coordinates along the public data's principal directions, and their noise.

    Attributes:
        values: list of `[n, r]` coordinates, one tensor for the views and one for the hints where there are any;
            those of hints in units of the noise that simulated ones have there, which need not be white.
        variances: list of `[n]` noise variances per coordinate.
        spreads: list of `[r]` variances of the public data.
        caps: how much a likeness may count for at most, in nats. Outlines of different images can be alike, as
            Gaussians would not be: for hints it is the logarithm of the number of public ones, where it would show.
    """

    values: list[Tensor]
    variances: list[Tensor]
    spreads: list[Tensor]
    caps: tuple[float, ...] = (math.inf, math.inf)

    @classmethod
    def of(cls, view: Tensor, std: Tensor, hints: Tensor | None, calibration_set: CalibrationSet) -> "Features":
        """Project views, and hints where they were recovered."""
        mean, directions, spread = principal(calibration_set.data.latents)
        values, spreads = [(view.flatten(1) - mean) @ directions], [spread]
        variances = [std.flatten().clamp_min(FLOOR).square()]
        if hints is not None:
            mean, directions, spread = principal(calibration_set.public_hints)
            errors = torch.as_tensor(calibration_set.raw_hints) - calibration_set.public_hints[calibration_set.chosen]
            noise = (errors.flatten(1) @ directions).square().mean(0).clamp_min(FLOOR**2)
            values.append((hints.flatten(1) - mean) @ directions / noise.sqrt())
            variances.append(torch.ones(len(hints)))
            spreads.append(spread / noise)
        return cls(values, variances, spreads, (math.inf, math.log(len(calibration_set.data))))

    def __len__(self) -> int:
        return len(self.variances[0])

    def __getitem__(self, chosen: Tensor) -> "Features":
        return Features([v[chosen] for v in self.values], [v[chosen] for v in self.variances], self.spreads, self.caps)


def same_image(first: Features, second: Features) -> Float[Tensor, "n m"]:
    """Return log-likelihood ratios that samples show one image rather than two, for all pairs.

    With latents ~ N(0, λ) per principal coordinate (public data) and views x = latents + N(0, v), x of one sample
    given x' of the other is N(k x', (1 - k) λ + v) with k = λ / (λ + v'), against N(0, λ + v) for another image.
    """
    total = torch.zeros(len(first), len(second))
    columns = (first.values, first.variances, second.values, second.variances, first.spreads)
    for x, v, other, w, spread, cap in zip(*columns, first.caps, strict=False):
        gain = spread / (spread + w[:, None])
        given = ((1 - gain) * spread)[None] + v[:, None, None]
        alone = spread + v[:, None]
        off = (x[:, None] - (gain * other)[None]).square()
        ratio = 0.5 * ((x.square() / alone + alone.log())[:, None] - off / given - given.log()).sum(2)
        total += ratio.clamp_max(cap)
    return total


def threshold(calibration_set: CalibrationSet) -> float:
    """Choose the log-likelihood ratio above which to link, on public samples sent twice.

    Chosen so that missed links of one image and links of two different ones are, as shares, least in sum; where a
    whole interval does, its value nearest 0, the threshold of equal odds.
    """
    n = len(calibration_set.chosen) // 2
    both, _ = calibration_set.send(calibration_set.chosen[:n].repeat(2))
    hints = calibration_set.clamp(hint_latents(both, [both], calibration_set.known))
    view, std = latent_view(both, calibration_set.known)
    features = Features.of(view, std, hints, calibration_set)
    ratios = same_image(features[torch.arange(n)], features[torch.arange(n, 2 * n)])
    equal = ratios.diagonal().sort().values
    different = ratios[~torch.eye(n, dtype=torch.bool)].sort().values
    missed = torch.searchsorted(equal, equal) / len(equal)
    false = 1 - torch.searchsorted(different, equal) / len(different)
    high = float(equal[(missed + false).argmin()])
    low = float(different[different < high].max()) if bool((different < high).any()) else high
    return min(max(0.0, low), high - 1e-3)


def link(
    features: Features,
    owners: Int[Tensor, " n"],
    limit: float,
    *,
    callback: Callback | None = None,
) -> tuple[Int[Tensor, " n"], list[float]]:
    """Group samples that show one image, from the clearest view to the noisiest.

    Each sample joins the group to which the ratio of `same_image` is highest, if that exceeds `limit`, and founds a
    group of its own otherwise. A group is represented by its members' average, with weights 1 / variance.

    Args:
        features: of the samples.
        owners: which client sent each; images of different clients are never linked.
        limit: of the ratio (`threshold`).
        callback: told of every sample.

    Returns the group `[n]`, 0, 1, …, of each sample, and how many groups there were after each step.
    """
    labels = torch.full((len(features),), -1)
    groups: list[Features] = []
    group_owners: list[int] = []
    counts: list[float] = []
    order = features.variances[0].argsort(stable=True)
    for done, index in enumerate(tqdm(order.tolist(), desc="linking", mininterval=2, leave=False)):
        sample, owner = features[torch.tensor([index])], int(owners[index])
        rivals = [number for number, other in enumerate(group_owners) if other == owner]
        ratios = same_image(sample, _together([groups[number] for number in rivals]))[0] if rivals else None
        if ratios is not None and float(ratios.max()) > limit:
            group = rivals[int(ratios.argmax())]
            groups[group] = _merge(groups[group], sample)
        else:
            group = len(groups)
            groups.append(sample)
            group_owners.append(owner)
        labels[index] = group
        counts.append(float(len(groups)))
        if callback:
            callback("accumulation", done + 1, len(order), counts[-1])
    return labels, counts


def _together(groups: Sequence[Features]) -> Features:
    values = [torch.cat(parts) for parts in zip(*(group.values for group in groups), strict=True)]
    variances = [torch.cat(parts) for parts in zip(*(group.variances for group in groups), strict=True)]
    return Features(values, variances, groups[0].spreads, groups[0].caps)


def _merge(group: Features, sample: Features) -> Features:
    values, variances = [], []
    for x, v, y, w in zip(group.values, group.variances, sample.values, sample.variances, strict=True):
        joint = 1 / (1 / v + 1 / w)
        values.append((x / v[:, None] + y / w[:, None]) * joint[:, None])
        variances.append(joint)
    return Features(values, variances, group.spreads, group.caps)


ACCUMULATION = Family(
    "Accumulation over epochs",
    "The same image is sent in every epoch. Messages of one image are found by their similarity, averaged with "
    "the weights that their noise levels ask for, and denoised.",
)

ATTACKS = (
    Attack(
        accumulation,
        "accumulation over epochs",
        rank=70,
        family=ACCUMULATION,
        reason="repeated messages of one image average the noise out",
    ),
)
