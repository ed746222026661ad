"""Atomic safetensors checkpoints: a file is either whole and of the state asked for, or absent."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from splitlab.errors import InputError


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
    """Write `tensors` and JSON-serialisable `meta` to `path`; an earlier file stays whole until the new one is.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # processes abreast may write the same cache entry
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"meta": json.dumps(meta)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot be written ({error}); free some disk space and run again: "
            "earlier checkpoints and outputs are intact"
        ) from None


def save_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file, keys sorted, so that equal content gives equal files."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run the stage that makes it (`dvc repro`)") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: damaged ({error}); run the stage that makes it again") from None
    return content


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the place of `path` only once the block has ended without an error.

    Raises:
        InputError: the disk is full or the folder cannot be written; what was at `path` is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); free some disk space and run again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read (tensors, meta) that `save` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run the stage that makes it again") from None


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
