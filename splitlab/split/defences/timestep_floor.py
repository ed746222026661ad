"""S1's timestep sampling policy: noisy timesteps only, at which an image shows less."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.privacy.draws import integers
from splitlab.split.defences.matched import noise_variance
from splitlab.split.defences.record import Defence, Defences


def last_timestep(defences: Defences, alphas_cumprod: Float[Tensor, " T"]) -> int:
    """Return the largest timestep a client draws; the matched client's own noise must stay within the schedule's.

    Raises:
        InputError: the floor leaves no timestep.
    """
    last = len(alphas_cumprod)
    if defences.matched:
        last = int((alphas_cumprod / (1 + noise_variance(defences, alphas_cumprod)) >= alphas_cumprod[-1]).sum())
    if defences.timestep_floor >= last:
        raise InputError(f"timestep_floor {defences.timestep_floor} leaves none of the {last} timesteps: lower it")
    return last - 1


def draw_timesteps(
    defences: Defences, batch: int, alphas_cumprod: Float[Tensor, " T"], draw: Source
) -> Int[Tensor, " b"]:
    """Draw timesteps uniformly from [timestep_floor, T); samples that are mixed with one another share theirs.

    Raises:
        InputError: the floor leaves no timestep.
    """
    group = defences.key_mixing or 1
    last = last_timestep(defences, alphas_cumprod)
    drawn = integers(defences.timestep_floor, last + 1, (math.ceil(batch / group),), draw)
    return drawn.repeat_interleave(group)[:batch]


DEFENCES = (
    Defence(
        "timestep_floor",
        off=0,
        says="timesteps are drawn from [floor, T)",
        label="timesteps from {:g} up",
        place=40,
        touches=("timesteps", "noisy_latents", "smashed"),
        usual=(200, 400, 600, 800),
    ),
)
