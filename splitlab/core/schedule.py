"""The one learning-rate schedule of everything that is trained or searched for here."""

import math


def cosine(rate: float, step: int, steps: int, *, warm_up: int | float = 1) -> float:
    """Return the learning rate of a step: half a cosine from `rate` to 0 (Loshchilov & Hutter 2017, eq. 5), warmed up.

    Args:
        rate: the peak.
        step: 0 to `steps` - 1.
        steps: how many there are.
        warm_up: steps over which a linear factor rises to 1; 1: none.
    """
    return rate * min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
