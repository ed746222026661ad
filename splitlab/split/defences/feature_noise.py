"""Gaussian noise on what depends on the image, drawn anew for every sample; the label does not reveal it."""

from dataclasses import replace

from splitlab.core.seeds import Key, Source
from splitlab.privacy.draws import noised
from splitlab.split.defences.matched import HOW, feature_scale
from splitlab.split.defences.record import FEATURES, STD, Defence, Defences, Noise
from splitlab.split.messages import Observation


def one_draw(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Noise the noisy latents; what is added to them is added to `smashed`, which was computed from them."""
    if defences.per_image_noise or defences.independent_draws:  # it is in the latents already, or comes later
        return message
    clean, smashed = message.need("noisy_latents"), message.need("smashed")
    sent = noised(clean, defences.feature_noise, draw) * feature_scale(defences)
    return replace(message, noisy_latents=sent, smashed=smashed + (sent.to(smashed) - clean.to(smashed)))


def own_draws(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Noise each field by a draw of its own."""
    return message.changed(**{name: noised(message.need(name), defences.feature_noise, draw) for name in FEATURES})


def _one_draw_needs_one_shape(defences: Defences, scheme: str, batch_size: int) -> str:
    if scheme == "split_gradients" and not defences.independent_draws:
        return "split_gradients sends features of another shape: add independent_draws to feature_noise"
    return ""


DEFENCES = (
    Defence(
        "feature_noise",
        off=0.0,
        says="standard deviation σ1 of Gaussian noise, drawn anew for every sample, on the noisy latents and on what "
        "is computed from them",
        label="feature noise, std {:g}",
        place=80,
        touches=FEATURES,
        transform=one_draw,
        adds=Noise(lambda defences: defences.feature_noise),
        must=STD,
        refuses_run=_one_draw_needs_one_shape,
        usual=(0.1, 0.3, 1.0, 3.0),
    ),
    Defence(
        "independent_draws",
        off=False,
        says="draw the feature noise for each field apart, after the activation; else one draw covers all",
        label="drawn for each field apart",
        place=100,
        touches=FEATURES,
        transform=own_draws,
        needs=(("feature_noise",), HOW),
    ),
)
