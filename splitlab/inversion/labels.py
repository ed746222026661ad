"""Class labels off an update: the rows of the label table's gradient that are not zero, else all labels are tried."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from splitlab.denoisers import predict
from splitlab.errors import InputError
from splitlab.federated import InversionKnowledge
from splitlab.inversion.time_layers import stand_in_facts
from splitlab.updates import Update

MOST = 32
"""Assignments of labels to images that are tried before they have to be granted."""


def label_options(update: Update, knowledge: InversionKnowledge, shape: tuple[int, int, int]) -> list[Tensor]:
    """Return the labels `[b]` that the images of an update may have, all of them to be tried.

    Args:
        update: the update.
        knowledge: the class-conditional model, and the batch's size, if it is not 1.
        shape: (channels, height, width) of its input.

    Raises:
        InputError: the model looks no label up in a table, or there are too many to try.
    """
    name, table = _table(knowledge, shape)
    batch = knowledge.batch_size or 1
    gradient = update.gradients.get(f"{name}.weight")
    labels = list(range(table.num_embeddings))
    if gradient is not None and gradient.any():
        labels = gradient.flatten(1).any(1).nonzero()[:, 0].tolist()
        batch = max(batch, len(labels)) if knowledge.batch_size is None else batch
    every = itertools.product(labels, repeat=batch)
    shown = gradient is not None and len(labels) <= batch
    options = list(itertools.islice((o for o in every if not shown or set(o) == set(labels)), MOST + 1))
    if not options or len(options) > MOST:
        told = f"the update shows {labels}" if shown else f"there are {table.num_embeddings}"
        raise InputError(f"class labels: {told}, too many ways to assign them to {batch} image(s); grant class_labels")
    return [torch.tensor(option) for option in options]


@torch.no_grad()
def _table(knowledge: InversionKnowledge, shape: tuple[int, int, int]) -> tuple[str, nn.Embedding]:
    """Return the table that the labels are looked up in: the one that sees what is given as labels."""
    model, mark = knowledge.model, torch.tensor([1])
    found: list[tuple[str, nn.Embedding]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, nn.Embedding) and torch.equal(inputs[0].reshape(-1), mark):
                found.append((name, module))

        return hook

    handles = [m.register_forward_pre_hook(note(n)) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    facts = stand_in_facts(knowledge, shape, 1) | {"class_labels": mark}
    try:
        predict(model, torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64), **facts, call=knowledge.call)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InputError(f"a {type(model).__name__} needs class labels that no table holds; grant class_labels")
    return found[0]
