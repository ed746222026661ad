"""Generate with a fine-tuned model: DDIM (Song et al. 2021), many images at once."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.diffusion import sampling
from splitlab.diffusion.base import Base
from splitlab.diffusion.base_files import load_model
from splitlab.dp.conditioning import ClassEmbedder, TextEmbedder, labels_of


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model, as `finetune` wrote it.

    Attributes:
        unet: the noise predictor.
        embedder: the trained `ClassEmbedder` or `TextEmbedder`; None where the base's text encoder is in use.
        conditioning: "class", "text" or "none".
        classes: the prompts of the classes.
        record: the run's record; empty for the base.
    """

    unet: UNet2DConditionModel
    embedder: nn.Module | None
    conditioning: str
    classes: tuple[str, ...]
    record: dict[str, Any]


def load_tuned(folder: Path) -> Tuned:
    """Load what `finetune` wrote.

    Raises:
        InputError: the folder is no such thing.
    """
    record = checkpoint.load_json(folder / "record.json")
    embedder: nn.Module | None = None
    try:
        unet = load_model(UNet2DConditionModel, folder / "unet")
        if (folder / "embedder").exists():
            embedder = load_model(ClassEmbedder, folder / "embedder")
        elif (folder / "text_encoder").exists():
            embedder = TextEmbedder(load_model(CLIPTextModel, folder / "text_encoder"))
        config = record["config"]
        kind, classes = config["conditioning"], tuple(config["classes"])
    except (OSError, KeyError, TypeError, ValueError) as error:  # an InputError is a ValueError
        raise InputError(f"{folder}: no fine-tuned model ({error}); name a folder that `finetune` wrote") from None
    for module in (unet, embedder):
        if module is not None:
            module.eval().requires_grad_(False)
    return Tuned(unet, embedder, kind, classes, record)


def untuned(base: Base, conditioning: str, *, classes: Sequence[str] = ()) -> Tuned:
    """Return the public base in the same shape: what fine-tuning starts from, and the public-only contrast."""
    return Tuned(base.unet, None, conditioning, tuple(classes), {})


def hidden_states(base: Base, tuned: Tuned, asked: Sequence[str] | Sequence[int] | int) -> Float[Tensor, "n l d"]:
    """Return the hidden states that condition on what is asked for.

    Args:
        base: the public models.
        tuned: the model.
        asked: prompts; for "class", labels or the classes' prompts; for "none", how many images.

    Raises:
        InputError: a label or prompt that names no class, or an argument that does not fit the conditioning.
    """
    if isinstance(asked, int) != (tuned.conditioning == "none"):
        raise InputError(
            f"a model conditioned on {tuned.conditioning!r} was asked for {type(asked).__name__}; "
            "give labels or prompts, or a number of images if it is unconditional"
        )
    if isinstance(asked, int):
        return base.encode_prompts([""]).expand(asked, -1, -1)
    if tuned.conditioning == "text":
        prompts = [str(prompt) for prompt in asked]
        return base.encode_prompts(prompts) if tuned.embedder is None else tuned.embedder(base.token_ids(prompts))
    if len(asked) and isinstance(asked[0], str):
        labels = labels_of([str(prompt) for prompt in asked], tuned.classes)
    else:
        labels = torch.tensor([int(label) for label in asked], dtype=torch.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(tuned.classes):
        raise InputError(f"labels must lie between 0 and {len(tuned.classes) - 1}, got {sorted(set(labels.tolist()))}")
    return base.encode_prompts(tuned.classes)[labels] if tuned.embedder is None else tuned.embedder(labels)


@torch.no_grad()
def sample(
    base: Base,
    tuned: Tuned | Path,
    asked: Sequence[str] | Sequence[int] | int,
    *,
    generator: torch.Generator,
    steps: int = 25,
    guidance: float = 1.0,
    size: int | None = None,
    batch: int = 250,
) -> Float[Tensor, "n 3 s s"]:
    """Generate one image in [-1, 1] per label or prompt, by DDIM without added noise.

    Args:
        base: the public models: VAE, schedule, tokenizer, and the text encoder where none was trained.
        tuned: a model, or the folder of one.
        asked: see `hidden_states`.
        generator: of the initial latents.
        steps: of DDIM.
        guidance: classifier-free guidance scale towards the condition, away from the empty prompt; 1: off.
        size: height and width of the images, pixels; None: what the U-Net was made for.
        batch: images at once.

    Raises:
        InputError: see `hidden_states`.
    """
    tuned = load_tuned(tuned) if isinstance(tuned, Path) else tuned
    states = hidden_states(base, tuned, asked)
    empty = base.encode_prompts([""])
    if tuned.conditioning == "text" and tuned.embedder is not None:
        empty = tuned.embedder(base.token_ids([""]))
    shape = base.latent_shape(size or tuned.unet.config.sample_size * base.pipeline.vae_scale_factor)
    images = [torch.zeros(0, 3, *(base.pipeline.vae_scale_factor * edge for edge in shape[1:]))]
    for part in tqdm(states.split(batch), desc="sample", leave=False, mininterval=2):
        latents = torch.randn((len(part), *shape), generator=generator)
        images.append(base.decode(_denoise(base, tuned.unet, latents, part, empty, steps, guidance)))
    return torch.cat(images)


def _denoise(
    base: Base, unet: UNet2DConditionModel, latents: Tensor, states: Tensor, empty: Tensor, steps: int, guidance: float
) -> Tensor:
    """Run DDIM from noise `latents` to clean ones."""
    scheduler = DDIMScheduler.from_config(copy.deepcopy(base.pipeline.scheduler.config))
    scheduler.set_timesteps(steps)
    guided = guidance != 1.0
    both = torch.cat([empty.expand(states.shape), states]) if guided else states

    def noise_pred(latents: Tensor, timestep: Tensor) -> Tensor:
        predicted = unet(torch.cat([latents, latents]) if guided else latents, timestep, both).sample
        if not guided:
            return predicted
        away, towards = predicted.chunk(2)
        return sampling.guided(away, towards, guidance)

    return sampling.sample(noise_pred, latents, scheduler.timesteps, sampling.scheduler_step(scheduler))
