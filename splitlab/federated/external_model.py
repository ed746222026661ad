"""Models that people bring: directories of diffusers' models, or modules of any code base, ready to be attacked."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, ModelMixin
from torch import Tensor, nn

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.diffusion.base_files import load_model, read_config
from splitlab.diffusion.controlnet import LatentHintControlNet
from splitlab.diffusion.denoisers import ControlledUNet, outputs, plain_attention, predict
from splitlab.federated.attacks.shapes import channel_options, input_shape
from splitlab.federated.attacks.time_layers import stand_in_facts
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.update import Size

WRAPPERS = ("_orig_mod", "module", "_module")
"""Where torch.compile, DistributedDataParallel and DataParallel, and Opacus keep the model that they wrap."""


@contextmanager
def plain_torch() -> Iterator[None]:
    """Have torch differentiate, in float32 on the CPU, whatever its caller has set; put that back at the end."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            if device.type != "cpu":
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        torch.set_default_dtype(dtype)


def external_model(model: str | Path | nn.Module, base: Base | None) -> nn.Module:
    """Return a model to attack: a copy in float32 on the CPU, in evaluation mode; a ControlNet in front of its U-Net.

    Args:
        model: a directory written by diffusers' `save_pretrained`, or a module.
        base: the models that a ControlNet stands in front of.

    Raises:
        InputError: no such model, pickled weights, or a ControlNet without a base.
    """
    module = _load(Path(model)) if isinstance(model, str | Path) else model
    if not isinstance(module, nn.Module):
        raise InputError(f"model: a {type(module).__name__}; give a directory or a torch.nn.Module")
    while name := next((name for name in WRAPPERS if _is_wrapper(module, name)), None):
        module = module.get_submodule(name)
    module = copy.deepcopy(module).cpu().float().eval()
    if isinstance(module, ControlNetModel):
        if base is None:
            raise InputError("a ControlNet stands in front of a U-Net; say base=<Stable Diffusion directory>")
        module = ControlledUNet(copy.deepcopy(base.unet), module)
    plain_attention(module)
    _without_checkpoints(module)
    return module


def _without_checkpoints(module: nn.Module) -> None:
    """Have blocks that checkpoint their `_forward` call it, in place.

    guided-diffusion and latent diffusion do so by a function of their own, in attention always, whose second derivative
    is silently wrong.
    """
    for part in module.modules():
        code = getattr(type(part).forward, "__code__", None)
        if code and "checkpoint" in code.co_names and hasattr(part, "_forward"):
            part.forward = part._forward  # type: ignore[assignment]


def _is_wrapper(module: nn.Module, name: str) -> bool:
    """Say whether a module has another and nothing else: no weight, and a name that wrappers use."""
    return [key for key, _ in module.named_children()] == [name] and not list(module.named_parameters(recurse=False))


def _load(path: Path) -> nn.Module:
    if (path / "model_index.json").exists():
        raise InputError(f"{path}: a whole pipeline; name the folder of its denoiser, such as {path / 'unet'}")
    if not (path / "config.json").exists():
        raise InputError(
            f"{path}: no model; name a directory that diffusers' save_pretrained wrote, or give the torch.nn.Module"
        )
    kind = str(read_config(path / "config.json").get("_class_name"))
    ours = {"LatentHintControlNet": LatentHintControlNet}
    loaded = ours.get(kind) or getattr(diffusers, kind, None)
    if not isinstance(loaded, type) or not issubclass(loaded, ModelMixin):
        raise InputError(f"{path}: a {kind}, no model of diffusers; load it yourself and give the torch.nn.Module")
    return load_model(loaded, path)


def check_called(knowledge: InversionKnowledge, size: Size) -> tuple[InversionKnowledge, tuple[str, ...]]:
    """Try the model at both ends of the schedule.

    Returns the knowledge, with the number of channels, and a `call` if timesteps have to be floats; and words.

    Raises:
        InputError: it cannot be called; the reason is its own.
    """
    kind, last = type(knowledge.model).__name__, len(knowledge.alphas_cumprod) - 1
    options = channel_options(knowledge.model) if knowledge.channels is None else [knowledge.channels]
    failures = []
    for channels, call in itertools.product(options, (knowledge.call, _with_floats(knowledge))):
        shape = input_shape(knowledge.model, size=size, channels=channels)
        facts = stand_in_facts(knowledge, shape, 2)
        try:
            with torch.no_grad():
                prediction = outputs(knowledge.model, torch.zeros(2, *shape), torch.tensor([0, last]), facts, call=call)
            width = prediction.shape[1]
            words = f"{width} channels are predicted; the loss is taken to be the first {channels}' squared error"
            return replace(knowledge, channels=channels, call=call), (words,) if width > channels else ()
        except InputError as error:
            failures.append(str(error))
        except Exception as error:  # whatever foreign code raises
            failures.append(
                f"a {kind} cannot be called with noisy inputs {[2, *shape]} and timesteps [0, {last}] "
                f"({type(error).__name__}: {error!s:.300}); check size=, channels=, granted facts and the "
                "length of alphas_cumprod, or say call=<function (model, noisy, timesteps) -> prediction>"
            )
    raise InputError(failures[0])


def _with_floats(knowledge: InversionKnowledge) -> Any:
    def call(model: nn.Module, noisy: Tensor, timesteps: Tensor, **facts: Any) -> Tensor:
        return predict(model, noisy, timesteps.float(), **facts, call=knowledge.call)

    return call
