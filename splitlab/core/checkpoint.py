"""Atomic safetensors checkpoints: a file is either whole and of the state asked for, or absent."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from splitlab.core.errors import InputError
from splitlab.core.formats import describe_file
from splitlab.core.storage import whole_file

MAX_JSON_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 32 * 2**20
OTHER = "name a file that splitlab wrote"
REMADE = "move it aside and run the stage that makes it (`dvc repro`)"
"""What to do about an output of the pipeline that is not what it was."""

CACHED = "it holds saved work and nothing else: move it aside and run again"
"""What to do about such a cache or checkpoint. A file that somebody brought is described instead."""


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, object], *, private: bool = False) -> None:
    """Write `tensors` and JSON-serialisable `meta` to `path`; an earlier file stays whole until the new one is.

    Args:
        path: a safetensors file.
        tensors: by name.
        meta: what to keep beside them.
        private: see `whole_file`.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    with whole_file(path, private=private) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"meta": json.dumps(meta)})


def save_json(path: Path, content: Mapping[str, object], *, private: bool = False) -> None:
    """Write a JSON file, keys sorted, so that equal content gives equal files; see `whole_file`."""
    with whole_file(path, private=private) as partial:
        partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def load_json(path: Path, *needed: str) -> dict[str, Any]:
    """Read a JSON file that splitlab wrote: keys and values.

    Args:
        path: the file.
        needed: keys that it must have.

    Raises:
        InputError: it is missing, damaged, larger than any that splitlab writes, or lacks a key.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        content = None if len(text) > MAX_JSON_BYTES else json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run the stage that makes it (`dvc repro`)") from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); {REMADE}") from None
    if len(text) > MAX_JSON_BYTES:
        raise InputError(f"{path}: more than the {MAX_JSON_BYTES} bytes that splitlab ever writes; {REMADE}")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, got {type(content).__name__}; {REMADE}")
    missing = [name for name in needed if name not in content]
    if missing:
        raise InputError(f"{path}: it lacks {', '.join(missing)}; {REMADE}")
    return content


def load(path: Path, *, remedy: str = "") -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read (tensors, meta) that `save` wrote.

    Args:
        path: a safetensors file.
        remedy: what to do if it is damaged: `REMADE` or `CACHED`. "": it may be anybody's: say what it is instead.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        _check_size(path)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("meta", "{}")
            meta = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError, RecursionError) as error:
        raise unreadable(path, error, remedy) from None
    if not isinstance(meta, dict):
        raise InputError(f"{path}: what it says of itself is {type(meta).__name__}, not keys and values; {OTHER}")
    return tensors, meta


def _check_size(path: Path) -> None:
    """Refuse what would take more memory than there is, before any of it is taken."""
    size, free = path.stat().st_size, psutil.virtual_memory().available
    if path.is_file() and size > free:
        raise InputError(f"{path}: {size} bytes, and {free} bytes of memory are free; use a larger machine")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if MAX_HEADER_BYTES < header < size:
        raise InputError(f"{path}: a header of {header} bytes, more than any file of weights has; name the right file")


def unreadable(path: Path, error: Exception, remedy: str = "") -> InputError:
    """Return the error of a file that should hold safetensors: what it is by its bytes, and what to do; see `load`."""
    try:
        told = f"damaged ({error}); {remedy}" if remedy else f"damaged, or not safetensors ({error}): it is "
        return InputError(f"{path}: {told}{'' if remedy else describe_file(path)}")
    except OSError:
        return InputError(f"{path}: cannot be read ({error}); check its permissions and its disk")


def field(
    tensors: Mapping[str, Tensor],
    name: str,
    axes: int,
    dtypes: Sequence[torch.dtype],
    where: object,
    *,
    finite: bool = True,
) -> Tensor:
    """Return a named tensor of what was read, if it is what it should be.

    Args:
        tensors: what was read.
        name: whose.
        axes: how many it must have.
        dtypes: those it may have.
        where: the file or message, for the error.
        finite: NaN and infinity are refused.

    Raises:
        InputError: it is missing, of another type or another number of axes, or not finite.
    """
    if name not in tensors:
        raise InputError(f"{where}: it lacks {name}; {OTHER}")
    value = tensors[name]
    if value.ndim != axes or value.dtype not in dtypes:
        raise InputError(
            f"{where}: {name} is {value.dtype} of shape {tuple(value.shape)}; expected {axes} axes of "
            f"{' or '.join(str(dtype) for dtype in dtypes)}"
        )
    if finite and value.is_floating_point() and not torch.isfinite(value).all():
        raise InputError(f"{where}: {name} holds NaN or infinity; check the data and the learning rate it came from")
    return value


def training_state(
    modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Flatten weights and optimiser states to named tensors, `<name>/<entry>`."""
    assert not set(modules) & set(optimizers), "a module and an optimiser of one name would be mixed up"
    state = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            state |= {f"{name}/{index}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    return {key: value.detach().clone() for key, value in state.items()}


def restore_training_state(
    state: Mapping[str, Tensor], modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> None:
    """Put back what `training_state` flattened, in place."""
    for name, module in modules.items():
        module.load_state_dict(_entries(state, name))
    for name, optimizer in optimizers.items():
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _entries(state, name).items():
            index, slot = key.split("/")
            slots.setdefault(int(index), {})[slot] = value.clone()
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def _entries(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
