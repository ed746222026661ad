"""The best guesses of somebody who saw nothing: what every attack has to beat."""

from collections.abc import Sequence

import torch

from splitlab.core.progress import Callback
from splitlab.split.attacks.record import Attack
from splitlab.split.messages import Knowledge, Observation, Reconstruction


def mean_public(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
) -> Reconstruction:
    """Answer every message with the mean public image and hint: the least squared error without information."""
    n = sum(observation.batch_size for observation in observations)
    public = knowledge.public
    mean, hint = (part.mean(0, keepdim=True).expand(n, -1, -1, -1) for part in (public.images, public.need_hints()))
    return Reconstruction(mean.clone(), hint.clone())


def random_public(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
) -> Reconstruction:
    """Answer every message with a random public image and its hint."""
    n = sum(observation.batch_size for observation in observations)
    chosen = torch.randint(len(knowledge.public), (n,), generator=generator)
    return Reconstruction(knowledge.public.images[chosen], knowledge.public.need_hints()[chosen])


ATTACKS = (
    Attack(mean_public, "no information: mean public image", rank=0, informed=False, colour="#7f7f7f"),
    Attack(random_public, "random public image", rank=1, informed=False, colour="#a6761d"),
)
