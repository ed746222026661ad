"""Who sent this private share? The attacker who holds the candidates, and is told all but which of them it was.

No attack of the catalogue can do better at naming the sender of a clipped and noised gradient: given timestep, noise,
prompt and clip norm, every candidate's share is known but for the Gaussian noise, so the likeliest candidate is the
best guess there is (Neyman & Pearson 1933). It needs the private images themselves, so it is a ceiling for the others
and no threat model that the catalogue grants.
"""

import copy

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.diffusion.denoisers import Denoiser
from splitlab.diffusion.trainable import mark_trainable
from splitlab.federated.update import Update
from splitlab.privacy.mechanisms import chunks, clip_and_sum, per_sample_gradients, per_sample_hooks


def candidate_shares(
    unet: UNet2DConditionModel,
    clean: Float[Tensor, "k c h w"],
    text: Float[Tensor, "k l d"],
    *,
    timestep: int,
    noise: Float[Tensor, "c h w"],
    alphas_cumprod: Float[Tensor, " T"],
    max_grad_norm: float,
    trainable: str = "attention",
    from_block: int = 0,
    physical_batch: int = 50,
) -> Float[Tensor, "k p"]:
    """Return what each candidate would share at this timestep and noise, clipped, before any noise is added.

    Args:
        unet: the model as the server sent it.
        clean: the candidates' latents.
        text: their text embeddings.
        timestep, noise: what the client drew, granted to the attacker.
        alphas_cumprod: ᾱ of the noise schedule.
        max_grad_norm: C, public.
        trainable, from_block: as in `splitlab.federated.private_client.private_update`.
        physical_batch: candidates at once.
    """
    model = Denoiser(copy.deepcopy(unet).requires_grad_(False), None, alphas_cumprod)
    mark_trainable(model.unet, trainable, from_block=from_block)
    times, same = torch.full((len(clean),), timestep), noise.expand(len(clean), -1, -1, -1)
    rows = []
    with per_sample_hooks(model):
        for part in chunks(len(clean), 1, physical_batch):
            gradients, _ = per_sample_gradients(model, (clean[part], text[part], times[part], same[part]))
            for index in range(len(clean[part])):
                clipped, _ = clip_and_sum({n: g[index : index + 1] for n, g in gradients.items()}, max_grad_norm)
                rows.append(torch.cat([value.flatten() for value in clipped.values()]))
    return torch.stack(rows)


def flattened(share: Update) -> Float[Tensor, " p"]:
    """Return a share of `private_update` as one vector, in the order of `candidate_shares`."""
    return torch.cat([value.float().flatten() for value in share.gradients.values()])


def log_likelihoods(
    shares: Float[Tensor, "m p"], candidates: Float[Tensor, "k q"], *, std: float
) -> Float[Tensor, "m k"]:
    """Return each candidate's log-likelihood given each share of one image, up to a constant of the share.

    Of several shares of one client the log-likelihoods add up.

    Args:
        shares: what the server received.
        candidates: what the candidates would have sent without noise.
        std: of the noise on every entry, σC; 0: the nearest candidate, in units of its own.

    Raises:
        InputError: lengths differ, as they do where other parameters were shared.
    """
    if shares.shape[1] != candidates.shape[1]:
        raise InputError(
            f"a share has {shares.shape[1]} entries, a candidate's {candidates.shape[1]}: give both the same trainable"
        )
    inner = shares.double() @ candidates.double().T
    return (inner - candidates.double().square().sum(1) / 2) / (std**2 or 1.0)


def likeliest(scores: Float[Tensor, "m k"]) -> Int[Tensor, " m"]:
    """Return the number of the best candidate for each share; -1 where several are equally good, since that is none."""
    best = scores.max(1)
    tied = (scores == best.values[:, None]).sum(1) > 1
    return torch.where(tied, -1, best.indices)
