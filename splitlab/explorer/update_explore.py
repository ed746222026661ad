"""What the explorer shows of inverted updates, as plain data: one attack's progress on one update of a cell."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.diffusion.metrics import ssim
from splitlab.federated.attacks import ON_IMAGES, inversion_label
from splitlab.federated.saved import SavedInversion, load_inversion
from splitlab.federated.update import UpdateTruth, read_update_truth
from splitlab.study.update_grid import Cell, UpdateConfig
from splitlab.study.update_scores import matched, pictures


@dataclass(frozen=True)
class Progress:
    """One attack on one update.

    Attributes:
        label: the attack, in words.
        truth: `[b, 3, h, w]` the private images.
        frames: `(n_evals, images)`: on the way, the result last.
        ssim: mean SSIM of each frame.
        objective: the attack's own objective.
        saved: everything else.
    """

    label: str
    truth: Tensor
    frames: tuple[tuple[int, Tensor], ...]
    ssim: tuple[float, ...]
    objective: tuple[float, ...]
    saved: SavedInversion


class Inverted:
    """The pipeline's inversions, read when asked for.

    Args:
        params: the content of params.yaml.
        recorded: the folder that `record_updates` filled.
        inversions: the folder that `attack_updates` filled.
    """

    def __init__(self, params: dict[str, Any], *, recorded: Path, inversions: Path):
        self.config = parse(UpdateConfig, params["updates"], where="updates")
        self.recorded, self.inversions = recorded, inversions

    @property
    def cells(self) -> dict[str, Cell]:
        """The attacked cells with image attacks, by name.

        Raises:
            InputError: there are none.
        """
        found = {}
        for cell, _, _ in self.config.cells:
            if self.attacks(cell):
                found[cell.name] = cell
        if not found:
            raise InputError(
                f"{self.inversions}: no inverted updates; run `dvc repro evaluate-federated`, which makes them"
            )
        return found

    def attacks(self, cell: Cell) -> dict[str, str]:
        """Return label -> name of the image attacks on a cell."""
        names = {}
        for spec in cell.attacks:
            path = self.inversions / cell.name / f"{spec.name}-0.safetensors"
            if spec.attack in ON_IMAGES and path.exists():
                names[inversion_label(spec.attack, spec.grant)] = spec.name
        return names

    def n_updates(self, cell: Cell) -> int:
        """Return how many updates of the first seed there are."""
        return len(self._truth(cell)) // cell.together

    def progress(self, cell: Cell, name: str, update: int) -> Progress:
        """Return one attack's progress on one update.

        Raises:
            InputError: a file is missing or damaged, or the attack was refused (says why).
        """
        saved = load_inversion(self.inversions / cell.name / f"{name}-0.safetensors")
        if saved.images is None:
            raise InputError(f"{cell.name}: {name} has no result: {saved.refused}")
        own = slice(update * cell.together, (update + 1) * cell.together)
        truth = pictures(self._truth(cell))[own]
        frames = tuple((count, matched(images[own], truth, cell.together)) for count, images in saved.history)
        frames = frames or ((saved.n_evals, matched(saved.images[own], truth, cell.together)),)
        values = tuple(float(ssim(images, truth).mean()) for _, images in frames)
        label = inversion_label(saved.attack, next(s.grant for s in cell.attacks if s.name == name))
        return Progress(label, truth, frames, values, saved.objective, saved)

    def _truth(self, cell: Cell) -> UpdateTruth:
        return read_update_truth(self.recorded / "truth" / cell.name / "0.safetensors")


def side_by_side(progress: Progress, frame: int) -> Tensor:
    """Return one picture `[3, h, w]`: the private images above, what the attack has at that frame below."""
    rows = [torch.cat(list(images), 2) for images in (progress.truth, progress.frames[frame][1])]
    return torch.cat([rows[0], torch.ones(3, 1, rows[0].shape[2]), rows[1]], 1)
