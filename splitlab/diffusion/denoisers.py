"""The models that clients train, and the one place that knows how each is called: diffusers' own, or any module."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from splitlab.core.errors import InputError
from splitlab.diffusion.base import noised
from splitlab.diffusion.controlnet import predict_noise

Call = Callable[..., Any]
"""`(model, noisy, timesteps) -> prediction`; `text`, `hint_latents` and `class_labels` come by name, if they exist."""

ARGUMENTS = {
    "timesteps": ("timestep", "timesteps", "t", "time", "times", "sigma", "sigmas", "noise_labels", "noise_level"),
    "text": ("encoder_hidden_states", "text", "context", "text_embeds", "prompt_embeds"),
    "hint_latents": ("hint_latents", "controlnet_cond", "hint"),
    "class_labels": ("class_labels", "class_label", "labels", "label", "classes", "y"),
}
"""What a model's forward may call each fact; timesteps come second where they are called otherwise."""


class ControlledUNet(nn.Module):
    """A ControlNet in front of a frozen U-Net, as one module: what federated ControlNet trains."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel):
        super().__init__()
        self.unet = unet.requires_grad_(False)
        self.controlnet = controlnet

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, hint_latents: Tensor) -> Tensor:
        """Predict the noise `[b, c, h, w]`."""
        control = self.controlnet(noisy, timesteps, encoder_hidden_states=text, controlnet_cond=hint_latents)
        return predict_noise(self.unet, noisy, timesteps, text, control)


def plain_attention(model: nn.Module) -> Any:
    """Switch `model` to attention that can be differentiated twice, in place; return it."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return model


def predict(
    model: nn.Module,
    noisy: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"] | Float[Tensor, " b"],
    text: Tensor | None = None,
    hint_latents: Tensor | None = None,
    class_labels: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    call: Call | None = None,
) -> Float[Tensor, "b c h w"]:
    """Call any of the supported models.

    Args:
        model: a UNet2DModel, a UNet2DConditionModel, a `ControlledUNet`, or any module called as (noisy, timesteps).
        noisy: the noisy images or latents.
        timesteps: their timesteps.
        text: `[b, l, d]` text embeddings; needed by the text-conditional ones.
        hint_latents: `[b, c, h, w]`; needed by `ControlledUNet`.
        class_labels: `[b]` int64; needed by class-conditional ones. Facts that a model does not take are left out.
        parameters: take these in place of the model's own.
        call: how to call it, where forward's signature does not say.

    Returns the prediction; of `outputs` with twice the channels, whose second half is a variance (Nichol & Dhariwal
    2021), the first half.

    Raises:
        InputError: the model needs a fact that there is not, or returns something else.
    """
    facts = {"text": text, "hint_latents": hint_latents, "class_labels": class_labels}
    return outputs(model, noisy, timesteps, facts, parameters, call)[:, : noisy.shape[1]]


def outputs(
    model: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    facts: Mapping[str, Tensor | None],
    parameters: Mapping[str, Tensor] | None = None,
    call: Call | None = None,
) -> Float[Tensor, "b d h w"]:
    """Return all that a model predicts, d = c or 2 c; arguments and errors as for `predict`."""
    given = {name: value for name, value in facts.items() if value is not None}
    run = call or _by_signature
    if parameters:
        weights = {f"model.{name}": value for name, value in parameters.items()}
        return _tensor(functional_call(_Called(model, run), weights, (noisy, timesteps), given), noisy, model)
    return _tensor(run(model, noisy, timesteps, **given), noisy, model)


def argument(model: nn.Module, fact: str) -> str | None:
    """Return what the model's forward calls a fact, a key of `ARGUMENTS`; None if it knows none of the names."""
    parameters = _parameters(model)
    return next((name for name in ARGUMENTS[fact] if name in parameters), None)


def needs(model: nn.Module, fact: str) -> bool:
    """Say whether the model cannot be called without a fact: text, hint_latents or class_labels."""
    name = argument(model, fact)
    if name is None or not _parameters(model)[name]:
        return name is not None
    return fact == "class_labels" and bool(
        getattr(model, "num_classes", None) or getattr(model, "class_embedding", None) is not None
    )


def _parameters(model: nn.Module) -> dict[str, bool]:
    """Return what forward takes besides the noisy inputs, and whether it can do without."""
    return _optional(getattr(model.forward, "__func__", model.forward))


@lru_cache(maxsize=64)
def _optional(forward: Callable[..., Any]) -> dict[str, bool]:
    parameters = list(inspect.signature(forward).parameters.values())
    return {p.name: p.default is not p.empty for p in parameters if p.name != "self"}


class _Called(nn.Module):
    """A model and how it is called as one module, so that its parameters can be replaced for one call."""

    def __init__(self, model: nn.Module, run: Call):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, noisy: Tensor, timesteps: Tensor, **facts: Tensor) -> Any:
        return self.run(self.model, noisy, timesteps, **facts)


def _by_signature(model: nn.Module, noisy: Tensor, timesteps: Tensor, **facts: Tensor) -> Any:
    time = argument(model, "timesteps")
    named: dict[str, Tensor] = {} if time is None else {time: timesteps}
    for fact in ("text", "hint_latents", "class_labels"):
        if fact not in facts and needs(model, fact):
            raise InputError(f"a {type(model).__name__} needs {fact}, and there is none; give it")
    named |= {name: value for fact, value in facts.items() if (name := argument(model, fact))}
    return model(noisy, **named) if time else model(noisy, timesteps, **named)


def _tensor(output: Any, noisy: Tensor, model: nn.Module) -> Tensor:
    """Return the tensor that an output stands for: itself, `.sample`, or the first of several."""
    if not isinstance(output, Tensor):
        first = output[0] if isinstance(output, tuple | list) and output else getattr(output, "sample", output)
        output = first.get("sample") if isinstance(first, Mapping) else first
    if not isinstance(output, Tensor) or output.ndim != 4:
        raise InputError(
            f"a {type(model).__name__} returns a {type(output).__name__}, no prediction [b, c, h, w]; say "
            "call=<function (model, noisy, timesteps) -> prediction>"
        )
    b, c, h, w = noisy.shape
    if output.shape not in ((b, c, h, w), (b, 2 * c, h, w)):
        raise InputError(
            f"a {type(model).__name__} returns {list(output.shape)} for noisy inputs {[b, c, h, w]}: a denoiser "
            "returns as much as it is given (twice the channels with a learned variance); check channels and size, or "
            "say call=<function (model, noisy, timesteps) -> prediction>"
        )
    return output


class Denoiser(nn.Module):
    """U-Net and conditioning embedder as one module that returns one loss per sample: what DP-SGD trains.

    Args:
        unet: the noise predictor.
        embedder: condition -> hidden states; None where the condition is hidden states already.
        alphas_cumprod: `[T]` ᾱ of the noise schedule.
    """

    def __init__(self, unet: UNet2DConditionModel, embedder: nn.Module | None, alphas_cumprod: Tensor):
        super().__init__()
        self.unet = unet
        self.embedder = embedder
        self.alphas_cumprod = alphas_cumprod  # an attribute, no buffer: it is no part of what is saved

    def forward(self, latents: Tensor, condition: Tensor, timesteps: Tensor, noise: Tensor) -> Float[Tensor, " b"]:
        """Return the squared error of the predicted noise, averaged over each sample (Ho et al. 2020, eq. 14).

        Args:
            latents: `[b, c, h, w]`, clean.
            condition: `[b]` labels, `[b, l]` token ids, or `[b, l, d]` hidden states.
            timesteps: `[b]`.
            noise: `[b, c, h, w]`.
        """
        states = condition if self.embedder is None else self.embedder(condition)
        noisy = noised(latents, noise, self.alphas_cumprod.to(latents)[timesteps][:, None, None, None])
        predicted = self.unet(noisy, timesteps, encoder_hidden_states=states).sample
        return (predicted - noise).square().flatten(1).mean(1)
