"""How attacks are scored."""

from dataclasses import dataclass

from splitlab.core.config import Count, Settings

GRIDS = ("default", "full")
"""How much of a survey is run."""


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """How reconstructions are scored.

    Attributes:
        buckets: edges of the timestep buckets.
        candidates: size of the gallery for identification (chance: 1 / candidates).
        samples: images scored per bucket.
        seed: of the galleries.
    """

    buckets: tuple[int, ...] = (0, 200, 400, 600, 800, 1000)
    candidates: Count = 100
    samples: Count = 64
    seed: int = 0
