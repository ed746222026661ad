"""ControlNets of the schemes, and pipelines that generate with them."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.pixels import finite
from splitlab.diffusion.base import Base


def symsigmoid(x: Tensor) -> Tensor:
    """S1's activation, |x| (2 sigmoid(x) - 1): odd, strictly increasing, flat at 0 (Yao 2024)."""
    return x.abs() * (2 * torch.sigmoid(x) - 1)


def symsigmoid_inverse(y: Tensor, *, iterations: int = 40) -> Tensor:
    """Invert `symsigmoid` elementwise by bisection in float64; relative error below 1e-9."""
    magnitude = y.double().abs()
    low, high = torch.zeros_like(magnitude), torch.maximum(1.4 * magnitude, 2 * magnitude.sqrt())
    for _ in range(iterations):
        middle = (low + high) / 2
        above = symsigmoid(middle) > magnitude
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ((low + high) / 2 * y.double().sign()).to(y.dtype)


def low_frequencies(latents: Float[Tensor, "b c h w"], kept: int) -> Float[Tensor, "b c h w"]:
    """Keep the `kept` x `kept` lowest spatial frequencies of every channel but the mean (type-II DCT).

    An orthogonal projection. The mean goes because it is the background's, many times as large as all that a hint adds.
    """
    rows, columns = (_cosines(size, kept).to(latents) for size in latents.shape[2:])
    low = torch.einsum("bchw,hi,wj->bcij", latents, rows, columns)
    return low - low.mean((2, 3), keepdim=True)


def coarsened(latents: Float[Tensor, "b c h w"], kept: int) -> Float[Tensor, "b c h w"]:
    """Return `low_frequencies`, amplified by `coarse_gain`; 0: the latents as they are."""
    return low_frequencies(latents, kept) * coarse_gain(latents.shape, kept) if kept else latents


def coarse_gain(shape: Sequence[int], kept: int) -> float:
    """Return what kept frequencies are multiplied by, so that white noise that was projected keeps its size."""
    return math.sqrt(shape[-2] * shape[-1] / (kept**2 - 1)) if kept else 1.0


def _cosines(size: int, kept: int) -> Float[Tensor, "s s"]:
    """Return the projection of `size` numbers on their `kept` lowest cosines."""
    places = torch.arange(size, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi / size * torch.arange(min(kept, size))[:, None] * places)
    basis = basis / torch.linalg.vector_norm(basis, dim=1, keepdim=True)
    return basis.T @ basis


ACTIVATIONS = {"none": lambda x: x, "symsigmoid": symsigmoid}


class _Nothing(nn.Module):
    """Stands in for the convolutional hint encoder, which latent hints make superfluous."""

    def forward(self, conditioning: Tensor) -> float:
        return 0.0


class LatentHintControlNet(ControlNetModel):
    """ControlNet whose hint is a VAE latent, added to the noisy latents in front of the first convolution (Yao 2024).

    Saves and loads as any diffusers ControlNet. `controlnet_cond` is the hint's latents.

    Args:
        activation: what the sum goes through, "none" or "symsigmoid".
        hide_prompts: replace text embeddings by zeros, as in S1's training with hidden prompts.
        coarse_hints: use that many frequencies of a hint per axis only, as in training (`coarsened`); 0: all.
        **controlnet: the arguments of `ControlNetModel`.
    """

    def __init__(self, activation: str = "none", hide_prompts: bool = False, coarse_hints: int = 0, **controlnet: Any):
        if activation not in ACTIVATIONS:
            raise InputError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        super().__init__(**controlnet)
        self.controlnet_cond_embedding = _Nothing()
        self.register_to_config(activation=activation, hide_prompts=hide_prompts, coarse_hints=coarse_hints)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        keys = set(inspect.signature(ControlNetModel.__init__).parameters)
        return keys | {"activation", "hide_prompts", "coarse_hints"}

    def smash(self, noisy_latents: Tensor, hint_latents: Tensor) -> Tensor:
        """Return the cut-layer activation `[b, c, h, w]`: the client's part."""
        hint_latents = coarsened(hint_latents, self.config.coarse_hints)
        return ACTIVATIONS[self.config.activation](hint_latents + noisy_latents)

    def forward_smashed(self, smashed: Tensor, timesteps: Tensor, text: Tensor) -> ControlNetOutput:
        """Run the server's part: everything after the cut."""
        text = torch.zeros_like(text) if self.config.hide_prompts else text
        return super().forward(smashed, timesteps, text, controlnet_cond=smashed)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> ControlNetOutput | tuple[Any, ...]:
        """Run client's and server's part; arguments as in `ControlNetModel`, with latents as `controlnet_cond`."""
        if self.config.hide_prompts:
            encoder_hidden_states = torch.zeros_like(encoder_hidden_states)
        smashed = self.smash(sample, controlnet_cond)
        options = {"conditioning_scale": conditioning_scale, "guess_mode": guess_mode, "return_dict": return_dict}
        return super().forward(smashed, timestep, encoder_hidden_states, controlnet_cond=smashed, **options, **kwargs)


class LatentHintPipeline(StableDiffusionControlNetPipeline):
    """`StableDiffusionControlNetPipeline` for a `LatentHintControlNet`: hints are images, encoded by the VAE here."""

    def prepare_image(self, *args: Any, **kwargs: Any) -> Tensor:
        """Preprocess hint images as the parent does, then encode them to latents."""
        hints = super().prepare_image(*args, **kwargs) * 2.0 - 1.0
        latents = self.vae.encode(hints.to(self.vae.dtype)).latent_dist.mean
        return latents * self.vae.config.scaling_factor

    def prepare_latents(
        self, batch_size: int, num_channels_latents: int, height: int, width: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Draw the initial latents; the parent reads the size off the prepared hint, in latent pixels."""
        factor = self.vae_scale_factor
        return super().prepare_latents(
            batch_size, num_channels_latents, height * factor, width * factor, *args, **kwargs
        )


def latent_hint_controlnet(
    base: Base, *, activation: str = "none", hide_prompts: bool = False, coarse_hints: int = 0
) -> LatentHintControlNet:
    """Build S1's ControlNet from the base's U-Net, its zero convolutions at zero."""
    model = LatentHintControlNet.from_unet(base.unet)
    model.register_to_config(activation=activation, hide_prompts=hide_prompts, coarse_hints=coarse_hints)
    return model.train()


def image_hint_controlnet(base: Base, *, seed: int) -> ControlNetModel:
    """Build an ordinary ControlNet, whose convolutional hint encoder meets the VAE's down-scaling."""
    widths = (16, 32, 96, 256)
    halvings = base.pipeline.vae_scale_factor.bit_length() - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=widths[: halvings + 1])
    return model.train()


def predict_noise(
    unet: UNet2DConditionModel,
    noisy_latents: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
    text: Float[Tensor, "b l d"],
    control: ControlNetOutput,
) -> Float[Tensor, "b c h w"]:
    """Run the frozen U-Net with a ControlNet's residuals added: the server's share of the U-Net and of the loss."""
    return unet(
        noisy_latents,
        timesteps,
        encoder_hidden_states=text,
        down_block_additional_residuals=control.down_block_res_samples,
        mid_block_additional_residual=control.mid_block_res_sample,
    ).sample


def control_pipeline(base: Base, controlnet: ControlNetModel) -> StableDiffusionControlNetPipeline:
    """Assemble the pipeline that generates with a trained ControlNet of any scheme."""
    kind = LatentHintPipeline if isinstance(controlnet, LatentHintControlNet) else StableDiffusionControlNetPipeline
    pipeline = kind(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        controlnet=controlnet,
        scheduler=base.pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: StableDiffusionControlNetPipeline,
    prompts: Sequence[str],
    hints: Float[Tensor, "n 3 s s"],
    *,
    generator: torch.Generator,
    steps: int = 25,
    guidance_scale: float = 2.0,
    batch: int = 64,
) -> Float[Tensor, "n 3 s s"]:
    """Generate one image per (prompt, hint); hints and images in [-1, 1].

    Raises:
        InputError: images come out as NaN.
    """
    images = []
    size = hints.shape[-1]
    for start in tqdm(range(0, len(prompts), batch), desc="generate", leave=False):
        part = pipeline(
            prompt=list(prompts[start : start + batch]),
            image=(hints[start : start + batch] + 1.0) / 2.0,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="pt",
        ).images
        images.append(torch.as_tensor(part) * 2.0 - 1.0)
    return finite(torch.cat(images), "generated images")
