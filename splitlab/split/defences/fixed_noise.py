"""S1's fixed noise: one secret tensor per client, added to every cut-layer activation (Yao 2024)."""

from dataclasses import replace

from torch import Tensor

from splitlab.core.seeds import Key, Source, source
from splitlab.privacy.draws import normal
from splitlab.split.defences.record import STD, Defence, Defences, Noise
from splitlab.split.messages import Observation


def fixed_noise_tensor(defences: Defences, shape: tuple[int, ...], client_key: Key) -> Tensor:
    """Return a client's secret tensor `[c, h, w]`, the same for every message it ever sends."""
    return normal(shape, source("fixed noise", client_key)) * defences.fixed_noise


def add_fixed_noise(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Add the client's tensor to `smashed`."""
    smashed = message.need("smashed")
    return replace(message, smashed=smashed + fixed_noise_tensor(defences, tuple(smashed.shape[1:]), client_key))


DEFENCES = (
    Defence(
        "fixed_noise",
        off=0.0,
        says="standard deviation of one Gaussian tensor per client, added to every cut-layer activation",
        label="fixed noise per client, std {:g}",
        place=110,
        touches=("smashed",),
        transform=add_fixed_noise,
        adds=Noise(lambda defences: defences.fixed_noise),
        must=STD,
        usual=(0.1, 0.5, 1.0, 2.0),
    ),
)
