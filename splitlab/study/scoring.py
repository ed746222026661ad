"""Reconstructions meet the truth, sample by sample."""

from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import generator
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base
from splitlab.split.artefacts import SavedReconstruction, read_record
from splitlab.split.config import TrainConfig
from splitlab.split.identification import identified_as_sent
from splitlab.split.messages import Reconstruction, Truth
from splitlab.split.wire import read_truth
from splitlab.study.config import EvaluateConfig


@dataclass(frozen=True)
class RunTruth:
    """What the evaluator knows about a recorded run.

    Attributes:
        config: the run's configuration.
        truth: indices, timesteps and noise of every recorded sample.
        private: the private data set.
        ceiling: `[n]` PSNR, dB, of the VAE's own reconstruction of each recorded sample's image.
    """

    config: TrainConfig
    truth: Truth
    private: ImageSet
    ceiling: Tensor


def run_truth(run: Path, base: Base, private: ImageSet) -> RunTruth:
    """Load a run's truth.

    Raises:
        InputError: the run's files are missing, damaged, or speak of other data.
    """
    _, config = read_record(run / "record.json")
    truth = read_truth(run / "truth.safetensors")
    if len(truth.indices) and int(truth.indices.max()) >= len(private):
        raise InputError(f"{run}: its truth speaks of image {int(truth.indices.max())}, the data hold {len(private)}")
    images = private.images[truth.indices.unique()]
    psnr = metrics.psnr_db(base.decode(base.encode(images)), images) if len(images) else torch.zeros(0)
    return RunTruth(config, truth, private, psnr[torch.searchsorted(truth.indices.unique(), truth.indices)])


def buckets(timesteps: Tensor, config: EvaluateConfig) -> dict[tuple[int, int], Tensor]:
    """Return (low, high) -> positions of the first `config.samples` samples with low <= t < high; no empty ones."""
    found = {}
    for low, high in zip(config.buckets, config.buckets[1:], strict=False):
        inside = torch.nonzero((timesteps >= low) & (timesteps < high))[:, 0][: config.samples]
        if len(inside):
            found[low, high] = inside
    return found


def score_samples(
    saved: SavedReconstruction,
    known: RunTruth,
    config: EvaluateConfig,
    *,
    localise: bool,
    chosen: Tensor | None = None,
) -> dict[str, Tensor]:
    """Score one reconstruction, sample by sample.

    Args:
        saved: the reconstruction.
        known: the truth about its run.
        config: how to score.
        localise: whether hints are outlines of discs.
        chosen: positions of the samples to score, the others are NaN; None: all.

    Returns `mse`, `psnr_db`, `ssim`, `identified` where the attack recovers images; `hint_psnr_db`, `hint_identified`
    and, if `localise`, `hint_iou` where it recovers hints; `both_identified` where it recovers both; `prompt_exact`
    where it recovers prompts; each `[n]`. Where samples were mixed, `place` says which reconstruction each is judged
    by.

    Raises:
        InputError: the reconstruction has another number of samples than the truth.
    """
    indices, private = known.truth.indices, known.private
    result, order = saved.result, best_order(saved, known)
    chosen = torch.arange(len(indices)) if chosen is None else chosen
    own, judged = indices[chosen], order[chosen]
    scores: dict[str, Tensor] = {"place": judged} if known.config.defences.key_mixing else {}
    if result.images is not None:
        images, found = private.images[own], result.images[judged]
        scores |= {"mse": metrics.mse(found, images), "psnr_db": metrics.psnr_db(found, images)}
        scores |= {"ssim": metrics.ssim(found, images)}
    if result.hints is not None:
        hints, found = private.need_hints()[own], result.hints[judged]
        scores["hint_psnr_db"] = metrics.psnr_db(found, hints)
        if localise:
            masks = (torch.stack([metrics.outline_mask(hint) for hint in group]) for group in (found, hints))
            scores["hint_iou"] = metrics.iou(*masks)
    if result.prompts is not None:
        pairs = zip(judged.tolist(), own.tolist(), strict=True)
        scores["prompt_exact"] = torch.tensor([result.prompts[i] == private.prompts[j] for i, j in pairs])
    scores |= _identified(saved.result, known, chosen, judged, config)
    spread = {name: torch.full((len(indices),), torch.nan) for name in scores}
    return {name: whole.index_copy(0, chosen, scores[name].float()) for name, whole in spread.items()}


def _identified(
    result: Reconstruction, known: RunTruth, chosen: Tensor, judged: Tensor, config: EvaluateConfig
) -> dict[str, Tensor]:
    """Pick each sample's nearest among a gallery of private ones as its client could have sent them."""
    defences, private, own = known.config.defences, known.private, known.truth.indices[chosen]
    images, hints = (None if found is None else found[judged] for found in (result.images, result.hints))
    sent = known.truth.prompts
    prompts = [sent[i] for i in chosen.tolist()] if sent else [private.prompts[i] for i in own.tolist()]
    gallery_indices = _gallery_indices(own, len(private), config)
    found = identified_as_sent(images, hints, private, prompts, gallery_indices, defences)
    columns = {"image": "identified", "hint": "hint_identified", "both": "both_identified"}
    return {columns[way]: share for way, share in found.items()}


def best_order(saved: SavedReconstruction, known: RunTruth) -> Tensor:
    """Return which reconstruction each sample is judged by, `[n]`: its own, unless samples were mixed with one another.

    Mixing by a secret key hides which reconstruction is whose, so each group is matched to its private images (hints
    where there are none) by the assignment of least squared error; alike for every attack, guesses included.

    Raises:
        InputError: the reconstruction has another number of samples than the truth.
    """
    indices, result = known.truth.indices, saved.result
    for name in ("images", "hints", "prompts"):
        value = getattr(result, name)
        if value is not None and len(value) != len(indices):
            raise InputError(f"{saved.adversary.name}: {len(value)} {name} for {len(indices)} samples; attack again")
    order, group = torch.arange(len(indices)), known.config.defences.key_mixing
    kind = "images" if result.images is not None else "hints"
    found = getattr(result, kind)
    if group and found is not None:
        wanted = getattr(known.private, kind)[indices]
        for part in torch.arange(len(indices)).split(group):
            cost = torch.cdist(wanted[part].flatten(1), found[part].flatten(1)).square()
            order[part] = part[torch.from_numpy(linear_sum_assignment(cost.numpy())[1])]
    return order


def _gallery_indices(indices: Tensor, n: int, config: EvaluateConfig) -> Tensor:
    """Draw the same galleries for every attack."""
    return metrics.draw_galleries(n, indices, min(config.candidates, n), generator("line-up", config.seed))
