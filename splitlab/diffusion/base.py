"""The public world: VAE, text encoder, U-Net and noise schedule of any Stable Diffusion 1.x directory or hub id."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.parallel import Reference
from splitlab.core.pixels import finite
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base_files import load_model
from splitlab.diffusion.base_kinds import check_kind, load_scheduler, load_tokenizer, square
from splitlab.diffusion.base_source import locate

diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Base:
    """Frozen public models in diffusers' vocabulary. Nothing here is trained by any scheme.

    Attributes:
        pipeline: the loaded `StableDiffusionPipeline`, for its parts and for generation.
        digest: SHA-256 over all weights: equal digests, equal models.
    """

    pipeline: StableDiffusionPipeline
    digest: str

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self.pipeline.vae

    @property
    def unet(self) -> UNet2DConditionModel:
        """The noise predictor."""
        return self.pipeline.unet

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The text model."""
        return self.pipeline.text_encoder

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The text model's tokenizer."""
        return self.pipeline.tokenizer

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, " T"]:
        """ᾱ of the noise schedule, float32, decreasing."""
        return self.pipeline.scheduler.alphas_cumprod.float()

    @property
    def n_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @cached_property
    def encoding(self) -> str:
        """SHA-256 over all that encoded data depend on: the weights, the VAE's scaling factor, the tokenizer."""
        tokens = self.tokenizer
        special = (tokens.bos_token_id, tokens.eos_token_id, tokens.pad_token_id)
        settings = (self.digest, self.vae.config.scaling_factor, self.text_shape, special)
        return hashlib.sha256(repr((settings, sorted(tokens.get_vocab().items()))).encode()).hexdigest()

    @property
    def text_shape(self) -> tuple[int, int]:
        """(tokens, width) of a text embedding."""
        return self.tokenizer.model_max_length, self.text_encoder.config.hidden_size

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of `size` x `size` images."""
        factor = self.pipeline.vae_scale_factor
        if size % factor:
            raise InputError(f"images of {size}x{size} pixels do not fit the VAE; use a multiple of {factor}")
        return self.vae.config.latent_channels, size // factor, size // factor

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 s s"], *, batch: int = 64) -> Float[Tensor, "b c h w"]:
        """Encode images in [-1, 1] to latents: the posterior's mean, times the scaling factor.

        Raises:
            InputError: the VAE cannot take images of that size, or makes no numbers of them.
        """
        self.latent_shape(images.shape[-1])
        parts = [self.vae.encode(part).latent_dist.mean for part in images.split(batch)]
        latents = finite(torch.cat(parts) * self.vae.config.scaling_factor, "latents that the VAE encodes")
        return latents.contiguous()  # as from the cache: the memory layout decides how sums are rounded

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"], *, batch: int = 16) -> Float[Tensor, "b 3 s s"]:
        """Decode latents to images, clamped to [-1, 1].

        Raises:
            InputError: latents or images are not finite.
        """
        finite(latents, "latents to decode")
        parts = [self.vae.decode(part / self.vae.config.scaling_factor).sample for part in latents.split(batch)]
        return finite(torch.cat(parts), "images that the VAE decodes").clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, batch: int = 256) -> Float[Tensor, "b l d"]:
        """Encode prompts to the text model's last hidden states.

        Raises:
            InputError: a prompt has more tokens than the text model takes.
        """
        ids = self.token_ids(prompts)
        unique, inverse = torch.unique(ids, dim=0, return_inverse=True)
        hidden = torch.cat([self.text_encoder(part).last_hidden_state for part in unique.split(batch)])
        return hidden[inverse]

    def token_ids(self, prompts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Tokenise prompts to the text model's full length.

        Raises:
            InputError: a prompt has more tokens than the text model takes.
        """
        length = self.tokenizer.model_max_length
        encoded = self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=False)
        for index, ids in enumerate(encoded.input_ids):
            if len(ids) > length:
                raise InputError(
                    f"prompt {index}, {prompts[index]!r:.100}, has {len(ids)} tokens, the text model takes {length}: "
                    "shorten it, or let the data set's entry say long_captions: truncate"
                )
        return torch.tensor(encoded.input_ids)

    def reference(self) -> Reference:
        """Return what another process loads it by; a copy of the tokenizer would decode otherwise."""
        return _BaseReference(self.pipeline.name_or_path, self.digest)

    def noised(
        self, latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], timesteps: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Noise latents to timesteps: `noised` at ᾱ_t."""
        return noised(latents, noise, self.alphas_cumprod[timesteps][:, None, None, None])

    def denoised(
        self, noisy_latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], timesteps: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Invert `noised`: the latents, given the noise or a prediction of it (Ho et al. 2020, eq. 15)."""
        return denoised(noisy_latents, noise, self.alphas_cumprod[timesteps][:, None, None, None])


def noised(
    latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], alphas: Float[Tensor, "#b 1 1 1"]
) -> Float[Tensor, "b c h w"]:
    """Return sqrt(ᾱ) latents + sqrt(1 - ᾱ) noise (Ho et al. 2020, eq. 4)."""
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise


def denoised(
    noisy_latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], alphas: Float[Tensor, "#b 1 1 1"]
) -> Float[Tensor, "b c h w"]:
    """Solve `noised` for the latents (Ho et al. 2020, eq. 15)."""
    return (noisy_latents - (1 - alphas).sqrt() * noise) / alphas.sqrt()


@dataclass(frozen=True)
class _BaseReference(Reference):
    """Where a base model lies, and which it is."""

    source: str
    digest: str

    def load(self) -> Base:
        base = _loaded(self.source)
        if base.digest != self.digest:
            raise InputError(
                f"base model {self.source}: it changed after it was loaded; load it again, or use one worker"
            )
        return base


@dataclass(frozen=True)
class Encoded:
    """A data set through the frozen encoders: `latents`, `hint_latents` `[n, c, h, w]` and `text` `[n, l, d]`."""

    latents: Tensor
    hint_latents: Tensor
    text: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, indices: Tensor | slice) -> "Encoded":
        return Encoded(self.latents[indices], self.hint_latents[indices], self.text[indices])


def load_base(source: str | Path) -> Base:
    """Load a base model: a folder in diffusers' layout, or a hub id (`base_source.locate`); safetensors only.

    All parts come out in float32, whatever width their files have; docs/design.md lists what loads and what does not.

    Raises:
        InputError: it is missing, incomplete, damaged or not a noise-predicting Stable Diffusion 1.x model.
    """
    folder = None
    try:
        folder = locate(source)
        check_kind(folder)
        parts = _parts(folder)
    except (InputError, OSError) as error:
        reason = str(error).removeprefix(f"{folder}/").removeprefix(f"{folder}: ")
        raise InputError(f"base model {source}: cannot be loaded: {reason}") from None
    optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, **optional)
    pipeline.register_to_config(_name_or_path=str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return Base(pipeline, _digest(pipeline))


def _parts(folder: Path) -> dict[str, Any]:
    """Load the parts of the pipeline, the small ones first."""
    scheduler = load_scheduler(folder)
    text_encoder = load_model(CLIPTextModel, folder / "text_encoder")
    tokenizer = load_tokenizer(folder / "tokenizer", text_encoder.config)
    unet = load_model(UNet2DConditionModel, folder / "unet", **square(folder / "unet", 64))
    vae = load_model(AutoencoderKL, folder / "vae", **square(folder / "vae", 512))
    for part in (text_encoder, unet, vae):
        part.requires_grad_(False)
    return {"vae": vae, "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}


def _digest(pipeline: StableDiffusionPipeline) -> str:
    digest = hashlib.sha256()
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def encoded(base: Base, data: ImageSet, *, cache: Path | None = None) -> Encoded:
    """Encode images, hints and prompts once: from then on they are read from `cache`, keyed by the content of both.

    Raises:
        InputError: the data set has no hints or no prompts.
    """
    hints, prompts = data.need_hints(), data.need_prompts()

    def make() -> dict[str, Tensor]:
        return vars(Encoded(base.encode(data.images), base.encode(hints), base.encode_prompts(prompts)))

    return Encoded(**_kept("encoded", base, data, cache, make))


def encoded_images(base: Base, data: ImageSet, *, cache: Path | None = None) -> Float[Tensor, "n c h w"]:
    """Encode the images alone once, for what needs neither hints nor prompts."""
    return _kept("latents", base, data, cache, lambda: {"latents": base.encode(data.images)})["latents"]


def _kept(
    kind: str, base: Base, data: ImageSet, cache: Path | None, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    path = cache / f"{kind}-{base.encoding[:16]}-{data.digest[:16]}.safetensors" if cache else None
    if path and path.exists():
        return checkpoint.load(path, remedy=checkpoint.CACHED)[0]
    tensors = make()
    if path:
        checkpoint.save(path, tensors, {}, private=True)
    return tensors


_loaded = lru_cache(maxsize=1)(load_base)
