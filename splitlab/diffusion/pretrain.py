"""The public world: pre-train a tiny latent diffusion model, in diffusers layout, on the public splits only.

Three steps, each resumable: a VAE, whose latents are then standardised per channel (folded into its 1x1 quantisation
convolutions, so `scaling_factor` is 1), and a text-conditional U-Net with a CLIP text model, trained jointly.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from splitlab.core import checkpoint, storage
from splitlab.core.errors import InputError
from splitlab.core.schedule import cosine
from splitlab.core.seeds import generator
from splitlab.data.image_set import ImageSet, digest

MAX_TOKENS = 16
REPORT_EVERY = 50
WARM_UP = 200


@dataclass(frozen=True)
class PretrainConfig:
    """How the shipped base model is made.

    Attributes:
        seed: of every draw.
        vae_steps / vae_batch / vae_lr: optimisation of the autoencoder.
        vae_channels: widths of its three levels (8x8 latents for 32x32 images).
        unet_steps / unet_batch / unet_lr: optimisation of U-Net and text model.
        unet_channels: widths of its two levels.
        text_width: width of the text model.
        text_dropout: share of prompts dropped: half become "", for classifier-free guidance as pipelines do it, and
            half become zeros, for S1's hidden prompts.
        ema_decay: of the U-Net's and text model's averaged weights, which are the ones kept.
        shares: data set -> share of each batch.
        checkpoint_every: steps between checkpoints.
    """

    seed: int = 0
    vae_steps: int = 5500
    vae_batch: int = 16
    vae_lr: float = 1.5e-3
    vae_channels: Sequence[int] = (24, 48, 48)
    unet_steps: int = 6000
    unet_batch: int = 48
    unet_lr: float = 1.5e-3
    unet_channels: Sequence[int] = (32, 64)
    text_width: int = 64
    text_dropout: float = 0.12
    ema_decay: float = 0.995
    shares: dict[str, float] = field(default_factory=lambda: {"shapes": 0.6, "photos": 0.25, "digits": 0.15})
    checkpoint_every: int = 500


def pretrain(public: dict[str, ImageSet], out: Path, *, config: PretrainConfig, cache: Path) -> dict[str, list[float]]:
    """Train the base model on `public` (name -> public split) and save it to `out` as a `StableDiffusionPipeline`.

    Returns the loss curves, name -> loss every 50 steps. An interrupted call goes on from its last checkpoint in
    `cache` when called again with the same data and config.

    Raises:
        InputError: `out` exists and holds anything but an earlier base model of this function, or cannot be written.
    """
    with storage.whole_folder(out, "pretrain", apart={"cache": cache}) as folder:
        curves, models = _train(public, config, cache)
        with storage.writing(out):
            models.save_pretrained(folder)
    return curves


def _train(
    public: dict[str, ImageSet], config: PretrainConfig, cache: Path
) -> tuple[dict[str, list[float]], StableDiffusionPipeline]:
    """Train the autoencoder, then U-Net and text encoder; return the loss curves and the models."""
    key = digest({"config": config, "data": {name: data.digest for name, data in public.items()}})[:16]
    curves: dict[str, list[float]] = {}
    vae = make_vae(config)
    curves["vae"] = _train_vae(vae, public, config, cache / f"vae-{key}.safetensors")
    standardise(vae, public["shapes"].images[:1024])

    tokenizer = make_tokenizer(sorted({prompt for data in public.values() for prompt in data.prompts}))
    unet, text_encoder = make_unet(config), make_text_encoder(config, tokenizer)
    curves["unet"] = _train_unet(unet, text_encoder, tokenizer, vae, public, config, cache / f"unet-{key}.safetensors")
    return curves, pipeline(vae, unet, text_encoder, tokenizer)


def make_vae(config: PretrainConfig) -> AutoencoderKL:
    """Build the untrained autoencoder. One norm group keeps flat colours; the posterior starts almost sharp."""
    levels = len(config.vae_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.vae_channels),
            layers_per_block=1,
            norm_num_groups=1,
            latent_channels=4,
            sample_size=32,
            scaling_factor=1.0,
        )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
        vae.quant_conv.weight[4:] = 0.0
    return vae


def make_unet(config: PretrainConfig) -> UNet2DConditionModel:
    """Build the untrained U-Net, cross-attention at every level, initialised from the config's seed."""
    levels = len(config.unet_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=tuple(config.unet_channels),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * levels,
            up_block_types=("CrossAttnUpBlock2D",) * levels,
            cross_attention_dim=config.text_width,
            attention_head_dim=2,
            norm_num_groups=8,
        )


def make_tokenizer(prompts: Sequence[str]) -> CLIPTokenizer:
    """Fit CLIP's byte-pair encoding to `prompts`: every frequent word one token, other text in pieces."""
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,-'")
    return CLIPTokenizer(model_max_length=MAX_TOKENS).train_new_from_iterator(
        [*prompts, *alphabet], vocab_size=1024, show_progress=False
    )


def make_text_encoder(config: PretrainConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained CLIP text model for `tokenizer`, initialised from the config's seed."""
    width = config.text_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 2)
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                projection_dim=width,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def _train_vae(vae: AutoencoderKL, public: dict[str, ImageSet], config: PretrainConfig, state: Path) -> list[float]:
    """Fit the autoencoder to images and hints: squared error and a weak pull of the posterior to N(0, 1)."""
    pools = {name: torch.cat([data.images, data.need_hints()]) for name, data in public.items()}
    weights = {name: torch.tensor([3.0] * len(data) + [1.0] * len(data)) for name, data in public.items()}

    def step_loss(step: int) -> Tensor:
        draw = generator(config.seed, "vae", step)
        batch = []
        for name, n in _batch_shares(config.shares, config.vae_batch, draw).items():
            if n:
                chosen = torch.multinomial(weights[name], n, generator=draw)
                batch.append(_flip(pools[name][chosen], draw))
        images = torch.cat(batch)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draw)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        return F.mse_loss(reconstruction, images) + 1e-5 * kl

    vae.train()
    losses = _optimise("VAE", {"vae": vae}, step_loss, config.vae_steps, config.vae_lr, None, config, state)
    vae.eval().requires_grad_(False)
    return losses


def _train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    public: dict[str, ImageSet],
    config: PretrainConfig,
    state: Path,
) -> list[float]:
    """Fit U-Net and text model to predict the noise in the latents of the public images (Ho et al. 2020, eq. 14)."""
    pools = {name: _latents_of(vae, data.images, flips=name != "digits") for name, data in public.items()}
    tokens = {name: _tokens(tokenizer, data.prompts) for name, data in public.items()}
    scheduler, empty = make_scheduler(), _tokens(tokenizer, [""])

    def step_loss(step: int) -> Tensor:
        draw = generator(config.seed, "unet", step)
        latents, ids = [], []
        for name, n in _batch_shares(config.shares, config.unet_batch, draw).items():
            chosen = torch.randint(len(pools[name]), (n,), generator=draw)
            latents.append(pools[name][chosen])
            ids.append(tokens[name][chosen % len(tokens[name])])
        clean = torch.cat(latents)
        noise = torch.randn(clean.shape, generator=draw)
        timesteps = torch.randint(1000, (len(clean),), generator=draw)
        dropped = torch.rand(len(clean), 1, generator=draw) < config.text_dropout
        zeroed = dropped & (torch.rand(len(clean), 1, generator=draw) < 0.5)
        text = text_encoder(torch.where(dropped, empty, torch.cat(ids))).last_hidden_state * ~zeroed[..., None]
        noise_pred = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, text).sample
        return F.mse_loss(noise_pred, noise)

    modules: dict[str, nn.Module] = {"unet": unet.train(), "text": text_encoder.train()}
    averaged = {f"ema-{name}": copy.deepcopy(module) for name, module in modules.items()}
    losses = _optimise("U-Net", modules, step_loss, config.unet_steps, config.unet_lr, averaged, config, state)
    for name, module in modules.items():
        module.load_state_dict(averaged[f"ema-{name}"].state_dict())
        module.eval().requires_grad_(False)
    return losses


def _optimise(
    label: str,
    modules: dict[str, nn.Module],
    step_loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    averaged: dict[str, nn.Module] | None,
    config: PretrainConfig,
    state: Path,
) -> list[float]:
    """Run AdamW with warm-up and cosine decay from the last checkpoint on; return the mean loss of every 50 steps."""
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    held, start, losses = modules | (averaged or {}), 0, []
    if state.exists():
        tensors, _ = checkpoint.load(state, remedy=checkpoint.CACHED)
        checkpoint.restore_training_state(tensors, held, {"optimizer": optimizer})
        start, losses = int(tensors["step"]), tensors["losses"].tolist()
    for step in tqdm(range(start, steps), desc=label, initial=start, total=steps, mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = cosine(lr, step, steps, warm_up=WARM_UP)
        loss = step_loss(step)
        if not torch.isfinite(loss):
            raise InputError(f"{label}: the loss is {loss.item()} at step {step}; lower its learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        for name, module in (averaged or {}).items():
            _average(module, modules[name.removeprefix("ema-")], min(config.ema_decay, (1 + step) / (10 + step)))
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
            tensors = checkpoint.training_state(held, {"optimizer": optimizer})
            tensors |= {"step": torch.tensor(step + 1), "losses": torch.tensor(losses, dtype=torch.float64)}
            checkpoint.save(state, tensors, {"label": label})
    every = min(REPORT_EVERY, len(losses))
    return torch.tensor(losses, dtype=torch.float64).unfold(0, every, every).mean(1).tolist()


@torch.no_grad()
def _average(average: nn.Module, current: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def _batch_shares(shares: dict[str, float], batch: int, generator: torch.Generator) -> dict[str, int]:
    """Draw how many samples of each data set a batch holds."""
    chosen = torch.multinomial(torch.tensor(list(shares.values())), batch, replacement=True, generator=generator)
    return {name: int((chosen == index).sum()) for index, name in enumerate(shares)}


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.flip(-1) if torch.rand((), generator=generator) < 0.5 else images


@torch.no_grad()
def _latents_of(vae: AutoencoderKL, images: Tensor, *, flips: bool) -> Tensor:
    """Encode images (and, after all of them, their mirror images) to posterior means."""
    views = [images, images.flip(-1)] if flips else [images]
    return torch.cat([vae.encode(part).latent_dist.mean for view in views for part in view.split(128)])


def _tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    encoded = tokenizer(list(prompts), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    return encoded.input_ids


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold per-channel standardisation of the latents of `images` into (post_)quant_conv; scaling_factor is then 1."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(128)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    post = vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]
    quant = vae.quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # log-variances scale with the means


def make_scheduler() -> DDIMScheduler:
    """Return a DDIM sampler over Stable Diffusion's noise schedule (Rombach et al. 2022)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Assemble the pipeline in the layout that every diffusers user loads."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
