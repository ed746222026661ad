"""A lower bound on what one message of a split client really leaks, for `audit.py` and the tests."""

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import ndtri
from scipy.stats import beta
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key
from splitlab.diffusion.base import Base, Encoded
from splitlab.diffusion.controlnet import symsigmoid_inverse
from splitlab.split.client import Client, client_send
from splitlab.split.config import Defences
from splitlab.split.defences.latent_norm import bounded
from splitlab.split.defences.matched import feature_scale, noise_variance, signal_level
from splitlab.split.wire import from_bytes


def audit_message(
    base: Base,
    defences: Defences,
    neighbours: Encoded,
    *,
    n: int = 4000,
    seed: int = 0,
    key: Key | None = None,
    confidence: float = 0.95,
) -> float:
    """Return a lower bound on the μ of one message of S1's client, from n messages of each of two neighbours.

    The auditor knows both inputs and everything but the client's draws. Label and scaling are taken off the sent
    latents, the activation and the latents off `smashed`. What is left is each input plus white Gaussian noise, and the
    score is the log-likelihood ratio of the two, the best test there is. The bound is to be held against `composed_mu`
    of `message_events`, or of `matched_message_event` alone where both neighbours have the same hint.

    Args:
        base: the public models.
        defences: the client's, with `feature_noise`; of the others only `matched`, `timestep_floor`, `per_image_noise`,
            `latent_norm`, `hint_noise`, `symsigmoid`, `half` and `hide_prompts` are undone here.
        neighbours: two encoded samples.
        n: messages of each.
        seed: of the client's draws.
        key: of the client's draws, to audit another kind of them; None: published keys of `seed`.
        confidence: of the bound.
    """
    images, hints = (bounded(defences, x).double() for x in (neighbours.latents, neighbours.hint_latents))
    towards, hint_towards = ((pair[1] - pair[0]).flatten() for pair in (images, hints))

    def scores(which: int) -> Tensor:
        data = Encoded(*(value[which : which + 1].expand(n, *value.shape[1:]) for value in vars(neighbours).values()))
        client_key = key.of_repeat(which) if key else Key.published(2 * seed + which)
        client = Client(0, base, data, torch.arange(n), defences, key=client_key)
        seen = from_bytes(client_send(client, 0, n)[0]).float()
        alphas = signal_level(defences, seen.need("timesteps"), base.alphas_cumprod)
        unlabelled = seen.need("noisy_latents") / feature_scale(defences, alphas) - (1 - alphas).sqrt() * seen.need(
            "noise"
        )
        weighted = unlabelled * alphas.sqrt() / noise_variance(defences, alphas)
        found = weighted.double().flatten(1) @ towards
        if defences.hint_noise:
            smashed = seen.need("smashed")
            hint = (symsigmoid_inverse(smashed) if defences.symsigmoid else smashed) - seen.need("noisy_latents")
            found = found + hint.double().flatten(1) @ hint_towards / defences.hint_noise**2
        return found

    return mu_lower_bound(scores(0), scores(1), confidence=confidence)


def mu_lower_bound(first: Float[Tensor, " n"], second: Float[Tensor, " m"], *, confidence: float = 0.95) -> float:
    """Return a lower bound on μ of a mechanism, from scores of many outputs on each of two neighbouring inputs.

    A threshold that is chosen on one half of the scores tells the inputs apart on the other half; μ-GDP demands
    μ ≥ Φ⁻¹(1 - FPR) - Φ⁻¹(FNR) (Dong et al. 2022, Def. 2.6), and both error rates are taken at the upper ends of their
    Clopper-Pearson intervals (as Nasr et al. 2023 audit). No shape of the scores is assumed.

    Args:
        first: scores under one input, lower.
        second: scores under the other, higher.
        confidence: probability that the bound is none too high.

    Raises:
        InputError: fewer than four scores of either.
    """
    if min(len(first), len(second)) < 4:
        raise InputError(f"{len(first)} and {len(second)} scores cannot bound μ: record more messages")
    error = (1 - confidence) / 2
    threshold = _best_threshold(first[::2], second[::2], error)
    false_positives, false_negatives = (first[1::2] > threshold).sum(), (second[1::2] <= threshold).sum()
    fpr = _upper(false_positives.numpy(), len(first[1::2]), error)
    fnr = _upper(false_negatives.numpy(), len(second[1::2]), error)
    return max(float(-ndtri(fpr) - ndtri(fnr)), 0.0)


def _best_threshold(first: Float[Tensor, " n"], second: Float[Tensor, " m"], error: float) -> float:
    """Return the threshold whose bound is highest on these scores: neither too few errors to count, nor too many."""
    candidates = torch.cat([first, second]).sort().values
    above = len(first) - torch.searchsorted(first.sort().values, candidates, right=True)
    below = torch.searchsorted(second.sort().values, candidates, right=True)
    gap = -ndtri(_upper(above.numpy(), len(first), error)) - ndtri(_upper(below.numpy(), len(second), error))
    return float(candidates[int(gap.argmax())])


def _upper(errors: np.ndarray, n: int, error: float) -> np.ndarray:
    """Return the upper ends of the one-sided Clopper-Pearson intervals of rates."""
    return np.where(errors >= n, 1.0, beta.ppf(1 - error, errors + 1, np.maximum(n - errors, 1)))
