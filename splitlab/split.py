"""S1's protocol, one function per side, and conventional split learning beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import ControlNetModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.base import Base, Encoded
from splitlab.config import Defences
from splitlab.controlnet import LatentHintControlNet, predict_noise
from splitlab.defences import draw_timesteps, fixed_noise_tensor, protect, transforms
from splitlab.errors import InputError
from splitlab.seeds import generator
from splitlab.types import Observation, Truth
from splitlab.wire import to_bytes


@dataclass(frozen=True)
class Client:
    """One data owner: its share of the private data, its defences, its key. Nothing on it is trained in S1.

    Attributes:
        number: its name on the wire.
        base: the public models (it runs the encoders and the noise schedule).
        data: its private samples, encoded.
        indices: `[n]` where they stand in the whole private data set, for the evaluator.
        defences: what it does to a message.
        key: secret; seeds its draws and its fixed noise.
    """

    number: int
    base: Base
    data: Encoded
    indices: Tensor
    defences: Defences
    key: int

    def draw(self, step: int) -> torch.Generator:
        """Return this client's private generator for one step: resuming repeats it exactly."""
        return generator("client", self.key, self.number, step)

    @property
    def client_key(self) -> int:
        """The seed of this client's fixed noise."""
        return self.key * 1000 + self.number

    @property
    def fixed_noise(self) -> Tensor | None:
        """This client's fixed noise `[c, h, w]`, None without that defence."""
        shape = tuple(self.data.latents.shape[1:])
        return fixed_noise_tensor(self.defences, shape, self.client_key) if self.defences.fixed_noise else None


def client_batch(client: Client, step: int, batch_size: int) -> tuple[Observation, Truth, Tensor]:
    """Draw a batch and noise it; `smashed` is still empty and no defence but the timestep floor applied.

    Batches walk through a fresh permutation of the client's samples per epoch.

    Returns the message so far, the truth, and the batch's positions `[b]` in the client's share.
    """
    draw = client.draw(step)
    chosen = _epoch_batch(client, step, batch_size)
    timesteps = draw_timesteps(client.defences, len(chosen), client.base.n_timesteps, draw)
    latents = client.data.latents[chosen]
    noise = torch.randn(latents.shape, generator=draw)
    message = Observation(
        client=client.number,
        sequence=step,
        timesteps=timesteps,
        noisy_latents=client.base.noised(latents, noise, timesteps),
        noise=noise,
        encoder_hidden_states=client.data.text[chosen],
    )
    return message, Truth(indices=client.indices[chosen], timesteps=timesteps, noise=noise), chosen


def _epoch_batch(client: Client, step: int, batch_size: int) -> Tensor:
    """Return the positions of batch number `step`: whole epochs, shuffled anew each, no sample dropped."""
    n = len(client.data)
    if batch_size > n:
        raise InputError(f"batch_size {batch_size} exceeds client {client.number}'s {n} samples: lower it")
    first = step * batch_size
    epochs = range(first // n, (first + batch_size - 1) // n + 1)
    orders = [torch.randperm(n, generator=generator("epoch", client.key, client.number, e)) for e in epochs]
    offset = first - epochs[0] * n
    return torch.cat(orders)[offset : offset + batch_size]


def client_send(client: Client, step: int, batch_size: int) -> tuple[bytes, Truth]:
    """Run S1's whole client for one step: what it returns as bytes is all the server ever sees."""
    message, truth, chosen = client_batch(client, step, batch_size)
    message = replace(message, smashed=client.data.hint_latents[chosen] + message.need("noisy_latents"))
    chain = transforms(client.defences, client_key=client.client_key)
    return to_bytes(protect(message, chain, client.draw(-1 - step))), truth


def server_loss(
    base: Base, controlnet: ControlNetModel, observation: Observation, smashed: Tensor | None = None
) -> Float[Tensor, ""]:
    """Compute the server's loss on one message: mean squared error of the predicted noise (Yao 2024).

    Args:
        base: the public models.
        controlnet: a `LatentHintControlNet`, or the server's part of an ordinary ControlNet.
        observation: the message.
        smashed: stands in for `observation.smashed`, where a gradient with respect to it is wanted.
    """
    seen = observation.float()
    noisy_latents, timesteps, noise = seen.need("noisy_latents"), seen.need("timesteps"), seen.need("noise")
    smashed = seen.need("smashed") if smashed is None else smashed
    text = seen.encoder_hidden_states
    if text is None:
        text = torch.zeros(seen.batch_size, *base.text_shape)
    if isinstance(controlnet, LatentHintControlNet):
        control = controlnet.forward_smashed(smashed, timesteps, text)
    else:
        control = controlnet(noisy_latents, timesteps, text, controlnet_cond=smashed)
    return F.mse_loss(predict_noise(base.unet, noisy_latents, timesteps, text, control), noise)


def detach_hint_encoder(controlnet: ControlNetModel) -> nn.Module:
    """Cut an ordinary ControlNet behind its hint encoder: return the encoder, leave the server's part in place."""
    encoder = controlnet.controlnet_cond_embedding
    controlnet.controlnet_cond_embedding = nn.Identity()
    return encoder


def attach_hint_encoder(controlnet: ControlNetModel, encoder: nn.Module) -> ControlNetModel:
    """Undo `detach_hint_encoder`."""
    controlnet.controlnet_cond_embedding = encoder
    return controlnet


def reference_message(latent_shape: Sequence[int], text_shape: Sequence[int], unet_width: int) -> dict[str, Tensor]:
    """Return one sample of the message that S1's released code sends, field by field, for comparing bytes.

    It sends the U-Net's first block output `[unet_width, h, w]` in fp32 where ours sends the noisy latents that
    determine it, and zeros for a hidden prompt (read from the released code).
    """
    height, width = latent_shape[-2:]
    return {
        "unet_first_block": torch.zeros(1, unet_width, height, width),
        "smashed": torch.zeros(1, *latent_shape, dtype=torch.float16),
        "noise": torch.zeros(1, *latent_shape),
        "timesteps": torch.zeros(1, dtype=torch.int64),
        "encoder_hidden_states": torch.zeros(1, *text_shape),
    }


def sample_bytes(latent_shape: Sequence[int], text_shape: Sequence[int], defences: Defences) -> int:
    """Count the payload bytes that one sample costs on the wire under `defences`, by building such a message."""
    latents = torch.zeros(1, *latent_shape)
    message = Observation(
        0, 0, torch.zeros(1, dtype=torch.int64), latents, latents, latents, torch.zeros(1, *text_shape)
    )
    protected = protect(message, transforms(defences, client_key=0), generator("bytes"))
    return sum(tensor.nbytes for tensor in protected.tensors.values())
