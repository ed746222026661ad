"""How attacks, schemes, fields and defences are called wherever people read of them."""

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

DEFENCE_WORDS = {
    "timestep_floor": "timesteps from {:g} up",
    "latent_norm": "latents bounded to norm {:g}",
    "feature_noise": "feature noise, std {:g}",
    "independent_draws": "drawn for each field apart",
    "matched": "matched client",
    "hint_noise": "hint noise, std {:g}",
    "coarse_hints": "{:g} frequencies of a hint per axis",
    "per_image_noise": "noise drawn once per image",
    "borrowed_colours": "borrowed colours",
    "hint_layout_noise": "noised layout for a hint, std {:g}",
    "random_symmetry": "secretly turned",
    "symsigmoid": "symsigmoid activation",
    "fixed_noise": "fixed noise per client, std {:g}",
    "key_mixing": "{:g} samples mixed by a secret key",
    "patch_shuffle": "patches of side {:g} shuffled",
    "fresh_keys": "keys drawn anew each time",
    "half": "fp16",
    "hide_prompts": "prompts hidden",
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
