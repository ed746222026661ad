"""A private fine-tuning in progress, and the checkpoint that it goes on from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.seeds import Key
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.diffusion.denoisers import Denoiser
from splitlab.diffusion.trainable import check_optimizer, mark_trainable
from splitlab.dp.settings import DPConfig
from splitlab.privacy.accounting import PrivacyEvent
from splitlab.privacy.mechanisms import Mechanism, trainable_parameters

MAY_CHANGE = ("steps", "checkpoint_every")
"""What a resumed run may set otherwise than its checkpoint: neither alters a step that was taken."""


@dataclass
class State:
    """A run in progress."""

    model: Denoiser
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    key: Key = field(default_factory=Key.secret)
    steps: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Flatten everything that a resumed run needs."""
        weights = {f"weights/{n}": p.detach() for n, p in trainable_parameters(self.model).items()}
        average = {f"average/{n}": value for n, value in self.average.items()}
        return weights | average | checkpoint.training_state({}, {"optimizer": self.optimizer})

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Put back what `tensors` flattened."""
        with torch.no_grad():
            for name, parameter in trainable_parameters(self.model).items():
                parameter.copy_(tensors[f"weights/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
        checkpoint.restore_training_state(tensors, {}, {"optimizer": self.optimizer})
        self.steps = steps


def start_state(config: DPConfig, model: Denoiser) -> State:
    """Mark what of a model is trained, and make its optimiser."""
    mark_trainable(model.unet, config.trainable, from_block=config.from_block, rank=config.lora_rank, seed=config.seed)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.Adam(parameters.values(), lr=config.lr)
    check_optimizer(model, optimizer)
    return State(model, optimizer, {name: p.detach().clone() for name, p in parameters.items()})


def settings_of(
    config: DPConfig, how: Mechanism, base: Base, private: ImageSet, history: Sequence[PrivacyEvent]
) -> dict[str, Any]:
    """Return all that a checkpoint's steps depend on, as JSON gives it back."""
    settings = {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE} | asdict(how)
    settings |= {"history": [asdict(event) for event in history], "classes": list(config.classes)}
    libraries = {"torch": torch.__version__, "numpy": np.__version__}
    return settings | {"base": base.digest, "data": private.digest} | libraries


def resume(state: State, path: Path, settings: dict[str, Any], steps: int) -> None:
    """Load a checkpoint, if it is this run's.

    Raises:
        InputError: it was made with other settings, or has taken more steps than asked for.
    """
    tensors, meta = checkpoint.load(path, remedy=checkpoint.CACHED)
    before: dict[str, Any] = meta["settings"]  # type: ignore[assignment]
    done: int = meta["steps"]  # type: ignore[assignment]
    other = [name for name in settings if before.get(name) != settings[name]]
    if other:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is now {settings[name]!r}" for name in other)
        raise InputError(
            f"{path}: {done} steps were taken with other settings ({changes}), and they have been spent; "
            "set them as they were to go on, or give the run another name to begin anew"
        )
    if done > steps:
        raise InputError(f"{path}: {done} steps were taken already, more than the {steps} asked for; ask for as many")
    state.restore(tensors, done)
