"""Gradients as people have them: files, dicts and lists of tensors or arrays, by name or in the parameters' order."""

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.formats import file_kind
from splitlab.diffusion.denoisers import ControlledUNet
from splitlab.federated.parameter_names import match_names
from splitlab.federated.update import some

Gradients = dict[str, Tensor]

Listed = list[Tensor | None]
"""In the order of parameters; None stands for one without a gradient."""

NUMBERED = re.compile(r"^(\D*)(\d+)$")
"""Names of arrays that stand in a list, as numpy's `arr_0`."""

IN_ORDER = "in the order of the model's parameters, as `[p.grad for p in model.parameters()]` or Flower's arrays are"


def read_gradient(source: Any, where: str) -> tuple[Gradients | Listed, Mapping[str, Any]]:
    """Read what was given: tensors by name, or a list of them, and what else a file says.

    Args:
        source: a safetensors or .npz file; or a mapping or sequence of tensors or arrays.
        where: how errors name it.

    Raises:
        InputError: it is another kind of file, or holds something else; pickled content is never opened.
    """
    meta: Mapping[str, Any] = {}
    if isinstance(source, str | Path):
        source, meta = _read_file(Path(source))
    elif isinstance(source, Tensor | np.ndarray):
        source = [source]
    if isinstance(source, Mapping):
        named = {str(name): _tensor(value, f"{where}: {name}") for name, value in source.items() if value is not None}
        numbers = {name: match for name in named if (match := NUMBERED.match(name))}
        if not named or len(numbers) < len(named) or len({match[1] for match in numbers.values()}) > 1:
            return named, meta
        return [named[name] for name in sorted(named, key=lambda name: int(numbers[name][2]))], meta
    if isinstance(source, Sequence):
        return [None if v is None else _tensor(v, f"{where}: entry {n}") for n, v in enumerate(source)], meta
    raise InputError(
        f"{where}: a {type(source).__name__} is no gradient; give a safetensors or .npz file, a dict or list of tensors"
    )


def _read_file(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if path.is_file() and file_kind(path) == "npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}, {}
        except (ValueError, OSError, zipfile.BadZipFile, EOFError, MemoryError) as error:
            raise InputError(
                f"{path}: damaged, or arrays of Python objects, which are never opened ({error}); save plain arrays: "
                "numpy.savez(path, **{name: gradient.numpy() ...})"
            ) from None
    tensors, meta = checkpoint.load(path)
    return tensors, meta if isinstance(meta, dict) else {}


def _tensor(value: Any, where: str) -> Tensor:
    """Return a value as a tensor on the CPU, of at most 32 bits if it is of a floating-point type."""
    if isinstance(value, Mapping):
        raise InputError(f"{where} holds names itself; give that mapping")
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"{where} is no array ({error})") from None
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        if array.dtype.kind not in "biuf":
            raise InputError(f"{where} is of type {array.dtype}, no number; save it as float32")
        array = array.astype(np.float64) if array.dtype.itemsize > 8 else array.astype(array.dtype.newbyteorder("="))
        value = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    if value.is_meta:
        raise InputError(f"{where} is on the meta device and has no values; give the gradient itself")
    value = value.detach().clone() if value.is_inference() else value.detach()
    value = (value.to_dense() if value.layout != torch.strided else value).cpu()
    kept = (torch.float32, torch.float16, torch.bfloat16)
    return value.float() if value.is_floating_point() and value.dtype not in kept else value


def by_parameter(read: Gradients | Listed, model: nn.Module, where: str) -> tuple[list[Gradients], tuple[str, ...]]:
    """Return gradients by the model's parameters, one per sample if they are per-sample gradients, and what was done.

    Raises:
        InputError: the names or shapes are not those of the model, or lie as another framework keeps them.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    words: tuple[str, ...] = ()
    if isinstance(read, list):
        named, words = _in_order(read, model, where)
    else:
        matched, words = match_names(read, model)
        named = {name: read[given] for given, name in matched.items()}
    known = [(value, shapes[name]) for name, value in named.items() if name in shapes]
    if known and len(known) == len(named) and any(value.shape != shape for value, shape in known):
        counts = {len(value) if value.shape[1:] == shape and value.ndim else 0 for value, shape in known}
        if counts != {0} and len(counts) == 1:
            n = counts.pop()
            each = [{name: value[index] for name, value in named.items()} for index in range(n)]
            return each, (*words, f"these are gradients of {n} samples, one by one; each is attacked by itself")
        _check_layout(named, shapes, where)
    return [named], words


def _check_layout(named: Gradients, shapes: Mapping[str, torch.Size], where: str) -> None:
    """Refuse arrays as TensorFlow and Flax keep them."""
    wrong = [name for name, value in named.items() if value.shape != shapes[name]]
    orders = {2: (1, 0), 4: (2, 3, 1, 0)}
    if all(
        named[name].ndim == len(shapes[name])
        and named[name].ndim in orders
        and tuple(shapes[name][axis] for axis in orders[named[name].ndim]) == tuple(named[name].shape)
        for name in wrong
    ):
        raise InputError(
            f"{where}: {some(wrong)} lie as TensorFlow and Flax keep weights ([in, out], [h, w, in, out]), not as "
            "PyTorch does; transpose them: kernel.T, kernel.transpose(3, 2, 0, 1)"
        )


def _in_order(values: Listed, model: nn.Module, where: str) -> tuple[Gradients, tuple[str, ...]]:
    """Name what came without names; a list of as many entries as there are parameters is taken for theirs."""
    parameters = {name: p for name, p in model.named_parameters() if not _is_frozen_part(model, name)}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if not _is_frozen_part(model, name)}
    sizes = [parameter.numel() for parameter in parameters.values()]
    if len(values) == 1 and values[0] is not None and values[0].shape == (sum(sizes),) and len(parameters) > 1:
        parts = zip(parameters.items(), values[0].split(sizes), strict=True)
        return {name: part.view_as(p) for (name, p), part in parts}, (f"one vector, cut {IN_ORDER}",)
    misfit = ""
    for names in (parameters, trained, state):
        if len(names) != len(values):
            continue
        pairs = [(n, names[n].shape, v) for n, v in zip(names, values, strict=True) if v is not None]
        wrong = [(n, s, v) for n, s, v in pairs if v.shape != s and v.shape[1:] != s]
        if not wrong:
            return {name: value for name, _, value in pairs if name in parameters}, (f"taken {IN_ORDER}",)
        name, shape, value = wrong[0]
        misfit = f", where entry of {name} is {tuple(value.shape)} instead of {tuple(shape)}"
    raise InputError(
        f"{where}: {len(values)} arrays without names{misfit}; this {type(model).__name__} has "
        f"{len(parameters)} parameters, {len(trained)} of them trained, {len(state)} entries with buffers: give them "
        f"{IN_ORDER}, or by name"
    )


def _is_frozen_part(model: nn.Module, name: str) -> bool:
    return isinstance(model, ControlledUNet) and not name.startswith("controlnet.")
