"""S1's protocol, one function per side, and conventional split learning beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from diffusers import ControlNetModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key, Source, generator, source
from splitlab.diffusion.base import Base, Encoded
from splitlab.diffusion.controlnet import LatentHintControlNet, predict_noise
from splitlab.privacy.draws import permutation
from splitlab.split.defences import Defences, protect
from splitlab.split.defences.fixed_noise import fixed_noise_tensor
from splitlab.split.defences.keys import draw_noise
from splitlab.split.defences.matched import label_share, noisy_state, sent_timesteps
from splitlab.split.defences.per_image_noise import noised_per_image
from splitlab.split.defences.timestep_floor import draw_timesteps
from splitlab.split.messages import Observation, Truth
from splitlab.split.wire import to_bytes


@dataclass(frozen=True)
class Client:
    """One data owner: its share of the private data, its defences, its key. Nothing on it is trained in S1.

    Attributes:
        number: its name on the wire.
        base: the public models (it runs the encoders and the noise schedule).
        data: its private samples, encoded.
        indices: `[n]` where they stand in the whole private data set, for the evaluator.
        defences: what it does to a message.
        key: what all its draws follow from; it is to be its own secret.
        prompts: `n` as it sends them, where others are borrowed in place of the data's own; else empty.
    """

    number: int
    base: Base
    data: Encoded
    indices: Tensor
    defences: Defences
    key: Key
    prompts: tuple[str, ...] = ()

    @cached_property
    def sent(self) -> Encoded:
        """What messages are made of: the data under the defences that come before any message (`noised_per_image`)."""
        keys = self.indices.tolist() if self.defences.per_image_noise else []
        draws = [source("noise once", self.client_key, index) for index in keys]
        latents, hint_latents = noised_per_image(self.defences, self.data.latents, self.data.hint_latents, draws)
        return replace(self.data, latents=latents, hint_latents=hint_latents)

    def draw(self, step: int) -> Source:
        """Return this client's private source of draws for one step: resuming repeats it exactly."""
        return source("client", self.key, self.number, step)

    @cached_property
    def client_key(self) -> Key:
        """The key of what this client draws once: its fixed noise, mixing key, permutation, and noise per image."""
        return self.key.of_client(self.number)

    @property
    def fixed_noise(self) -> Tensor | None:
        """This client's fixed noise `[c, h, w]`, None without that defence."""
        shape = tuple(self.data.latents.shape[1:])
        return fixed_noise_tensor(self.defences, shape, self.client_key) if self.defences.fixed_noise else None


def make_message(
    data: Encoded,
    timesteps: Int[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    defences: Defences,
    alphas_cumprod: Float[Tensor, " T"],
    *,
    client_key: Key,
    draw: Source,
    features: Tensor | None = None,
) -> Observation:
    """Build the message of one batch: the one client there is, for training, recording, attackers and the explorer.

    Args:
        data: the batch, encoded, under the defences that come before any message (`Client.sent`).
        timesteps: as drawn (`draw_timesteps`); the matched client's message names others.
        noise: the diffusion noise (`draw_noise`).
        defences: what the client does.
        alphas_cumprod: ᾱ of the noise schedule.
        client_key: of what a client draws once.
        draw: of what the defences draw for this message.
        features: what a trained hint encoder made of the hints, to be sent as `smashed`; None: S1's sum.
    """
    # Step 1 of S1's client (Yao 2024): noise the image latents to their timesteps (Ho et al. 2020, eq. 4).
    named = sent_timesteps(defences, timesteps, alphas_cumprod)
    noisy_latents = noisy_state(defences, data.latents, noise, named, alphas_cumprod)
    # Step 2: add the hint latents, the cut layer's sum. A rounded sum shows in its low bits what was taken off again,
    # for noised latents, so a secret client's is rounded at the end.
    width = torch.float32 if isinstance(draw, torch.Generator) else torch.float64
    smashed = data.hint_latents.to(width) + noisy_latents.to(width) if features is None else features
    # Step 3: activation, noise and all other defences, in their order.
    message = Observation(-1, -1, named, noisy_latents, smashed, noise, data.text)
    protected = protect(message, defences, client_key=client_key, draw=draw)
    return protected.map(lambda value: value.float() if value.dtype == torch.float64 else value)


def client_message(
    client: Client,
    step: int,
    chosen: Int[Tensor, " b"],
    *,
    timesteps: Int[Tensor, " b"] | None = None,
    features: Tensor | None = None,
) -> tuple[Observation, Truth]:
    """Return a client's message of one step, and what only the client knows of it.

    Args:
        client: who sends.
        step: the message's number; all that is drawn for it follows from that.
        chosen: positions in the client's share (`epoch_batch`).
        timesteps: in place of drawn ones.
        features: see `make_message`.
    """
    defences, alphas_cumprod, draw = client.defences, client.base.alphas_cumprod, client.draw(step)
    data = client.sent[chosen]
    if timesteps is None:
        timesteps = draw_timesteps(defences, len(chosen), alphas_cumprod, draw)
    noise = draw_noise(defences, tuple(data.latents.shape), draw)
    made = make_message(
        *(data, timesteps, noise, defences, alphas_cumprod),
        client_key=client.client_key,
        draw=client.draw(-1 - step),
        features=features,
    )
    prompts = tuple(client.prompts[place] for place in chosen.tolist()) if client.prompts else ()
    truth = Truth(client.indices[chosen], timesteps, noise, prompts)
    return replace(made, client=client.number, sequence=step), truth


def epoch_batch(client: Client, step: int, batch_size: int) -> Int[Tensor, " b"]:
    """Return the positions of batch number `step`: whole epochs, shuffled anew each, no sample dropped.

    Raises:
        InputError: the client has fewer samples than a batch.
    """
    n = len(client.data)
    if batch_size > n:
        raise InputError(f"batch_size {batch_size} exceeds client {client.number}'s {n} samples: lower it")
    first = step * batch_size
    epochs = range(first // n, (first + batch_size - 1) // n + 1)
    orders = [permutation(n, source("epoch", client.key, client.number, epoch)) for epoch in epochs]
    offset = first - epochs[0] * n
    return torch.cat(orders)[offset : offset + batch_size]


def client_send(client: Client, step: int, batch_size: int) -> tuple[bytes, Truth]:
    """Run S1's whole client for one step: what it returns as bytes is all the server ever sees."""
    message, truth = client_message(client, step, epoch_batch(client, step, batch_size))
    return to_bytes(message), truth


def server_prediction(
    base: Base, controlnet: ControlNetModel, observation: Observation, smashed: Tensor | None = None
) -> Float[Tensor, "b c h w"]:
    """Predict the noise in one message: the ControlNet on `smashed`, the frozen U-Net on the noisy latents.

    Args:
        base: the public models.
        controlnet: a `LatentHintControlNet`, or the server's part of an ordinary ControlNet.
        observation: the message.
        smashed: stands in for `observation.smashed`, where a gradient with respect to it is wanted.
    """
    seen = observation.float()
    noisy_latents, timesteps = seen.need("noisy_latents"), seen.need("timesteps")
    smashed = seen.need("smashed") if smashed is None else smashed
    text = seen.encoder_hidden_states
    if text is None:
        text = torch.zeros(seen.batch_size, *base.text_shape)
    if isinstance(controlnet, LatentHintControlNet):
        control = controlnet.forward_smashed(smashed, timesteps, text)
    else:
        control = controlnet(noisy_latents, timesteps, text, controlnet_cond=smashed)
    return predict_noise(base.unet, noisy_latents, timesteps, text, control)


def noise_loss(
    base: Base, defences: Defences, noise_pred: Tensor, noise: Tensor, timesteps: Tensor
) -> Float[Tensor, ""]:
    """Mean squared error of k noise_pred (Yao 2024; k from `label_share`, 1 but for the matched client)."""
    return F.mse_loss(label_share(defences, timesteps, base.alphas_cumprod) * noise_pred, noise)


def server_loss(
    base: Base,
    controlnet: ControlNetModel,
    observation: Observation,
    smashed: Tensor | None = None,
    *,
    defences: Defences | None = None,
) -> Float[Tensor, ""]:
    """Compute the server's loss on one message; arguments as in `server_prediction`, `defences`: the clients'."""
    noise_pred = server_prediction(base, controlnet, observation, smashed)
    seen = observation.float()
    return noise_loss(base, defences or Defences(), noise_pred, seen.need("noise"), seen.need("timesteps"))


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
    protected = protect(message, defences, client_key=Key.published(0), draw=generator("bytes"))
    return sum(tensor.nbytes for tensor in protected.tensors.values())
