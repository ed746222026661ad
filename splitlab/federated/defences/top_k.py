"""Only the largest values of an update."""

from dataclasses import dataclass

import torch

from splitlab.core.config import Share
from splitlab.core.seeds import Source
from splitlab.federated.defences.record import Defence, Gradients, UpdateDefence


@dataclass(frozen=True)
class TopK(UpdateDefence):
    """Keep the `fraction` of all values of the update that is largest in magnitude, zero the rest (Lin et al. 2018)."""

    fraction: Share


def keep(values: Gradients, levels: TopK, generator: Source) -> Gradients:
    """Zero all but the largest values, over all tensors together."""
    flat = torch.cat([value.flatten() for value in values.values()])
    kept = torch.zeros_like(flat)
    best = flat.abs().topk(max(1, round(levels.fraction * len(flat)))).indices
    kept[best] = flat[best]
    parts = kept.split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


DEFENCES = (Defence("top_k", TopK, "the largest {:g} of all values", rank=30, effects=("sparse",), protect=keep),)
