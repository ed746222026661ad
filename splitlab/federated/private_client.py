"""A federated client whose share is private: the same clipping and noise as a step of DP-SGD, sent instead of taken."""

import copy
import math
from collections.abc import Callable

from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.diffusion.denoisers import Denoiser
from splitlab.diffusion.trainable import mark_trainable
from splitlab.federated.defences.dp_sgd import PerExample
from splitlab.federated.update import Update, UpdateTruth, model_digest
from splitlab.privacy.mechanisms import private_gradient

NOISE_SHARES: dict[str, Callable[[float, int], float]] = {
    "central": lambda sigma, n: 0.0,
    "distributed": lambda sigma, n: sigma / math.sqrt(n),
    "local": lambda sigma, n: sigma,
}
"""Noise multiplier that each of n clients adds, by whom they trust. Central: the server, which noises the sum itself.
Distributed: secure aggregation, which shows the sum alone, where the shares make up the whole noise. Local: nobody."""


def private_update(
    unet: UNet2DConditionModel,
    truth: UpdateTruth,
    *,
    alphas_cumprod: Float[Tensor, " T"],
    max_grad_norm: float,
    noise_multiplier: float,
    generator: Source,
    trainable: str = "attention",
    from_block: int = 0,
    trust: str = "local",
    n_clients: int = 1,
    physical_batch: int = 64,
) -> Update:
    """Be the client: return its clipped and noised gradient, divided by its batch size. The model stays as it was.

    Args:
        unet: the model as the server sent it.
        truth: the client's batch, with text embeddings and one local step.
        max_grad_norm, physical_batch: see `splitlab.privacy.mechanisms.private_gradient`.
        noise_multiplier: σ of the mechanism as a whole, of the sum of `n_clients` where they trust in it.
        generator: of the client's noise; each client needs its own, from a key that the server does not know.
        trainable, from_block: see `splitlab.diffusion.trainable.mark_trainable`; not "lora", which the server lacks.
        trust: a key of `NOISE_SHARES`.

    Raises:
        InputError: an unknown trust or trainable set, or another batch.
    """
    if trust not in NOISE_SHARES:
        raise InputError(f"trust {trust!r} is unknown; choose one of {', '.join(NOISE_SHARES)}")
    if trainable == "lora":
        raise InputError("the server knows no adapters of this client; mark and share another trainable set")
    if truth.text is None or truth.timesteps.ndim != 1:
        says = "a private share is one step's gradient of a text-conditional model: give text, one timestep each"
        raise InputError(says)
    model = Denoiser(copy.deepcopy(unet).requires_grad_(False), None, alphas_cumprod)
    mark_trainable(model.unet, trainable, from_block=from_block)
    sigma = NOISE_SHARES[trust](noise_multiplier, n_clients)
    gradient = private_gradient(
        model,
        (truth.clean, truth.text, truth.timesteps, truth.noise),
        max_grad_norm=max_grad_norm,
        noise_multiplier=sigma,
        expected_batch=float(len(truth)),
        generator=generator,
        physical_batch=physical_batch,
    )
    gradients = {name.removeprefix("unet."): value for name, value in gradient.items()}
    defence = str(PerExample(max_grad_norm, sigma))
    return Update(gradients, "gradient", "epsilon", truth.clean.shape[-1], model_digest(unet), defence=defence)
