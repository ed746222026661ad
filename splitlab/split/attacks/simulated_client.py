"""The attacker plays the client on public data, to learn from what it sees there."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from splitlab.core.seeds import Key
from splitlab.diffusion.base import Encoded
from splitlab.diffusion.controlnet import coarsened
from splitlab.split.attacks.closed_form import estimate_fixed_noise, noised_hints
from splitlab.split.client import make_message
from splitlab.split.defences.keys import draw_noise
from splitlab.split.defences.per_image_noise import noised_per_image
from splitlab.split.defences.timestep_floor import draw_timesteps
from splitlab.split.messages import Knowledge, Observation


def imitable(knowledge: Knowledge) -> bool:
    """Say whether the attacker can compute `smashed` itself: not where the client's part is trained in secret."""
    return knowledge.scheme in ("split", "u_shaped")


def imitate(
    data: Encoded, knowledge: Knowledge, batch: int, generator: torch.Generator, *, chosen: Tensor | None = None
) -> tuple[Observation, Tensor]:
    """Send one message of public data through the defences, with fresh draws of every secret, fixed noise included.

    Args:
        data: the public data, encoded.
        knowledge: the threat model; its defences are imitated.
        batch: samples of the message.
        generator: of samples, timesteps, noise and secrets.
        chosen: `[batch]` positions in `data`; drawn where it is None.

    Returns the message (`noise` included, also where the client keeps it) and `chosen`.
    """
    defences, alphas_cumprod = knowledge.defences, knowledge.base.alphas_cumprod
    if chosen is None:
        chosen = torch.randint(len(data), (batch,), generator=generator)
    timesteps = draw_timesteps(defences, batch, alphas_cumprod, generator)
    bounded = noised_per_image(defences, data.latents[chosen], data.hint_latents[chosen], [generator] * len(chosen))
    noise = draw_noise(defences, tuple(bounded[0].shape), generator)
    # Keys that the attacker does not know are drawn anew for every message, and so is the fixed noise below.
    keyed = replace(defences, fixed_noise=0.0, fresh_keys=bool(defences.key_mixing or defences.patch_shuffle))
    sample = Encoded(*bounded, data.text[chosen])
    message = make_message(
        sample, timesteps, noise, keyed, alphas_cumprod, client_key=Key.published(0), draw=generator
    ).float()
    if defences.fixed_noise:
        secret = torch.randn(noise.shape, generator=generator) * defences.fixed_noise
        message = replace(message, smashed=message.need("smashed") + secret)
    return message, chosen


def imitate_known(
    data: Encoded, knowledge: Knowledge, sizes: Sequence[int], chosen: Tensor, generator: torch.Generator
) -> tuple[Observation, Knowledge]:
    """Imitate an attacker who has already estimated and taken off the clients' fixed noise.

    A client is played that sends as many messages as the real one, its fixed noise is estimated as the closed form
    does, and what that estimate misses stays in the imitation.

    Args:
        data: the public data, encoded.
        knowledge: the threat model.
        sizes: how many samples each real client sent.
        chosen: `[m]` positions in `data`.
        generator: of timesteps, noise and secrets.

    Returns the message of `m` samples, and the knowledge that fits it: the same without the fixed noise.
    """
    defences = knowledge.defences
    known = replace(knowledge, defences=replace(defences, fixed_noise=0.0))
    group = defences.key_mixing or 1
    spare = (-len(chosen)) % group
    whole = torch.cat([chosen, chosen[:1].expand(spare)])
    message, _ = imitate(data, known, len(whole), generator, chosen=whole)
    message = message.map(lambda value: value[: len(chosen)])
    if not defences.fixed_noise or message.smashed is None:
        return message, known
    missed = fixed_noise_error(data, knowledge, min(sizes), generator)
    placed = missed.flatten()[torch.randint(missed.numel(), (message.smashed.numel(),), generator=generator)]
    return replace(message, smashed=message.smashed + placed.view_as(message.smashed)), known


def fixed_noise_error(data: Encoded, knowledge: Knowledge, n: int, generator: torch.Generator) -> Tensor:
    """Measure on an imitated client of n samples what the estimate of its fixed noise misses; `[c, h, w]`."""
    defences = knowledge.defences
    group = defences.key_mixing or 1
    message, _ = imitate(
        data, replace(knowledge, defences=replace(defences, fixed_noise=0.0)), -(-n // group) * group, generator
    )
    smashed = message.need("smashed")
    secret = torch.randn(smashed.shape[1:], generator=generator) * defences.fixed_noise
    found = estimate_fixed_noise(
        smashed + secret,
        message.need("noisy_latents"),
        coarsened(noised_hints(data.hint_latents, defences), defences.coarse_hints),
        symsigmoid=defences.symsigmoid,
        span=4.0 * defences.fixed_noise,
    )
    return secret - found
