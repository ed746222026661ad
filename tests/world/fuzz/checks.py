"""What an accepted message or file must be: what the documentation promises, said again, apart from the package."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitlab.federated.saved import SavedInversion
from splitlab.federated.update import Update, UpdateTruth
from splitlab.split.artefacts import SavedReconstruction
from splitlab.split.config import Defences, TrainConfig
from splitlab.split.messages import Observation, Truth
from splitlab.split.wire import Transcript
from world.fuzz import mutations
from world.fuzz.changes import NAMES, parts


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def is_finite(tensor: Tensor) -> bool:
    return bool(np.isfinite(numbers(tensor)).all())


def check_fields(seen: Observation) -> list[str]:
    """A message: `splitlab.split.messages.Observation`."""
    fields = {name: getattr(seen, name) for name in NAMES if getattr(seen, name) is not None}
    maps = {name: value for name, value in fields.items() if name not in ("timesteps", "encoder_hidden_states")}
    latents = {tuple(value.shape) for name, value in maps.items() if name != "smashed"}
    timesteps = fields.get("timesteps", torch.zeros(1, dtype=torch.int64))
    wrong = {
        "no field": not fields,
        "client": not (type(seen.client) is int and 0 <= seen.client < 2**63),
        "sequence": not (type(seen.sequence) is int and 0 <= seen.sequence < 2**63),
        "batch": len({len(value) for value in fields.values()}) != 1 or any(0 in v.shape for v in fields.values()),
        "axes": any(value.ndim != 4 for value in maps.values()) or timesteps.ndim != 1,
        "text": "encoder_hidden_states" in fields and fields["encoder_hidden_states"].ndim != 3,
        "dtype": timesteps.dtype not in (torch.int64, torch.int16)
        or any(
            value.dtype not in (torch.float32, torch.float16, torch.bfloat16)
            for name, value in fields.items()
            if name != "timesteps"
        ),
        "finite": not all(is_finite(value) for value in fields.values()),
        "timesteps": bool(((numbers(timesteps) < 0) | (numbers(timesteps) > 999)).any()),
        "latents": len(latents) > 1,
        "maps": len({tuple(value.shape[2:]) for value in maps.values()}) > 1,
    }
    return [name for name, bad in wrong.items() if bad]


def check_message(seen: Observation, content: bytes) -> list[str]:
    """The fields, and that they are the bytes that were sent, all of them and nothing else."""
    header, body = parts(content)
    told = header.pop("__metadata__")
    problems = check_fields(seen)
    if told != {"v": "1", "c": str(seen.client), "s": str(seen.sequence)}:
        problems.append("envelope")
    fields = {name: getattr(seen, name) for name in NAMES if getattr(seen, name) is not None}
    if set(fields) != set(header):
        return [*problems, "names"]
    for name, value in fields.items():
        first, last = header[name]["data_offsets"]
        sent = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if list(value.shape) != header[name]["shape"] or sent != body[first:last]:
            problems.append(f"content of {name}")
    return problems


def check_transcript(read: Transcript, content: bytes) -> list[str]:
    """The header, and every message against it."""
    header, defences = read.header, read.header.defences
    problems = check_defences(defences)
    if header.scheme not in ("central", "federated", "split_gradients", "split", "u_shaped"):
        problems.append("scheme")
    if not (1 <= header.size < 2**31 and 1 <= header.n_clients < 2**31 and header.version == 1):
        problems.append("header")
    if any(not isinstance(value, str) for value in (header.run, header.dataset, header.base)):
        problems.append("names")
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for seen in read.observations:
        problems += check_fields(seen)
        fields = seen.tensors
        for name, value in fields.items():
            shapes.setdefault(name, set()).add(tuple(value.shape[1:]))
            if value.ndim == 4 and (header.size % value.shape[2] or header.size % value.shape[3]):
                problems.append("size")
            if defences.half and not name.startswith("noise_pred") and value.element_size() != 2:
                problems.append("half")
        if "timesteps" in fields and fields["timesteps"].min() < defences.timestep_floor:
            problems.append("floor")
        if seen.client >= header.n_clients:
            problems.append("client of the run")
        if defences.hide_prompts and "encoder_hidden_states" in fields:
            problems.append("hidden prompts")
        if header.scheme == "u_shaped" and "noise" in fields:
            problems.append("label")
        if header.scheme != "u_shaped" and {"noise_pred", "noise_pred_gradient"} & set(fields):
            problems.append("answers")
        if header.scheme in ("central", "federated"):
            problems.append("sends nothing")
        if header.scheme != "split_gradients" and "smashed" in fields and "noise" in fields:
            problems += ["smashed"] * (fields["smashed"].shape != fields["noise"].shape)
    if any(len(found) > 1 for found in shapes.values()):
        problems.append("shapes")
    senders = Counter((seen.client, seen.sequence) for seen in read.observations)
    return problems + ["twice"] * any(count > 1 for count in senders.values())


def check_defences(defences: Defences) -> list[str]:
    """Every strength is finite and 0 or more; every switch is a switch."""
    problems = []
    for name, value in asdict(defences).items():
        if type(value) not in (bool, int, float) or not 0 <= value < math.inf:
            problems.append(name)
    return problems


def check_truth(truth: Truth, content: bytes) -> list[str]:
    """Indices, timesteps and noise of one length."""
    n = len(truth.indices)
    wrong = {
        "lengths": not (n == len(truth.timesteps) == len(truth.noise) and len(truth.prompts) in (0, n)),
        "types": (truth.indices.dtype, truth.timesteps.dtype, truth.noise.dtype)
        != (torch.int64, torch.int64, torch.float32),
        "axes": (truth.indices.ndim, truth.timesteps.ndim, truth.noise.ndim) != (1, 1, 4),
        "range": bool(n)
        and bool((truth.indices < 0).any() | (truth.timesteps < 0).any() | (truth.timesteps > 999).any()),
        "finite": not is_finite(truth.noise),
        "prompts": any(type(prompt) is not str for prompt in truth.prompts),
    }
    return [name for name, bad in wrong.items() if bad]


def check_server(tensors: dict[str, Tensor], content: bytes) -> list[str]:
    """Finite weights."""
    return [name for name, value in tensors.items() if not is_finite(value)]


def check_update(model: nn.Module) -> Callable[[Update, bytes], list[str]]:
    """Gradients of the model's parameters, finite, not all zero; the client's SGD in range."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}

    def check(update: Update, content: bytes) -> list[str]:
        sides = update.size if isinstance(update.size, tuple) else (update.size,)
        wrong = {
            "names": not update.gradients or not set(update.gradients) <= set(shapes),
            "shapes": any(tuple(value.shape) != shapes.get(name) for name, value in update.gradients.items()),
            "types": not all(value.is_floating_point() for value in update.gradients.values()),
            "finite": not all(is_finite(value) for value in update.gradients.values()),
            "zero": not any(numbers(value).any() for value in update.gradients.values()),
            "kind": update.kind not in ("gradient", "fedavg") or update.objective not in ("epsilon", "v_prediction"),
            "size": not all(type(side) is int and side >= 1 for side in sides),
            "steps": not (type(update.local_steps) is int and update.local_steps >= 1),
            "lr": not 0 <= update.lr < math.inf or (update.kind == "fedavg" and update.lr == 0),
            "words": any(type(word) is not str for word in (update.model, update.defence)),
        }
        return [name for name, bad in wrong.items() if bad]

    return check


def check_update_truth(truth: UpdateTruth, content: bytes) -> list[str]:
    """Everything of one number of samples, finite."""
    n, steps = len(truth.clean), truth.timesteps.ndim - 1
    optional = {name: getattr(truth, name) for name in ("text", "hint_latents", "images")}
    there = {name: value for name, value in optional.items() if value is not None}
    wrong = {
        "samples": any(len(value) != n for value in there.values()) or len(truth.prompts) not in (0, n),
        "steps": steps not in (0, 1) or truth.timesteps.shape[-1] != n or truth.noise.shape[steps] != n,
        "axes": (truth.clean.ndim, truth.noise.ndim) != (4, 4 + steps)
        or any(value.ndim != (3 if name == "text" else 4) for name, value in there.items()),
        "range": truth.timesteps.dtype != torch.int64 or bool((truth.timesteps < 0).any()),
        "finite": not all(is_finite(value) for value in (truth.clean, truth.noise, *there.values())),
    }
    return [name for name, bad in wrong.items() if bad]


def check_granted(read: tuple[dict[str, Tensor], int], content: bytes) -> list[str]:
    """Facts of a whole number of batches."""
    facts, batch = read
    n = facts["timesteps"].shape[-1]
    wrong = {
        "names": not set(facts) <= {"timesteps", "noise", "text", "hint_latents"},
        "batch": batch < 1 or n % batch != 0,
        "finite": not all(is_finite(value) for value in facts.values()),
        "range": bool((facts["timesteps"] < 0).any()),
    }
    return [name for name, bad in wrong.items() if bad]


def _in_range(images: Tensor | None) -> bool:
    return images is None or (images.ndim == 4 and images.shape[1] == 3 and bool((images.abs() <= 1).all()))


def check_reconstruction(saved: SavedReconstruction, content: bytes) -> list[str]:
    """Images and hints in [-1, 1] of one number."""
    result = saved.result
    lengths = {len(part) for part in (result.images, result.hints, result.prompts) if part is not None}
    wrong = {
        "range": not (_in_range(result.images) and _in_range(result.hints)),
        "lengths": len(lengths) > 1,
        "types": type(saved.seed) is not int or type(result.n_evals) is not int,
        "words": any(
            type(word) is not str for word in (saved.adversary.attack, *saved.adversary.denied, *(result.prompts or ()))
        ),
        "rows": any(len(row) != 2 or any(type(word) is not str for word in row) for row in saved.threat_model),
    }
    return [name for name, bad in wrong.items() if bad]


def check_inversion(saved: SavedInversion, content: bytes) -> list[str]:
    """Images in [-1, 1], timesteps that are numbers, prompts that are texts."""
    wrong = {
        "range": not _in_range(saved.images) or not all(_in_range(images) for _, images in saved.history),
        "counts": any(type(count) is not int for count, _ in saved.history) or type(saved.n_evals) is not int,
        "timesteps": any(type(t) is not int for row in saved.timesteps or () for t in row),
        "prompts": any(type(text) is not str for row in saved.prompts or () for text in row),
        "words": any(type(word) is not str for word in (saved.attack, *saved.granted, saved.refused)),
        "seconds": not isinstance(saved.cpu_s, int | float),
    }
    return [name for name, bad in wrong.items() if bad]


def check_record(read: tuple[dict[str, Any], TrainConfig], content: bytes) -> list[str]:
    """A run that `train` could have done, and numbers where there are any."""
    record, config = read
    wrong = {
        "scheme": config.scheme not in ("central", "federated", "split_gradients", "split", "u_shaped"),
        "counts": any(
            type(value) is not int or value < 1
            for value in (config.steps, config.n_clients, config.batch_size, config.local_steps, config.eval_samples)
        ),
        "lr": not 0 < config.lr < math.inf,
        "server": config.server not in ("honest", "hijack"),
        "dataset": type(config.dataset) is not str,
        "numbers": any(type(value) not in (int, float) for value in record.get("loss", []))
        or type(record.get("control_iou")) not in (int, float, type(None)),
    }
    return [name for name, bad in wrong.items() if bad] + check_defences(config.defences)


def check_samples(read: tuple[Tensor, Tensor, list[str]], content: bytes) -> list[str]:
    """As many images as hints and prompts, in [-1, 1]."""
    hints, images, prompts = read
    wrong = {
        "range": not (_in_range(hints) and _in_range(images)),
        "lengths": not len(hints) == len(images) == len(prompts),
        "texts": any(type(text) is not str for text in prompts),
    }
    return [name for name, bad in wrong.items() if bad]


def check_scores(scores: dict[str, Tensor], content: bytes) -> list[str]:
    """One number per sample in each."""
    return ["shapes"] * (len({tuple(value.shape) for value in scores.values()}) != 1 or "ceiling_psnr_db" not in scores)


def check_images(data: Any, content: bytes) -> list[str]:
    """Square RGB images in [-1, 1] with a prompt each."""
    n, side = len(data), mutations.SIZE
    hints = data.hints
    wrong = {
        "shape": tuple(data.images.shape) != (n, 3, side, side) or data.images.dtype != torch.float32 or not n,
        "range": not is_finite(data.images) or bool((data.images.abs() > 1).any()),
        "hints": hints is not None and (hints.shape != data.images.shape or bool((hints.abs() > 1).any())),
        "texts": len(data.prompts) != n or any(type(text) is not str for text in (*data.prompts, *data.sources)),
    }
    return [name for name, bad in wrong.items() if bad]
