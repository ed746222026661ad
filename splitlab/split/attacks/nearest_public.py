"""Which public sample could have sent this message? Bayes over the public data, image and hint together."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion import metrics
from splitlab.split.attacks.accumulation import FLOOR
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view
from splitlab.split.attacks.posterior import CalibrationSet, public_posterior, used_fields
from splitlab.split.attacks.record import Attack, Family
from splitlab.split.messages import Knowledge, Observation, Reconstruction

SHARPNESS = (1.0, 2.0, 4.0, 64.0)
"""What the attacker tries: from the mean of all that is likely to the likeliest sample alone."""

GALLERY = 100
"""Public samples among which the attacker tries to recognise its own."""


@torch.no_grad()
def nearest_public(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    sharpness: float = 0.0,
) -> Reconstruction:
    """Weigh every public sample by how likely it is to have sent each message, and answer with the weighted mean.

    Image and hint are weighed together: p(view | latents) p(hint view | hint latents), both Gaussian of known size
    (`channel.latent_view`, `closed_form.hint_latents`), over samples that are equally likely before (Bayes). Where
    noise hides most, the mean resembles no image in particular, so the weights may be raised to a power: the one that
    recognises most public samples, each ruled out as its own answer, in a gallery of public ones.

    Args:
        observations: what was sent; needs `timesteps` and `noisy_latents`.
        knowledge: the threat model.
        generator: of the simulated messages.
        callback: told of every sharpness tried and the share of simulated messages it recognises.
        sharpness: the power; 0: choose among `SHARPNESS`.

    Raises:
        InputError: a needed field was not sent, or `sharpness` is negative.
    """
    if not sharpness >= 0:
        raise InputError(f"sharpness is a power above 0 (0: chosen by calibration_set), got {sharpness}")
    seen, public = labelled(observations, knowledge), knowledge.public
    view, std = latent_view(seen, knowledge)
    calibration_set = CalibrationSet(seen, observations, knowledge, generator)
    raw = calibration_set.clamp(hint_latents(seen, observations, knowledge))
    images, hints = public.images.flatten(1), public.need_hints().flatten(1)
    objective: tuple[float, ...] = ()
    if not sharpness:
        own = calibration_set.chosen
        gallery_indices = metrics.draw_galleries(len(public), own, min(GALLERY, len(public)), generator)
        scores = []
        for tried in SHARPNESS:
            weights = _weights(
                calibration_set.view, calibration_set.std, calibration_set.raw_hints, calibration_set, tried, own=own
            )
            known = _recognised(weights @ images, images, gallery_indices)
            known = known | _recognised(weights @ hints, hints, gallery_indices)
            scores.append(float(known.float().mean()))
            if callback:
                callback("nearest_public", len(scores), len(SHARPNESS), scores[-1])
        sharpness, objective = SHARPNESS[scores.index(max(scores))], tuple(scores)
    weights = _weights(view, std, raw, calibration_set, sharpness)
    used = used_fields(seen.without("encoder_hidden_states")) if seen.encoder_hidden_states is not None else None
    used = used or used_fields(seen)
    return Reconstruction(
        (weights @ images).view(-1, *public.images.shape[1:]),
        (weights @ hints).view(-1, *public.need_hints().shape[1:]),
        used=used if raw is None else (*used, "smashed"),
        objective=objective,
        n_evals=1,
    )


def _recognised(found: Tensor, public: Tensor, gallery_indices: Tensor) -> Bool[Tensor, " n"]:
    shape = (-1, 1, 1, public.shape[1])
    return metrics.identified(found.view(shape), public.view(shape), gallery_indices)


def _weights(
    view: Tensor,
    std: Tensor,
    raw: Tensor | None,
    calibration_set: CalibrationSet,
    sharpness: float,
    own: Tensor | None = None,
) -> Float[Tensor, "n m"]:
    clues = [(view, std.flatten().clamp_min(FLOOR), calibration_set.data.latents)]
    if raw is not None:
        noise = torch.full((len(raw),), max(calibration_set.hint_std(), FLOOR))
        clues.append((raw, noise, calibration_set.public_hints))
    return public_posterior(clues, own=own, sharpness=sharpness)


SAMPLES = Family(
    "Nearest public samples",
    "Public samples are sent by an imitation of the client; those that resemble a message most in image and "
    "hint together stand for what was sent.",
)

ATTACKS = (
    Attack(
        nearest_public,
        "nearest public samples",
        rank=40,
        family=SAMPLES,
        reason="image and hint together still tell which public sample they resemble",
    ),
)
