"""Membership inference: was this image among those a model was fine-tuned on?

The attack takes per-sample losses at fixed draws of (timestep, noise), against those of the model that fine-tuning
started from (difficulty calibration, Watson et al. 2022): whoever knows the public base has it for free.
"""

import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import generator
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.dp.sample import Tuned, hidden_states, untuned


@torch.no_grad()
def log_losses(
    base: Base, tuned: Tuned, data: ImageSet, *, draws: int = 16, seed: int = 0, batch: int = 500
) -> Float[Tensor, " n"]:
    """Return each sample's log squared error of the predicted noise, averaged over fixed draws, float64.

    Draw k takes the middle of the k-th of `draws` equal parts of the timesteps, and one noise for all samples and all
    models. The logarithm gives every timestep the same say and makes losses nearly Gaussian, as LiRA assumes.

    Args:
        base: the public models.
        tuned: the model; `splitlab.dp.sample.untuned` for the base.
        data: samples to score; for a class-conditional model their prompts are the classes'.
        draws: of (timestep, noise) per sample.
        seed: of the noise.
        batch: samples at once.
    """
    latents = base.encode(data.images)
    asked = len(data) if tuned.conditioning == "none" else list(data.prompts)
    states = hidden_states(base, tuned, asked)
    total = torch.zeros(len(data), dtype=torch.float64)
    for k in range(draws):
        timestep = torch.tensor([int((k + 0.5) / draws * base.n_timesteps)])
        noise = torch.randn((1, *latents.shape[1:]), generator=generator("membership", seed, k))
        for start in range(0, len(data), batch):
            part = latents[start : start + batch]
            noisy = base.noised(part, noise.expand_as(part), timestep.expand(len(part)))
            predicted = tuned.unet(noisy, timestep, encoder_hidden_states=states[start : start + batch]).sample
            error = (predicted - noise).double().square().flatten(1).mean(1)
            total[start : start + batch] += error.clamp_min(1e-30).log() / draws
    return total


def membership_auc(
    base: Base,
    tuned: Tuned,
    members: ImageSet,
    others: ImageSet,
    *,
    start: Tuned | None = None,
    draws: int = 16,
    seed: int = 0,
) -> float:
    """Return the AUC of the calibrated loss: the strongest attack here that needs no shadow models.

    Args:
        base: the public base, which the attacker knows.
        tuned: the model that was fine-tuned on `members`.
        members: what it was fine-tuned on, or some of it.
        others: samples of the same kind that it never saw.
        start: what the fine-tuning started from, which is public too; None: the base.
        draws, seed: see `log_losses`.
    """
    scores = [calibrated(base, tuned, data, start=start, draws=draws, seed=seed) for data in (members, others)]
    return auc(*scores)


def calibrated(
    base: Base, tuned: Tuned, data: ImageSet, *, start: Tuned | None = None, draws: int = 16, seed: int = 0
) -> Float[Tensor, " n"]:
    """Return how much more likely each sample became by fine-tuning: log loss at the start minus log loss after it."""
    start = start or untuned(base, tuned.conditioning, classes=tuned.classes)
    before, after = (log_losses(base, model, data, draws=draws, seed=seed) for model in (start, tuned))
    return before - after


def auc(members: Float[Tensor, " n"], others: Float[Tensor, " m"]) -> float:
    """Return the probability that a member's score is above another's, ties counted half (Mann & Whitney 1947).

    Raises:
        InputError: there are no scores, or one is not a number.
    """
    scores = torch.cat([members, others]).double()
    if not len(members) or not len(others) or torch.isnan(scores).any():
        raise InputError("an AUC needs scores of members and of others, all of them numbers")
    n, m = len(members), len(others)
    return (float(rankdata(scores.numpy())[:n].sum()) - n * (n + 1) / 2) / (n * m)
