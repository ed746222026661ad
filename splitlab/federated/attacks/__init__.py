"""What the server of federated training can do with an update: one file per idea, one entry per attack.

Every attack is a function `(update, knowledge, *, generator, callback=None, ...)`. It may read the update, and through
`knowledge` public models and what the threat model grants; no truth can reach it.
"""

from collections.abc import Callable
from typing import Any

from splitlab.federated.attacks.baselines import dlg, inverting_gradients
from splitlab.federated.attacks.gidm import gidm, gidm_plus
from splitlab.federated.attacks.gradient_matching import known_noise
from splitlab.federated.attacks.prompts import prompts
from splitlab.federated.attacks.timesteps import timesteps
from splitlab.federated.attacks.unknown_noise import unknown_noise

INVERSIONS: dict[str, Callable[..., Any]] = {
    "timesteps": timesteps,
    "prompts": prompts,
    "dlg": dlg,
    "inverting_gradients": inverting_gradients,
    "gidm": gidm,
    "gidm_plus": gidm_plus,
    "known_noise": known_noise,
    "unknown_noise": unknown_noise,
}
