"""The federated setting: a client trains a diffusion model on private images and sends what it learnt, once.

`share` is the client: it turns a batch into an `Update`, all that the server receives. What the client alone knows
stays in an `UpdateTruth`, another file. Attacks take the update and an `InversionKnowledge`, never the truth.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.diffusion.denoisers import Call, ControlledUNet, plain_attention, predict
from splitlab.federated.update import (
    Update,
    UpdateTruth,
    checked_size,
    model_digest,
    some,
)

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "attention": lambda name: "attentions." in name,
    "lora": lambda name: "lora_" in name,
}
"""Which parameters a client trains and shares, by name: everything, DP-LDM's attention modules, or LoRA adapters."""


@dataclass(frozen=True)
class InversionKnowledge:
    """What the server may use besides the update: this is the threat model of gradient inversion.

    Everything below `base` is what a threat model may grant the server in addition; None: unknown to it.

    Attributes:
        model: the weights that it sent the client (public).
        alphas_cumprod: `[T]` ᾱ of the noise schedule (public).
        base: the public base model: VAE, text encoder and tokenizer; None for a pixel model trained from scratch.
        batch_size: how many images the client trained on.
        timesteps: `[b]` int64.
        noise: `[b, c, h, w]`.
        text: `[b, l, d]` text embeddings.
        hint_latents: `[b, c, h, w]`; for a ControlNet of diffusers' own, hints `[b, 3, s, s]` in [0, 1].
        class_labels: `[b]` int64.
        call: how the model is called, where that cannot be told from it, see `splitlab.diffusion.denoisers.predict`
            (public).
        channels: of the model's input, where its config does not say (public).
        scale: what the client's gradient of the mean loss was multiplied with: a summed loss, a GradScaler, steps
            of accumulation; None: unknown to the server.
        sign: 1, or -1 for an update that points downhill; None: unknown to the server.
    """

    model: nn.Module
    alphas_cumprod: Tensor
    base: Base | None = None
    batch_size: int | None = None
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    text: Tensor | None = None
    hint_latents: Tensor | None = None
    class_labels: Tensor | None = None
    call: Call | None = None
    channels: int | None = None
    scale: float | None = 1.0
    sign: int | None = 1

    @property
    def granted(self) -> tuple[str, ...]:
        """Names of the facts granted to the server beyond what is public."""
        names = ("batch_size", "timesteps", "noise", "text", "hint_latents", "class_labels")
        return tuple(name for name in names if getattr(self, name) is not None)


def pixel_unet(size: int, *, seed: int, channels: tuple[int, ...] = (32, 64), in_channels: int = 3) -> UNet2DModel:
    """Build an untrained pixel-space U-Net for `size` x `size` images, self-attention at its lowest level."""
    lower = len(channels) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet2DModel(
            sample_size=size,
            in_channels=in_channels,
            out_channels=in_channels,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D",) * lower + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * lower,
            norm_num_groups=8,
        )
    return plain_attention(model).eval()


def noised(
    alphas_cumprod: Float[Tensor, " T"],
    clean: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Return sqrt(ᾱ_t) clean + sqrt(1 - ᾱ_t) noise (Ho et al. 2020, eq. 4)."""
    alphas = alphas_cumprod[timesteps][:, None, None, None]
    return alphas.sqrt() * clean + (1 - alphas).sqrt() * noise


def target_of(
    objective: str,
    alphas_cumprod: Float[Tensor, " T"],
    clean: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Return what the model is trained to predict: the noise, or v (Salimans & Ho 2022, appendix D)."""
    if objective == "epsilon":
        return noise
    alphas = alphas_cumprod[timesteps][:, None, None, None]
    return alphas.sqrt() * noise - (1 - alphas).sqrt() * clean


def training_loss(
    model: nn.Module,
    clean: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
    noise: Float[Tensor, "b c h w"],
    text: Tensor | None = None,
    hint_latents: Tensor | None = None,
    *,
    alphas_cumprod: Float[Tensor, " T"],
    objective: str = "epsilon",
    parameters: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Return the client's loss, the mean squared error over batch and elements (Ho et al. 2020, eq. 14)."""
    noisy = noised(alphas_cumprod, clean, noise, timesteps)
    predicted = predict(model, noisy, timesteps, text, hint_latents, parameters=parameters)
    return (predicted - target_of(objective, alphas_cumprod, clean, noise, timesteps)).square().mean()


def trainable_names(model: nn.Module, trainable: str | Callable[[str], bool] = "all") -> tuple[str, ...]:
    """Return the names of the parameters that a client trains and shares.

    Args:
        model: the model; parameters of a `ControlledUNet`'s frozen U-Net never count.
        trainable: a key of `TRAINABLE`, "marked" for those whose requires_grad is set (e.g. by peft), or a predicate
            on names.

    Raises:
        InputError: unknown key, or nothing would be shared.
    """
    parameters = dict(model.named_parameters())
    if isinstance(model, ControlledUNet):
        parameters = {name: p for name, p in parameters.items() if name.startswith("controlnet.")}
    if isinstance(trainable, str) and trainable not in (*TRAINABLE, "marked"):
        raise InputError(f"trainable {trainable!r} is unknown; choose one of {', '.join(TRAINABLE)}, marked")
    if trainable == "marked":
        names = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    else:
        wanted = TRAINABLE[trainable] if isinstance(trainable, str) else trainable
        names = tuple(name for name in parameters if wanted(name))
    if not names:
        raise InputError(
            f"no parameter of this {type(model).__name__} is {trainable!r}, so nothing would be shared; "
            "mark some with requires_grad, or choose others"
        )
    return names


def share(
    model: nn.Module,
    truth: UpdateTruth,
    *,
    alphas_cumprod: Float[Tensor, " T"],
    trainable: str | Callable[[str], bool] = "all",
    objective: str = "epsilon",
    kind: str = "gradient",
    local_steps: int = 1,
    lr: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Update:
    """Be the client: train on a batch and return what the server receives. The model stays as it was.

    Args:
        model: the model as the server sent it.
        truth: the client's batch.
        alphas_cumprod: the noise schedule.
        trainable: which parameters, see `trainable_names`.
        objective: "epsilon" or "v_prediction".
        kind: "gradient", or "fedavg": weights before minus after `local_steps` steps of SGD at `lr` (McMahan 2017).
        local_steps, lr: the local SGD. Each step uses the same timesteps and noise, or its own where `truth` has them.
        dtype: what the tensors are cast to before they are sent.

    Raises:
        InputError: contradictory arguments, or the loss or a gradient is not finite.
    """
    steps = local_steps if kind == "fedavg" else 1
    if truth.timesteps.ndim == 2 and len(truth.timesteps) != steps:
        raise InputError(f"the batch has draws for {len(truth.timesteps)} local steps, not {steps}; give one per step")
    names = trainable_names(model, trainable)
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    size = checked_size(truth.clean.shape[-2:], "the batch's size")
    result = Update({}, kind, objective, size, model_digest(model), local_steps=steps, lr=lr)
    now, gradients = start, {}
    for step in range(steps):
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in now.items()}
        gradients = _gradients(model, truth, step, leaves, names, alphas_cumprod, objective)
        if kind == "fedavg":
            now = now | {name: now[name] - lr * gradients[name] for name in names}
    if kind == "fedavg":
        gradients = {name: start[name] - now[name] for name in names}
    bad = [name for name, value in gradients.items() if not torch.isfinite(value.to(dtype)).all()]
    if bad:
        raise InputError(f"the client's update of {some(bad)} is not finite in {dtype}; lower the learning rate")
    return replace(result, gradients={name: value.to(dtype) for name, value in gradients.items()})


def share_each(model: nn.Module, truth: UpdateTruth, **arguments: Any) -> list[Update]:
    """Return one update per sample, as `share` would make it: their mean is the batch's (for kind "gradient")."""
    return [share(model, truth[index : index + 1], **arguments) for index in range(len(truth))]


def _gradients(
    model: nn.Module,
    truth: UpdateTruth,
    step: int,
    parameters: dict[str, Tensor],
    names: tuple[str, ...],
    alphas_cumprod: Tensor,
    objective: str,
) -> dict[str, Tensor]:
    several = truth.timesteps.ndim == 2
    loss = training_loss(
        model,
        truth.clean,
        truth.timesteps[step] if several else truth.timesteps,
        truth.noise[step] if several else truth.noise,
        truth.text,
        truth.hint_latents,
        alphas_cumprod=alphas_cumprod,
        objective=objective,
        parameters=parameters,
    )
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names], materialize_grads=True)
    return dict(zip(names, gradients, strict=True))
