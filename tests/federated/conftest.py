"""A small model of another code base, and the gradient that a client of it shares."""

import pytest
from torch import Tensor, nn
from world import lookalikes
from world.foreign import gradient, images, made, run


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(lookalikes.ConvTimeNet)


@pytest.fixture(scope="module")
def shared(model: nn.Module) -> dict[str, Tensor]:
    return gradient(model, images(1), [137], run)[0]
