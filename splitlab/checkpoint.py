"""Atomic safetensors checkpoints: a file is either whole and of the state asked for, or absent."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from splitlab.errors import InputError
from splitlab.formats import describe_file


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Give a file to write that takes the place of `path` only once the block has ended without an error.

    Args:
        path: what is to appear, whole or not at all; an earlier file stays until then.
        private: only its owner may read it (mode 0600), from its first byte on.

    Raises:
        InputError: the disk is full, or the folder cannot be written; what was at `path` is still there.
    """
    partial = path.parent / f".partial-{secrets.token_hex(8)}"  # of one length, whatever the name; of one process
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)  # some writers replace the file by one of their own mode
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); {_remedy(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Have the system write a file's or folder's content out before the next step relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


REMEDIES = {
    errno.ENOSPC: "the disk is full: free some disk space and run again",
    errno.EDQUOT: "the quota is used up: free some disk space and run again",
    errno.EFBIG: "a file may not be that large here: name a place on another disk, or raise the limit",
    errno.EROFS: "the disk is read-only: name another place",
    errno.EACCES: "permission is missing: name a place that you may write to",
    errno.EPERM: "permission is missing: name a place that you may write to",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ENOTDIR: "a part of its path is a file: name another place",
    errno.EEXIST: "a part of its path is a file: name another place",
    errno.EISDIR: "there is a folder of that name: give another name",
}


def _remedy(error: Exception) -> str:
    """Say what to do about a failed write; the safetensors library gives the system's number in its words only."""
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else 0
    words = REMEDIES.get(number or 0, "check that place and run again")
    return f"{words}; earlier checkpoints and outputs are intact"


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
def whole_folder(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Give a folder to fill that takes the place of `path` only once the block has ended without an error.

    Args:
        path: the folder.
        private: only its owner may open it (mode 0700).

    Raises:
        InputError: the disk is full or the folder cannot be written; what was at `path` is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700 if private else 0o777)
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
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error of a file that should hold safetensors: what it is by its bytes, and what to do."""
    try:
        return InputError(f"{path}: damaged, or not safetensors ({error}): it is {describe_file(path)}")
    except OSError:
        return InputError(f"{path}: cannot be read ({error}); check its permissions and its disk")


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
