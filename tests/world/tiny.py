"""Random models and small data for the tests: Stable Diffusion's layout, a few thousand weights, no training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin
from transformers import CLIPTextConfig, CLIPTextModel

from splitlab.data.colours import COLOURS
from splitlab.data.generate import Sample, shapes
from splitlab.data.image_set import ImageSet, image_set
from splitlab.diffusion.base import Base
from splitlab.diffusion.pretrain import MAX_TOKENS, make_scheduler, make_tokenizer
from splitlab.federated.update import UpdateTruth
from splitlab.split.config import TrainConfig

SIZE = 16
"""Height and width of the tiny images, pixels: the smallest on which SSIM's 11x11 window fits."""

ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
"""ᾱ of the linear noise schedule (Ho et al. 2020), for models without a base."""

PROMPTS = [f"{colour} circle with {colour} background" for colour in COLOURS]


def samples(n: int, *, size: int = SIZE, seed: int = 0, prefix: str = "tiny") -> list[Sample]:
    """Draw n shapes."""
    return list(shapes(n, np.random.default_rng(seed), prefix, size))


def small_set(n: int, *, size: int = SIZE, seed: int = 0) -> ImageSet:
    """Return n shapes in memory."""
    drawn = samples(n, size=size, seed=seed)
    images = np.stack([sample.image for sample in drawn])
    hints = np.stack([np.repeat(sample.hint[..., None], 3, axis=2) for sample in drawn])
    return image_set(images, hints, [sample.text for sample in drawn], [sample.source for sample in drawn])


def splits(private: ImageSet) -> Callable[[str, str], ImageSet]:
    """Return how a stage loads data: `private`, and two others that share no image with it."""
    others = {split: small_set(3, size=private.size, seed=seed) for seed, split in enumerate(("public", "heldout"), 90)}
    return lambda dataset, split: (others | {"private": private})[split]


def save_base(path: Path, *, seed: int = 0) -> Path:
    """Save a random base model whose VAE shrinks by 4 and whose two U-Net levels both cross-attend."""
    return _save(
        path,
        seed=seed,
        vae_widths=(8, 8, 8),
        unet={
            "block_out_channels": (16, 16),
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        },
        scheduler=make_scheduler(),
    )


def save_sd15_base(path: Path) -> Path:
    """Save a random base model in Stable Diffusion 1.5's own layout: a factor of 8, four U-Net levels, PNDM."""
    return _save(
        path,
        seed=0,
        vae_widths=(8, 8, 8, 8),
        unet={
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        },
        scheduler=PNDMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
    )


def _save(path: Path, *, seed: int, vae_widths: tuple[int, ...], unet: dict, scheduler: SchedulerMixin) -> Path:
    tokenizer = make_tokenizer(PROMPTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(vae_widths),
            up_block_types=("UpDecoderBlock2D",) * len(vae_widths),
            block_out_channels=vae_widths,
            layers_per_block=1,
            norm_num_groups=1,
            latent_channels=4,
            scaling_factor=0.5,  # not 1, so that a forgotten factor shows
        )
        net = UNet2DConditionModel(
            sample_size=4,
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
            **unet,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                projection_dim=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=net,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
    return path


def config(**changes: object) -> TrainConfig:
    """Return a run of a few steps, with `changes`."""
    few = {"dataset": "tiny", "steps": 6, "batch_size": 3, "local_steps": 2, "record_messages": 4, "eval_samples": 2}
    few |= {"published_key": 0}
    return TrainConfig(**(few | {"checkpoint_every": 2} | changes))


def draw(seed: int = 0) -> torch.Generator:
    """Return a fresh generator."""
    return torch.Generator().manual_seed(seed)


def update_truth(base: Base | None = None, *, n: int = 2, steps: int | None = None, seed: int = 0) -> UpdateTruth:
    """Draw a batch for a federated client: 8x8 pixels, or the base's latents with prompts and hints."""
    random = draw(seed)
    shape, lead = (n, 3, 8, 8) if base is None else (n, 4, 4, 4), () if steps is None else (steps,)
    prompts = tuple(PROMPTS[:n]) if base else ()
    return UpdateTruth(
        torch.rand(shape, generator=random) * 2 - 1,
        torch.randint(1000, (*lead, n), generator=random),
        torch.randn((*lead, *shape), generator=random),
        text=base.encode_prompts(prompts) if base else None,
        hint_latents=torch.randn(shape, generator=random) if base else None,
        prompts=prompts,
    )
