"""How schemes, fields and granted facts are called wherever people read of them."""

import math

UNMEASURED, UNSCORED = "not measured", "not scored"
"""What stands where a number is missing (NaN): it is neither 0 nor "no"."""

SCHEME_WORDS = {
    "central": "central",
    "federated": "federated (FedAvg)",
    "split_gradients": "conventional split (gradients return)",
    "split": "S1 split (nothing returns)",
    "u_shaped": "U-shaped split (loss on the client)",
}

FIELD_WORDS = {
    "timesteps": "timestep",
    "noisy_latents": "noisy latents",
    "smashed": "activation",
    "noise": "noise label",
    "encoder_hidden_states": "prompt",
    "noise_pred": "its own prediction",
    "noise_pred_gradient": "the loss's gradient",
}

GRANT_WORDS = {"batch_size": "batch size", "timesteps": "t", "noise": "noise", "text": "prompt", "hint_latents": "hint"}


def percent(value: float) -> str:
    """Write a share as a whole percentage that says 100 only if nothing is missing, and of NaN that it is missing."""
    if math.isnan(value):
        return UNMEASURED
    rounded = round(100 * value)
    return f"{99 if rounded == 100 and value < 0.995 else rounded}\u00a0%"


def counted(n: int, what: str) -> str:
    """Write a number with its noun."""
    return f"{n} {what}{'' if n == 1 else 's'}"
