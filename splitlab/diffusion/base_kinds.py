"""Which base models serve: told from their configuration, before any weight is read."""

import math
import warnings
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPTextConfig, CLIPTokenizer

from splitlab.core.errors import InputError, brief
from splitlab.diffusion.base_files import CONVERT, PICKLES, read_config

PARTS = {
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (),
}
"""Parts of a base, and the classes they may have; schedulers: see `load_scheduler`."""

SPARE = ("safety_checker", "feature_extractor", "image_encoder", "controlnet")
"""Parts that a base may have and that are not read."""

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "LatentHintPipeline",
)
"""Pipelines whose parts are those of Stable Diffusion 1.x; what the U-Net takes is looked at by itself."""

OTHERS = {
    "StableDiffusionXL": "SDXL has two text encoders and is conditioned on sizes",
    "StableDiffusion3": "it is a transformer trained by flow matching",
    "Flux": "it is a transformer trained by flow matching",
    "PixArt": "it is a transformer on T5 embeddings",
    "Kandinsky": "its U-Net is conditioned on image embeddings",
    "UnCLIP": "its U-Net is conditioned on image embeddings",
    "StableUnCLIP": "its U-Net is conditioned on image embeddings",
    "IF": "it works on pixels, without a VAE",
    "LatentConsistency": "it is distilled to a few steps and takes the guidance scale as an input",
    "StableDiffusionInstructPix2Pix": "it edits images: its U-Net takes a second image",
    "StableDiffusionUpscale": "it enlarges images: its U-Net takes a second image",
    "StableDiffusionDepth2Img": "its U-Net takes a depth map",
}
"""Why other pipelines do not serve, by how their names begin."""

UNET = {
    "addition_embed_type": (None, "it takes further embeddings, as SDXL and Kandinsky do"),
    "class_embed_type": (None, "it is class-conditional"),
    "num_class_embeds": (None, "it is class-conditional"),
    "time_cond_proj_dim": (None, "it takes the guidance scale as an input: a distilled model (LCM)"),
    "encoder_hid_dim": (None, "it projects what conditions it, as DeepFloyd IF and Kandinsky do"),
    "encoder_hid_dim_type": (None, "it projects what conditions it, as DeepFloyd IF and Kandinsky do"),
    "attention_type": ("default", "its attention takes more than prompts (GLIGEN)"),
    "dual_cross_attention": (False, "it attends to two texts at once"),
    "time_embedding_type": ("positional", "a ControlNet cannot copy its time embedding"),
    "conv_in_kernel": (3, "a ControlNet cannot copy its first convolution"),
    "center_input_sample": (False, "a ControlNet does not centre its input"),
    "time_embedding_dim": (None, "a ControlNet cannot copy its time embedding"),
    "time_embedding_act_fn": (None, "a ControlNet cannot copy its time embedding"),
    "timestep_post_act": (None, "a ControlNet cannot copy its time embedding"),
    "resnet_skip_time_act": (False, "a ControlNet cannot copy its residual blocks"),
    "cross_attention_norm": (None, "a ControlNet cannot copy its attention"),
}
"""Entries of a U-Net's configuration that must be as given; the default is taken for absent ones."""

SCHEDULERS = {kind.name for kind in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
"""Samplers of one kind of noise schedule, which is given by betas."""

LORA = "pytorch_lora_weights.safetensors"

BETAS = ("beta_start", "beta_end", "beta_schedule")

NO_SIGNAL = "from a last timestep without signal no noise prediction leads to an image; a model so trained predicts v"


def check_kind(folder: Path) -> None:
    """Check that a folder holds a noise-predicting Stable Diffusion 1.x model, as far as its configuration tells.

    Raises:
        InputError: it does not; the message says what it is instead.
    """
    if not (folder / "model_index.json").exists() and not (folder / "unet").is_dir():
        raise InputError(_what_else(folder))
    try:
        _check_configurations(folder)
    except (TypeError, AttributeError, LookupError) as error:  # lists for numbers, texts for mappings, and the like
        raise InputError(f"{folder}: its configuration has entries of no type they can have ({brief(error)})") from None
    if (folder / LORA).exists():
        warnings.warn(f"{folder / LORA}: not read; the base is the model without it", stacklevel=3)


def _check_configurations(folder: Path) -> None:
    index = read_config(folder / "model_index.json") if (folder / "model_index.json").exists() else None
    if index is not None:
        _check_index(index, folder / "model_index.json")
    configs = {part: read_config(folder / part / "config.json") for part in ("vae", "unet", "text_encoder")}
    for part, config in configs.items():
        kind = config.get("_class_name", PARTS[part][0])
        if kind not in PARTS[part]:
            raise InputError(f"{folder / part}: its class is {kind}; Stable Diffusion 1.x has {PARTS[part][0]}")
        if config.get("quantization_config"):
            raise InputError(f"{folder / part}: quantised weights do not serve; use the model as it was before")
    text = configs["text_encoder"]
    if text.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
        raise InputError(
            f"{folder / 'text_encoder'}: model_type is {text['model_type']}; Stable Diffusion 1.x has CLIP's"
        )
    _check_vae(configs["vae"], folder / "vae")
    width = (text.get("text_config") or text).get("hidden_size", 512)
    _check_unet(configs["unet"], configs["vae"].get("latent_channels", 4), width, folder / "unet")


def _what_else(folder: Path) -> str:
    """Say what a folder is that holds no base model."""
    names = sorted(path.name for path in folder.iterdir())
    kind = read_config(folder / "config.json") if "config.json" in names else {}
    inner = [name for name in names if (folder / name / "model_index.json").exists()]
    need = "a base needs the folders vae, unet, text_encoder, tokenizer and scheduler"
    if inner:
        return f"{folder}: the model is one folder further down: name {folder / inner[0]}"
    if (folder / "snapshots").is_dir():
        return f"{folder}: a hub cache entry; name the hub id, or a folder below {folder / 'snapshots'}"
    if kind:
        what = kind.get("_class_name") or ", ".join(kind.get("architectures") or ["model"])
        return f"{folder}: {what} alone; {need}"
    if any("lora" in name.lower() or name == "adapter_config.json" for name in names):
        return f"{folder}: LoRA weights, which are added to a base and are none; {need}"
    if single := [name for name in names if name.endswith((".safetensors", *PICKLES))]:
        return single_file(folder / single[0])
    return f"{folder}: no diffusers model ({', '.join(names[:6]) or 'it is empty'}); {need}"


def single_file(path: Path) -> str:
    """Say how to convert a model that is one file."""
    if path.suffix not in (".safetensors", *PICKLES):
        return f"{path}: a file; name a folder (an archive is unpacked first)"
    if path.suffix in PICKLES:
        return (
            f"{path}: pickled. Opening it runs its code, so it is never read here. Where you trust it, convert it: "
            + CONVERT.replace("from_pretrained('<its folder>', use_safetensors=False)", f"from_single_file('{path}')")
        )
    return (
        f"{path}: one file, without the configuration and the tokenizer that a base needs. Where there is a network, "
        f"`python -c \"from diffusers import StableDiffusionPipeline as P; P.from_single_file('{path}')"
        ".save_pretrained('<new folder>')\"` makes a folder of it: name that"
    )


def _check_index(index: dict[str, Any], path: Path) -> None:
    name = index.get("_class_name", PIPELINES[0])
    name = str(name[-1] if isinstance(name, list) else name)
    if name not in PIPELINES:
        reason = next((f": {why}" for start, why in OTHERS.items() if name.startswith(start)), "")
        raise InputError(f"{path}: it is for {name}, not for Stable Diffusion 1.x{reason}")
    parts = {
        part: entry[-1]
        for part, entry in index.items()
        if isinstance(entry, list) and entry and not part.startswith("_")
    }
    for part, kind in parts.items():
        if part not in PARTS and part not in SPARE and kind is not None:
            raise InputError(f"{path}: it has a {part} ({kind}), which Stable Diffusion 1.x has not")
    for part, kinds in PARTS.items():
        if parts.get(part) is None:
            raise InputError(f"{path}: it has no {part}; use a complete model")
        if kinds and parts[part] not in kinds:
            raise InputError(f"{path}: the class of its {part} is {parts[part]}; Stable Diffusion 1.x has {kinds[0]}")


def _check_vae(config: dict[str, Any], where: Path) -> None:
    if type(config.get("latent_channels", 4)) is not int:
        raise InputError(f"{where}: latent_channels is {config['latent_channels']!r}; it is a whole number")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise InputError(f"{where}: {key} is {config[key]}; a VAE of colour images has 3")
    if any(config.get(key) for key in ("shift_factor", "latents_mean", "latents_std")):
        raise InputError(
            f"{where}: its latents are shifted (shift_factor, latents_mean): not a Stable Diffusion 1.x VAE"
        )
    factor = config.get("scaling_factor", 1.0)
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise InputError(f"{where}: scaling_factor is {factor!r}; it is a positive number (Stable Diffusion: 0.18215)")


def _check_unet(config: dict[str, Any], latent: int, width: int, where: Path) -> None:
    for key, (right, reason) in UNET.items():
        if (value := config.get(key, right)) != right:
            raise InputError(f"{where}: {key} is {value!r}: {reason}; Stable Diffusion 1.x is needed")
    taken, given = config.get("in_channels", 4), config.get("out_channels", 4)
    if taken != latent:
        more = {latent + 5: "it fills holes in images (inpainting)", 2 * latent: "it edits images (instruct-pix2pix)"}
        why = more.get(taken, "parts of two models, or it takes more than latents")
        raise InputError(f"{where}: it takes {taken} channels, the VAE's latents have {latent}: {why}")
    if given != latent:
        why = "it predicts a variance as well" if given == 2 * latent else "parts of two models"
        raise InputError(f"{where}: it returns {given} channels, the VAE's latents have {latent}: {why}")
    attended = config.get("cross_attention_dim", 1280)
    if any(dim != width for dim in (attended if isinstance(attended, list) else [attended])):
        raise InputError(
            f"{where}: it attends to texts of width {attended}, the text model's have {width}: parts of two models"
        )


def load_scheduler(folder: Path) -> DDIMScheduler | PNDMScheduler:
    """Load the noise schedule of a base and a sampler without randomness.

    Other samplers of the same kind of schedule are replaced by DDIM, which a warning says.

    Raises:
        InputError: flow matching, another prediction than noise, or a schedule that noise prediction cannot use.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_config(path)
    index = read_config(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    name = str(index.get("scheduler", [None, config.get("_class_name", "DDIMScheduler")])[-1])
    if "Flow" in name or config.get("use_flow_sigmas"):
        raise InputError(
            f"{path}: {name} is for flow matching, which predicts no noise; Stable Diffusion 1.x is needed"
        )
    if name not in SCHEDULERS:
        raise InputError(f"{path}: {name} is no sampler of Stable Diffusion's kind of schedule, as DDIMScheduler is")
    predicted = config.get("prediction_type", "epsilon")
    if predicted != "epsilon":
        raise InputError(f"{path}: it predicts {predicted!r}; S1 needs a noise-predicting ('epsilon') model")
    if config.get("rescale_betas_zero_snr"):
        raise InputError(f"{path}: rescale_betas_zero_snr is set: {NO_SIGNAL}. If this one was not, set it to false")
    if missing := [key for key in BETAS if key not in config and not config.get("trained_betas")]:
        raise InputError(f"{path}: it does not say {', '.join(missing)}, and no other schedule is the model's")
    if name != "DDIMScheduler":
        config = {"set_alpha_to_one": False} | config
    config |= {"clip_sample": False, "steps_offset": 1}  # as StableDiffusionPipeline has them, whatever the file says
    if name not in ("DDIMScheduler", "PNDMScheduler"):
        warnings.warn(f"{path}: sampling is by DDIM on the schedule of its {name}", stacklevel=4)
        name = "DDIMScheduler"
    try:
        getattr(diffusers, name).from_config(config).set_timesteps(50)
        scheduler = getattr(diffusers, name).from_config(config)
    except Exception as error:  # whatever a wrong entry leads to
        raise InputError(f"{path}: no schedule can be made of it ({brief(error)})") from None
    _check_schedule(scheduler, path)
    return scheduler


def _check_schedule(scheduler: DDIMScheduler | PNDMScheduler, path: Path) -> None:
    alphas, config = scheduler.alphas_cumprod, scheduler.config
    if float(alphas[-1]) == 0:
        raise InputError(f"{path}: the betas leave no signal at the end: {NO_SIGNAL}")
    if not (len(alphas) == config.num_train_timesteps == 1000):
        raise InputError(
            f"{path}: {config.num_train_timesteps} timesteps with {len(alphas)} betas; the timesteps that splitlab's "
            "defences and tables speak of are those of Stable Diffusion's 1000"
        )
    inside = alphas.isfinite().all() and alphas[0] < 1 and alphas[-1] > 0
    if not (inside and (alphas.diff() < 0).all()):
        raise InputError(f"{path}: the signal that is left (alphas_cumprod) does not fall from 1 to 0: check the betas")


def load_tokenizer(folder: Path, text: CLIPTextConfig) -> CLIPTokenizer:
    """Load a tokenizer that fits its text model: no longer prompts, no further tokens.

    Raises:
        InputError: files are missing or damaged, or it has tokens that the text model does not know.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise InputError(f"{folder}: no tokenizer; it needs tokenizer.json, or vocab.json and merges.txt")
    config = read_config(folder / "tokenizer_config.json") if "tokenizer_config.json" in names else {}
    kind = config.get("tokenizer_class", "CLIPTokenizer")
    if kind not in PARTS["tokenizer"]:
        raise InputError(f"{folder}: its class is {kind}; Stable Diffusion 1.x has CLIPTokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the libraries raise many types
        raise InputError(f"{folder}: no tokenizer can be made of it ({brief(error)})") from None
    highest, known = max(tokenizer.get_vocab().values(), default=-1), text.vocab_size
    if not 0 <= highest < known:
        raise InputError(
            f"{folder}: its tokens are numbered up to {highest}, the text model knows {known}: parts of two models, or "
            "tokens were added to the tokenizer alone"
        )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: it has no tokens for a text's start and end; use the text model's own tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as in Stable Diffusion 1.x
    length = tokenizer.model_max_length
    if not isinstance(length, int | float) or not length >= 3:
        raise InputError(f"{folder}: model_max_length is {length!r}; it is a number of tokens")
    tokenizer.model_max_length = int(min(length, text.max_position_embeddings))
    return tokenizer


def square(folder: Path, default: int) -> dict[str, int]:
    """Return a whole `sample_size` in place of one that is a list (the smaller edge) or no size (`default`)."""
    size = read_config(folder / "config.json").get("sample_size")
    edges = [edge for edge in (size if isinstance(size, list) else [size]) if type(edge) is int and edge > 0]
    return {} if edges == [size] else {"sample_size": min(edges, default=default)}
