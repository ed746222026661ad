"""Secure aggregation: only the sum of several clients' updates is seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from splitlab.core.config import Count
from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.federated.client import share
from splitlab.federated.defences.record import Client, Defence, UpdateDefence, protected
from splitlab.federated.update import Update


@dataclass(frozen=True)
class SecureAggregation(UpdateDefence):
    """The server sees only the sum of `n_clients` updates (Bonawitz et al. 2017), here divided by their number."""

    n_clients: Count


def aggregate(updates: Sequence[Update]) -> Update:
    """Return the mean of several clients' updates, all that secure aggregation shows the server.

    Raises:
        InputError: they are not of one model, kind and set of parameters.
    """
    first = updates[0]
    for other in updates[1:]:
        if replace(other, gradients={}) != replace(first, gradients={}) or set(other.gradients) != set(first.gradients):
            raise InputError("secure aggregation: the updates are not of one model, kind and set of parameters")
    mean = {name: torch.stack([u.gradients[name].float() for u in updates]).mean(0) for name in first.gradients}
    return protected(first, mean, SecureAggregation(len(updates)))


def shared(client: Client, levels: SecureAggregation, generator: Source) -> Update:
    """Send this client's update and the others', of which the server sees the mean.

    Raises:
        InputError: there are not n_clients - 1 others.
    """
    if len(client.others) != levels.n_clients - 1:
        raise InputError(f"{levels.n_clients} clients: give the batches of {levels.n_clients - 1} others")
    return aggregate([share(client.model, truth, **client.arguments) for truth in (client.truth, *client.others)])


DEFENCES = (
    Defence(
        "aggregation",
        SecureAggregation,
        "the sum of {:g} clients' updates alone",
        rank=80,
        effects=("summed",),
        level=lambda level: SecureAggregation(int(level)),
        share=shared,
    ),
)
