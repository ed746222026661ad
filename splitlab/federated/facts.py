"""Facts that people grant an attacker, as they have them: numbers, lists, arrays or tensors, made into tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base

SHAPES = {"noise": "b c h w", "hint_latents": "b c h w", "text": "b l d"}


def checked_schedule(value: Any) -> Tensor:
    """Return ᾱ of a noise schedule `[T]` float32.

    Raises:
        InputError: it is no falling sequence of numbers in [0, 1].
    """
    alphas = _floats(getattr(value, "alphas_cumprod", value), "alphas_cumprod")
    falls = alphas.ndim == 1 and len(alphas) > 1 and bool((alphas.diff() <= 0).all())
    if not falls or not (float(alphas[0]) <= 1 and float(alphas[-1]) >= 0):
        raise InputError(
            "alphas_cumprod: expected [T] numbers that fall from 1 or less to 0 or more, as schedulers have them, "
            f"got {list(alphas.shape)}: {alphas.flatten()[:3].tolist()}…"
        )
    return alphas


def whole_numbers(value: Any, name: str, *, below: int | None = None) -> Tensor:
    """Return whole numbers of 0 or more `[n]` int64, from one or several.

    Raises:
        InputError: they are something else, or one is `below` or more.
    """
    numbers = _floats(value, name, dtype=torch.float64).reshape(-1)
    if not len(numbers) or not bool((numbers == numbers.round()).all()):
        raise InputError(f"{name}: expected whole numbers, got {value!r:.80}")
    if bool((numbers < 0).any()) or (below is not None and bool((numbers >= below).any())):
        raise InputError(f"{name}: expected numbers from 0 to {'…' if below is None else below - 1}, got {value!r:.80}")
    return numbers.long()


def batch_of(value: Any, name: str) -> Tensor:
    """Return `noise`, `hint_latents` or `text` with a leading axis for the samples, float32.

    Raises:
        InputError: no numbers, not finite, or of another number of axes.
    """
    tensor, axes = _floats(value, name), SHAPES[name]
    tensor = tensor[None] if tensor.ndim == len(axes.split()) - 1 else tensor
    if tensor.ndim != len(axes.split()):
        raise InputError(f"{name}: expected [{axes.replace(' ', ', ')}], got {list(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name}: it holds NaN or infinity; give the values as they were used")
    return tensor


def embedded(text: Any, base: Base | None) -> Tensor:
    """Return text embeddings `[b, l, d]`: as given, or of prompts by the base's text model.

    Raises:
        InputError: prompts without a base, or see `batch_of`.
    """
    prompts = [text] if isinstance(text, str) else text
    if isinstance(prompts, list | tuple) and all(isinstance(prompt, str) for prompt in prompts):
        if base is None:
            raise InputError("text: prompts need base=<Stable Diffusion directory> to embed them; or give embeddings")
        return base.encode_prompts(prompts)
    return batch_of(text, "text")


def _floats(value: Any, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().to(dtype, copy=True)  # a copy, which is no inference tensor
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        value = [part.detach().cpu().float().numpy() for part in value]
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return torch.as_tensor(np.asarray(value, dtype=np.float64)).to(dtype)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected numbers, got {value!r:.80}") from None
