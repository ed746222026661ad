"""A lower bound on what one message of a split client really leaks."""

import torch
from torch import Tensor

from splitlab.core.seeds import Key
from splitlab.diffusion.base import Base, Encoded
from splitlab.diffusion.controlnet import symsigmoid_inverse
from splitlab.privacy.audit import mu_lower_bound
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
