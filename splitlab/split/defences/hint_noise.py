"""Noise on the hint alone, and fewer numbers of it, which noise hides sooner."""

from dataclasses import replace

from splitlab.core.seeds import Key, Source
from splitlab.diffusion.controlnet import coarsened
from splitlab.privacy.draws import noised
from splitlab.split.defences.record import STD, Defence, Defences, Noise, latent_hints_only
from splitlab.split.messages import Observation


def add_hint_noise(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Noise `smashed` alone, before anything else is done to it: its share of the noisy latents stays as it is sent."""
    if defences.per_image_noise:  # it is in the hint latents already
        return message
    return replace(message, smashed=noised(message.need("smashed"), defences.hint_noise, draw))


def coarsen_hints(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Keep the lowest frequencies of the hint latents in `smashed`, noise included."""
    noisy_latents = message.need("noisy_latents")
    hints = message.need("smashed") - noisy_latents
    return replace(message, smashed=coarsened(hints, defences.coarse_hints) + noisy_latents)


LATENT_HINTS = latent_hints_only(
    "hint_noise and coarse_hints are for latent hints; split_gradients trains a hint encoder: give neither"
)

DEFENCES = (
    Defence(
        "hint_noise",
        off=0.0,
        says="standard deviation σh of Gaussian noise of its own on the hint latents, drawn anew for every sample: the "
        "server, which can take the sent latents off `smashed`, is left with the noised hint, no second view of the "
        "image",
        label="hint noise, std {:g}",
        place=60,
        touches=("smashed",),
        transform=add_hint_noise,
        adds=Noise(lambda defences: defences.hint_noise),
        must=STD,
        refuses_run=LATENT_HINTS,
        usual=(0.3, 1.0, 2.5),
    ),
    Defence(
        "coarse_hints",
        off=0,
        says="keep that many spatial frequencies per axis of the noised hint latents, without their mean and amplified "
        "so that white noise keeps its size (`splitlab.diffusion.controlnet.coarsened`)",
        label="{:g} frequencies of a hint per axis",
        place=70,
        touches=("smashed",),
        transform=coarsen_hints,
        least=2,
        must="is a number of frequencies, 2 or more (0: all)",
        refuses_run=LATENT_HINTS,
        usual=(6, 4, 2),
    ),
)
