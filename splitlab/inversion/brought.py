"""Attack a gradient that somebody brings: a safetensors file, parameter name -> gradient, and the model's directory."""

from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from splitlab import checkpoint
from splitlab.base import Base, load_base
from splitlab.base_files import load_model
from splitlab.controlnet import LatentHintControlNet
from splitlab.errors import InputError
from splitlab.federated import ControlledUNet, InversionKnowledge, plain_attention
from splitlab.inversion import INVERSIONS
from splitlab.seeds import generator
from splitlab.types import Callback
from splitlab.updates import read_update

CLASSES: dict[str, Any] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "LatentHintControlNet": LatentHintControlNet,
}
"""The models that can be attacked, by the `_class_name` in their config.json."""


def attack_gradient(
    path: str | Path,
    *,
    model: str | Path | nn.Module,
    attack: str = "unknown_noise",
    base: str | Path | Base | None = None,
    size: int | None = None,
    objective: str = "epsilon",
    alphas_cumprod: Tensor | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    batch_size: int | None = None,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    text: Tensor | None = None,
    hint_latents: Tensor | None = None,
    **options: Any,
) -> Any:
    """Run one attack on a shared gradient.

    Args:
        path: a safetensors file: parameter name -> gradient; splitlab's own files carry a header, others do not.
        model: the weights that the client started from: a directory written by `save_pretrained`, or the module.
        attack: a key of `INVERSIONS`.
        base: Stable Diffusion directory, for latent models (VAE, text model, schedule) and ControlNets.
        size: for a file without splitlab's header: height and width of the model's input; None: as its config says.
        objective: likewise: "epsilon" or "v_prediction".
        alphas_cumprod: `[T]`; None: the base's, else those of diffusers' DDPMScheduler.
        seed: of the attacker's draws.
        callback: told of progress.
        batch_size, timesteps, noise, text, hint_latents: facts that you grant the attacker, see `InversionKnowledge`.
        options: keyword arguments of the attack.

    Returns what the attack returns: an `Inversion`, `TimestepsFound` or `PromptsFound`.

    Raises:
        InputError: unknown attack, absent or unknown model, or a gradient that is not this model's (says how).
    """
    if attack not in INVERSIONS:
        raise InputError(f"attack {attack!r} is unknown; choose one of {', '.join(INVERSIONS)}")
    known = load_base(base) if isinstance(base, str | Path) else base
    module = model if isinstance(model, nn.Module) else _load_model(Path(model), known)
    if alphas_cumprod is None:
        alphas_cumprod = DDPMScheduler().alphas_cumprod if known is None else known.alphas_cumprod
    inner: Any = module.unet if isinstance(module, ControlledUNet) else module
    update = read_update(path, model=module, size=size or int(inner.config["sample_size"]), objective=objective)
    knowledge = InversionKnowledge(
        module, alphas_cumprod, known, batch_size, timesteps, noise, text=text, hint_latents=hint_latents
    )
    draw = generator("attack_gradient", attack, seed)
    return INVERSIONS[attack](update, knowledge, generator=draw, callback=callback, **options)


def _load_model(path: Path, base: Base | None) -> nn.Module:
    config = checkpoint.load_json(path / "config.json") if (path / "config.json").exists() else {}
    kind = str(config.get("_class_name"))
    if kind not in CLASSES:
        what = f"a {kind}" if config else "no model"
        raise InputError(f"{path}: {what}; name a directory that holds one of {', '.join(CLASSES)}")
    model: nn.Module = plain_attention(load_model(CLASSES[kind], path)).eval()
    if not isinstance(model, LatentHintControlNet):
        return model
    if base is None:
        raise InputError(f"{path}: a ControlNet stands in front of a U-Net; say base=<Stable Diffusion directory>")
    return ControlledUNet(plain_attention(base.unet), model)
