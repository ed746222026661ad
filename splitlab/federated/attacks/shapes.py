"""What a model's input looks like: told, or as its config, its attributes or its first convolution say."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from splitlab.core.errors import InputError
from splitlab.diffusion.denoisers import ControlledUNet
from splitlab.federated.update import Size, checked_size

SIZES = ("sample_size", "image_size", "img_resolution", "img_size", "input_size", "resolution")
CHANNELS = ("in_channels", "img_channels", "channels")
"""What a config or an attribute may be called; diffusers' own names come first."""


def input_size(model: nn.Module, size: Size | None = None) -> Size:
    """Return the size of a model's noisy inputs, `size` if it is given.

    Raises:
        InputError: the model does not say.
    """
    inner = model.unet if isinstance(model, ControlledUNet) else model
    told = _told(inner, SIZES) if size is None else size
    if told is None:
        raise InputError(
            f"this {type(inner).__name__} does not say the size of its input (sample_size is null or absent); "
            "say size=<height and width>, or size=(height, width)"
        )
    return checked_size(told, f"the size of this {type(inner).__name__}'s input")


def input_shape(model: nn.Module, *, size: Size | None = None, channels: int | None = None) -> tuple[int, int, int]:
    """Return (channels, height, width) of a model's noisy inputs.

    Args:
        model: the model.
        size, channels: what is known already.

    Raises:
        InputError: the model does not say what is missing.
    """
    size = input_size(model, size)
    width = channel_options(model)[0] if channels is None else channels
    if not isinstance(width, int) or width < 1:
        raise InputError(f"channels: expected a whole number of 1 or more, got {width!r}")
    return (width, size, size) if isinstance(size, int) else (width, *size)


def channel_options(model: nn.Module) -> list[int]:
    """Return how many channels a model's input may have: as it says, else what its convolutions take, in their order.

    Raises:
        InputError: it does not say, and has no convolution.
    """
    inner = model.unet if isinstance(model, ControlledUNet) else model
    if isinstance(told := _told(inner, CHANNELS), int):
        return [told]
    weights = ((getattr(module, "weight", None), getattr(module, "groups", 1)) for module in inner.modules())
    widths = [w.shape[1] * groups for w, groups in weights if isinstance(w, nn.Parameter) and w.ndim == 4]
    if not widths:
        raise InputError(f"this {type(inner).__name__} does not say the channels of its input; say channels=")
    return list(dict.fromkeys(widths))


def _told(model: nn.Module, names: tuple[str, ...]) -> Any:
    """Return the first of `names` that the config or an attribute gives a value."""
    config: Any = getattr(model, "config", None)
    told = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    values = (place.get(name) for place in (told, vars(model)) for name in names)
    return next((value for value in values if value is not None), None)
