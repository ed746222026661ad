"""Models from folders that people bring: safetensors only, every tensor there, in float32, or one error."""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from splitlab.core.errors import InputError, brief

Model = TypeVar("Model", bound=nn.Module)

VARIANTS = ("", "fp32", "fp16", "bf16", "ema", "non_ema")
"""File variants, the first of a folder's is loaded; "" is the plain name, and any other comes last."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Endings of files that run code when they are opened; no such file is."""

CONVERT = (
    "`python -c \"from diffusers import StableDiffusionPipeline as P; P.from_pretrained('<its folder>', "
    "use_safetensors=False).save_pretrained('<new folder>')\"` (a single model: its own class in place of the pipeline)"
)

NOT_READ = re.compile(r"(^|\.)position_ids$|^(vision_model|visual_projection|text_projection|logit_scale)\b")
"""Tensors of a text model's file that its hidden states do not depend on: old buffers, CLIP's other half."""


def load_model(kind: type[Model], folder: Path, **config: Any) -> Model:
    """Load a diffusers or transformers model that `save_pretrained` wrote, in float32 and evaluation mode.

    Weights of 16 bits, shards and, where there is nothing else, files of a variant (`*.fp16.safetensors`; a warning
    says so) are read as well. Pickled files are never opened.

    Args:
        kind: the class.
        folder: with config.json and safetensors files.
        config: entries of the configuration to replace.

    Raises:
        InputError: no configuration or weights, damaged files, missing, unexpected, misshapen or non-finite tensors.
    """
    name = "model" if issubclass(kind, PreTrainedModel) else "diffusion_pytorch_model"
    read_config(folder / "config.json")
    variant, files = choose_weights((path.name for path in folder.iterdir()), name, folder)
    check_files([folder / file for file in files])
    if variant:
        warnings.warn(f"{folder}: there are weights of the variant {variant!r} only; they are loaded", stacklevel=2)
    options: dict[str, Any] = {} if name == "model" else {"low_cpu_mem_usage": False}
    options |= {"variant": variant or None, "use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
    try:
        # Misshapen and missing tensors come back as a list, to be refused below with their names.
        model, found = kind.from_pretrained(  # type: ignore[attr-defined]
            str(folder), output_loading_info=True, ignore_mismatched_sizes=True, **options, **config
        )
    except Exception as error:  # the libraries raise many types
        raise InputError(f"{folder}: no {kind.__name__} can be made of it ({brief(error)})") from None
    _check_tensors(model, found, folder / files[0])
    return model.eval()


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file that a model's folder must have.

    Raises:
        InputError: it is missing, damaged or no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); the model is incomplete") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); get it again from where the model came from") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: a mapping is expected, not {content!r:.60}; the file belongs to something else")
    return content


def choose_weights(names: Iterable[str], name: str, where: Path | str) -> tuple[str, list[str]]:
    """Choose which of the files of a model's folder are its weights.

    Args:
        names: the files.
        name: what the library calls weights: "diffusion_pytorch_model" or "model".
        where: the folder, for the error.

    Returns the variant ("" for the plain names) and the files; an index of shards comes first.

    Raises:
        InputError: there are none; where they are pickled, the error says how to convert them.
    """
    names, shard = sorted(names), r"(?:-\d+-of-\d+)?"
    pattern = re.compile(
        rf"{name}{shard}(?:\.(?P<variant>[^.]+?))?{shard}\.safetensors|{name}\.safetensors\.index(?:\.(?P<index>[^.]+))?\.json"
    )
    groups: dict[str, list[str]] = {}
    for match in filter(None, map(pattern.fullmatch, names)):
        groups.setdefault(match["variant"] or match["index"] or "", []).append(match[0])
    rank = {variant: number for number, variant in enumerate(VARIANTS)}
    for variant in sorted(groups, key=lambda variant: (rank.get(variant, len(rank)), variant)):
        files = sorted(groups[variant], key=lambda file: not file.endswith(".json"))
        if files[0].endswith(".json") or (len(files) == 1 and "-of-" not in files[0]):
            return variant, files
    if groups:
        raise InputError(f"{where}: shards without their index ({name}.safetensors.index.json); get it as well")
    if pickled := [file for file in names if file.endswith(PICKLES)]:
        raise InputError(
            f"{where}: only pickled weights ({', '.join(pickled[:3])}). Opening them runs their code, so they "
            f"are never read here. Where you trust them, convert the model: {CONVERT}"
        )
    raise InputError(
        f"{where}: no weights; {name}.safetensors is missing, there are {', '.join(names[:6]) or 'no files'}"
    )


def check_files(files: list[Path]) -> None:
    """Check that safetensors files, the first of which may be an index of shards, are whole and all there.

    Raises:
        InputError: which file is missing, empty, cut short or a pointer of git's large file storage.
    """
    if files[0].suffix != ".json":
        for file in files:
            _tensor_names(file)
        return
    places = read_config(files[0]).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{files[0]}: damaged (no weight_map); get it again from where the model came from")
    held = {shard: _tensor_names(files[0].parent / shard) for shard in sorted(set(places.values()))}
    lost = [tensor for tensor, shard in places.items() if tensor not in held[shard]]
    if lost:
        raise InputError(f"{files[0]}: its shards lack {_some(lost)}; the model is incomplete")


def _tensor_names(file: Path) -> set[str]:
    start = b"?"
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise InputError(f"{file}: a pointer of git's large file storage, not weights; run `git lfs pull` there")
        with safe_open(file, framework="pt") as weights:
            types = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise InputError(f"{file}: missing; the model is incomplete") from None
    except (SafetensorError, OSError) as error:
        what = f"damaged or cut short ({error})" if start else "empty"
        raise InputError(f"{file}: {what}; get it again from where the model came from") from None
    whole = [name for name, kind in types.items() if not kind.startswith(("F", "BF")) and not NOT_READ.search(name)]
    if whole:
        raise InputError(
            f"{file}: {len(whole)} tensors are whole numbers: {_some(whole)}; quantised weights do not serve, use the "
            "model as it was before"
        )
    return set(types)


def _check_tensors(model: nn.Module, found: dict[str, Any], file: Path) -> None:
    """Refuse what was not filled from the file: such tensors hold whatever memory held."""
    misshapen = [f"{name} ({list(there)} for {list(want)})" for name, there, want in sorted(found["mismatched_keys"])]
    strange = [name for name in found["unexpected_keys"] if not NOT_READ.search(name)]
    lost, strangers = list(found["missing_keys"]), f" (in their place: {_some(strange)})" if strange else ""
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    for tensors, problem in (
        (lost, f"tensors are missing{strangers}"),
        (misshapen, "tensors have other shapes than config.json says"),
        (strange, "tensors belong to another kind of model than config.json says"),
        (bad, "tensors hold NaN or infinity"),
    ):
        if tensors:
            raise InputError(
                f"{file}: {len(tensors)} {problem}: {_some(tensors)}; use a complete {type(model).__name__}"
            )


def _some(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
