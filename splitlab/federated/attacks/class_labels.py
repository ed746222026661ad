"""Class labels off an update: the rows of the label table's gradient that are not zero, or all labels, likelier first.

Layers behind the table see the label beside the timestep: of one image, their gradient is δ e(t, y)ᵀ, and each label's
e(t, y) is held against it.
"""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from splitlab.core.errors import InputError
from splitlab.diffusion.denoisers import predict
from splitlab.federated.attacks.patches import watched
from splitlab.federated.attacks.time_layers import TimeProbe, stand_in_facts
from splitlab.federated.attacks.timesteps import timesteps
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.update import Update

MOST = 32
"""Assignments of labels to several images that are tried before they have to be granted."""


def label_options(update: Update, knowledge: InversionKnowledge, shape: tuple[int, int, int]) -> list[Tensor]:
    """Return the labels `[b]` that the images of an update may have, to be tried in this order.

    Args:
        update: the update.
        knowledge: the class-conditional model, and the batch's size, if it is not 1.
        shape: (channels, height, width) of its input.

    Raises:
        InputError: the model looks no label up in a table, or there are too many to try.
    """
    name, table = _table(knowledge, shape)
    is_shown = update.shows(f"{name}.weight")
    labels = list(range(table.num_embeddings))
    if is_shown:
        labels = update.gradients[f"{name}.weight"].flatten(1).any(1).nonzero()[:, 0].tolist()
    batch = knowledge.batch_size or (len(labels) if is_shown else 1)
    if batch == 1:
        return [torch.tensor([label]) for label in (labels if is_shown else _ranked(update, knowledge, shape, labels))]
    every = (option for option in itertools.product(labels, repeat=batch) if not is_shown or set(option) == set(labels))
    options = list(itertools.islice(every, MOST + 1))
    if not options or len(options) > MOST:
        told = f"the update shows {labels}" if is_shown else f"there are {table.num_embeddings}"
        raise InputError(f"class labels: {told}, too many ways to assign them to {batch} image(s); grant class_labels")
    return [torch.tensor(option) for option in options]


def _ranked(update: Update, knowledge: InversionKnowledge, shape: tuple[int, int, int], labels: list[int]) -> list[int]:
    """Return the labels of one image by how much of their layers' gradients they leave unexplained."""
    times = knowledge.timesteps
    if times is None:
        times = timesteps(update, knowledge, generator=torch.Generator()).timesteps
    left = {}
    for label in labels:
        probe = TimeProbe(replace(knowledge, class_labels=torch.tensor([label])), shape)
        layers = [layer for layer in probe.all() if update.shows(f"{layer.name}.weight") and not layer.is_table]
        left[label] = 0.0
        for name, inputs in probe.inputs(layers, times[:1]).items():
            rows, seen = update.gradients[f"{name}.weight"].flatten(1).double(), inputs[0].double()
            left[label] += 1 - float((rows @ seen).square().sum() / rows.square().sum() / seen.square().sum())
    return sorted(labels, key=left.__getitem__)


@torch.no_grad()
def _table(knowledge: InversionKnowledge, shape: tuple[int, int, int]) -> tuple[str, nn.Embedding]:
    """Return the table that the labels are looked up in: the one that sees what is given as labels."""
    model, mark = knowledge.model, torch.tensor([1])
    tables: list[tuple[str, nn.Embedding]] = []

    def note(name: str, module: nn.Embedding, inputs: tuple[Any, ...]) -> None:
        if torch.equal(inputs[0].reshape(-1), mark):
            tables.append((name, module))

    facts = stand_in_facts(knowledge, shape, 1) | {"class_labels": mark}
    with watched({name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}, note):
        predict(model, torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64), **facts, call=knowledge.call)
    if not tables:
        raise InputError(f"a {type(model).__name__} needs class labels that no table holds; grant class_labels")
    return tables[0]
