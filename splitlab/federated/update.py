"""What a federated client sends, what it alone knows, and the files of both.

`Update` is the whole list of what leaves the client. Its truth is another record in another file.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from splitlab.core import checkpoint
from splitlab.core.config import Count, Settings, one_of, parse_exactly
from splitlab.core.errors import InputError

VERSION = 1
KINDS = ("gradient", "fedavg")
OBJECTIVES = ("epsilon", "v_prediction")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
AXES = {"clean": 4, "timesteps": 1, "noise": 4, "text": 3, "hint_latents": 4, "images": 4}
"""Of what a client alone knows, for one local step."""

Size = int | tuple[int, int]
"""Of a model's input: pixels or latent cells; one number where height and width are equal, else both."""


@dataclass(frozen=True)
class Update(Settings):
    """Everything the server receives from one client in one round. Nothing else leaves the client.

    Attributes:
        gradients: parameter name -> tensor of the parameter's shape: the gradient of the loss, or for "fedavg" the
            weights before minus the weights after the local steps (so both point uphill).
        kind: "gradient", or "fedavg" for a weight difference after `local_steps` steps of SGD.
        objective: what the model is trained to predict: "epsilon" (the noise) or "v_prediction".
        size: of the model's input, see `Size`.
        model: `model_digest` of the weights the client started from, which the server sent it.
        defence: the defence that is on, in public words; "none".
        local_steps, lr: the client's SGD, public; the loss is a mean over batch and elements.
    """

    gradients: dict[str, Tensor]
    kind: Annotated[str, one_of(KINDS)]
    objective: Annotated[str, one_of(OBJECTIVES)]
    size: Size
    model: str
    defence: str = "none"
    local_steps: Count = 1
    lr: float = 0.0

    def __post_init__(self) -> None:
        """Refuse contradictions at construction."""
        try:
            super().__post_init__()
        except InputError as error:
            raise InputError(f"update: {error}") from None
        if min(self.size if isinstance(self.size, tuple) else (self.size,)) < 1:
            raise InputError(f"update: size must be 1 or more, got {self.size}")
        if not (0.0 if self.kind == "gradient" else math.ulp(0.0)) <= self.lr < math.inf:
            raise InputError(f"update: lr must be positive and finite, got {self.lr}")

    def shows(self, name: str) -> bool:
        """Say whether it holds a gradient of the parameter `name` that is not zero."""
        value = self.gradients.get(name)
        return value is not None and bool(value.any())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Update":
        """Return a copy with `change` applied to every tensor."""
        return replace(self, gradients={name: change(value) for name, value in self.gradients.items()})

    def mean_gradient(self) -> dict[str, Tensor]:
        """Return the gradients in float32; of a weight difference, the mean gradient over its local steps."""
        scale = 1.0 if self.kind == "gradient" else 1.0 / (self.lr * self.local_steps)
        return {name: value.float() * scale for name, value in self.gradients.items()}


@dataclass(frozen=True)
class UpdateTruth:
    """What only the client and the evaluator hold about one update, sample by sample.

    Attributes:
        clean: `[b, c, h, w]`: what the model was trained on: images in [-1, 1], or latents.
        timesteps: `[b]` int64; `[e, b]` where each of e local steps drew its own.
        noise: `[b, c, h, w]`, or `[e, b, c, h, w]` likewise.
        text: `[b, l, d]` text embeddings, for a text-conditional model.
        hint_latents: `[b, c, h, w]`, for a ControlNet.
        images: `[b, 3, s, s]` in [-1, 1], where `clean` is latents.
        prompts: b prompts, for a text-conditional model.
    """

    clean: Tensor
    timesteps: Tensor
    noise: Tensor
    text: Tensor | None = None
    hint_latents: Tensor | None = None
    images: Tensor | None = None
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, indices: slice) -> "UpdateTruth":
        """Return the truth of some of the samples."""
        axis = (slice(None),) * (self.timesteps.ndim - 1)
        optional = {k: getattr(self, k) for k in ("text", "hint_latents", "images")}
        return UpdateTruth(
            self.clean[indices],
            self.timesteps[(*axis, indices)],
            self.noise[(*axis, indices)],
            **{k: v if v is None else v[indices] for k, v in optional.items()},
            prompts=self.prompts[indices],
        )


def checked_size(value: object, where: str) -> Size:
    """Return the size that a number or a pair of numbers stands for.

    Raises:
        InputError: it is neither.
    """
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0 for n in sides):
        raise InputError(f"{where}: expected a whole number, or [height, width], got {value!r}")
    height, width = map(int, sides)
    return height if height == width else (height, width)


def model_digest(model: nn.Module) -> str:
    """Return SHA-256 over a model's weights and their names: equal digests, equal models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_update(update: Update, model: nn.Module, *, where: str = "update") -> None:
    """Refuse an update that `model` cannot have produced.

    Raises:
        InputError: names or shapes that are not the model's (says which), values that are not finite, nothing but
            zeros, or gradients taken at other weights.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    kind = type(model).__name__
    if not update.gradients:
        raise InputError(f"{where}: it holds no gradients; share at least one parameter's")
    strange = [name for name in update.gradients if name not in shapes]
    if strange:
        raise InputError(f"{where}: this {kind} has no parameter {some(strange)}; load the architecture it was made of")
    wrong = [
        f"{n} {tuple(g.shape)} for {shapes[n]}" for n, g in update.gradients.items() if tuple(g.shape) != shapes[n]
    ]
    if wrong:
        raise InputError(
            f"{where}: shapes that differ from this {kind}'s: {some(wrong)}; load the architecture it was made of"
        )
    integers = [name for name, value in update.gradients.items() if not value.is_floating_point()]
    if integers:
        raise InputError(f"{where}: {some(integers)} is not of a floating-point type; dequantise it first")
    bad = [name for name, value in update.gradients.items() if not torch.isfinite(value).all()]
    if bad:
        raise InputError(
            f"{where}: {some(bad)} holds NaN or infinity; leave it out if the others are whole, or ask for another"
        )
    if not any(value.any() for value in update.gradients.values()):
        raise InputError(f"{where}: every gradient is zero, so it says nothing about the images; ask for another")
    if update.model and update.model != model_digest(model):
        raise InputError(
            f"{where}: taken at weights {update.model[:12]}, this {kind} has {model_digest(model)[:12]}; "
            "load the weights the client was sent"
        )


def some(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_update(path: Path, update: Update) -> None:
    """Write what the server received to a safetensors file."""
    header = {k: v for k, v in asdict(replace(update, gradients={})).items() if k != "gradients"}
    checkpoint.save(path, update.gradients, {"update": header | {"version": VERSION}})


@dataclass(frozen=True)
class _Header:
    kind: str
    objective: str
    size: Any
    model: str
    defence: str
    local_steps: int
    lr: float
    version: int


def with_header(tensors: dict[str, Tensor], meta: Mapping[str, object], *, where: str) -> Update | None:
    """Return the update that a file's tensors and metadata are; None if `write_update` did not write it.

    Raises:
        InputError: the header is of another version, lacks a field or makes no sense.
    """
    fields = meta.get("update")
    if not isinstance(fields, dict):
        return None
    if fields.get("version") != VERSION:
        raise InputError(f"{where}: update version {fields.get('version')}, expected {VERSION}; share it again")
    header = asdict(parse_exactly(_Header, fields, where=f"{where}: header"))
    size = checked_size(header.pop("size"), f"{where}: header.size")
    return Update(tensors, size=size, **{k: v for k, v in header.items() if k != "version"})


def read_update(path: str | Path, *, model: nn.Module | None = None) -> Update:
    """Read an update that `write_update` wrote, and check it.

    Args:
        path: the file.
        model: the model it is to be attacked with; None skips the checks against it.

    Raises:
        InputError: the file is missing or damaged, of another version, or not of this model (see `check_update`).
    """
    tensors, meta = checkpoint.load(Path(path))
    update = with_header(tensors, meta if isinstance(meta, dict) else {}, where=str(path))
    if update is None:
        raise InputError(f"{path}: it has no header of an update; plain gradients are for `splitlab.attack_gradient`")
    if model is not None:
        check_update(update, model, where=str(path))
    return update


def write_update_truth(path: Path, truth: UpdateTruth) -> None:
    """Write what only the client knew to a file of its own."""
    tensors = {k: v for k, v in vars(truth).items() if isinstance(v, Tensor)}
    checkpoint.save(path, tensors, {"prompts": list(truth.prompts)}, private=True)


def read_update_truth(path: str | Path) -> UpdateTruth:
    """Read what `write_update_truth` wrote.

    Raises:
        InputError: the file is missing, damaged or no truth of an update.
    """
    tensors, meta = checkpoint.load(Path(path))
    prompts = meta.get("prompts")
    needed = {"clean", "timesteps", "noise"}
    if not isinstance(prompts, list) or not needed <= set(tensors) <= set(UpdateTruth.__dataclass_fields__):
        raise InputError(
            f"{path}: not the truth of an update; `splitlab.federated.update.write_update_truth` makes one"
        )
    n = len(_checked_facts(tensors, path))
    if len(prompts) not in (0, n) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"{path}: {len(prompts)} prompts for {n} samples; record the updates again")
    return UpdateTruth(**tensors, prompts=tuple(prompts))


def read_granted(path: Path) -> tuple[dict[str, Tensor], int]:
    """Read the facts that a threat model may grant about the updates of a cell, and the batch size.

    Raises:
        InputError: the file is missing, damaged or holds no such facts.
    """
    tensors, meta = checkpoint.load(path, remedy=checkpoint.REMADE)
    batch = meta.get("batch_size")
    if (
        type(batch) is not int
        or batch < 1
        or not {"timesteps", "noise"} <= set(tensors) <= set(AXES) - {"clean", "images"}
    ):
        raise InputError(f"{path}: not the facts of recorded updates; {checkpoint.REMADE}")
    if len(_checked_facts(tensors, path)) % batch:
        raise InputError(f"{path}: its samples are no whole number of batches of {batch}; {checkpoint.REMADE}")
    return tensors, batch


def _checked_facts(tensors: Mapping[str, Tensor], path: str | Path) -> Tensor:
    """Return the timesteps of one local step, once all that is there is of one number of samples."""
    steps = tensors["timesteps"].ndim - 1  # an axis in front for local steps that draw their own
    for name, tensor in tensors.items():
        axes = AXES[name] + (max(0, steps) if name in ("timesteps", "noise") else 0)
        checkpoint.field(tensors, name, axes, (torch.int64,) if name == "timesteps" else FLOATS, path)
        if 0 in tensor.shape:
            raise InputError(f"{path}: {name} is of shape {tuple(tensor.shape)}; record the updates again")
    timesteps = tensors["timesteps"][0] if steps else tensors["timesteps"]
    samples = {len(value[0] if steps and name in ("timesteps", "noise") else value) for name, value in tensors.items()}
    if len(samples) > 1 or steps > 1 or tensors["timesteps"].min() < 0:
        raise InputError(f"{path}: its samples differ in number, or a timestep is below 0; record the updates again")
    return timesteps
