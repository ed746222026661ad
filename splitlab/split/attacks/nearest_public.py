"""Which public sample could have sent this message? Bayes over the public data, image and hint together."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.progress import Callback
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.split.attacks.calibration import GALLERY, CalibrationSet, choose_sharpness, public_posterior
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import FLOOR, labelled, latent_view, used_fields
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.messages import Knowledge, Observation, Reconstruction


@torch.no_grad()
def nearest_public(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    sharpness: Annotated[float, Option("power of the weights; 0: the one that recognises most", least=0)] = 0.0,
) -> Reconstruction:
    """Weigh every public sample by how likely it is to have sent each message, and answer with the weighted mean.

    Image and hint are weighed together: p(view | latents) p(hint view | hint latents), both Gaussian of known size
    (`latent_view`, `hint_latents`), over samples that are equally likely before (Bayes). Where noise hides most, the
    mean resembles no image in particular, so the weights may be raised to a power: the one that recognises most public
    samples, each ruled out as its own answer, in a gallery of public ones. Needs `timesteps` and `noisy_latents`.
    """
    # Step 1: reduce the messages to views of image and hint with Gaussian noise, and play the client on public data.
    seen, public = labelled(observations, knowledge), knowledge.public
    view, std = latent_view(seen, knowledge)
    simulated = CalibrationSet(seen, observations, knowledge, generator)
    raw_hints = simulated.clamp(hint_latents(seen, observations, knowledge))

    # Step 2: choose how bold to be, by the public samples that are recognised in their own messages.
    objective: tuple[float, ...] = ()
    if not sharpness:
        truth = simulated.chosen
        galleries = metrics.draw_galleries(len(public), truth, min(GALLERY, len(public)), generator)

        def recognised(power: float) -> Tensor:
            weights = _weights(simulated.view, simulated.std, simulated.raw_hints, simulated, power, ruled_out=truth)
            pairs = zip(_means(weights, public), (public.images, public.need_hints()), strict=True)
            return torch.stack([metrics.identified(mean, gallery, galleries) for mean, gallery in pairs]).any(0)

        sharpness, objective = choose_sharpness(recognised, "nearest_public", callback)

    # Step 3: answer with the means of all public samples under their weights.
    images, hints = _means(_weights(view, std, raw_hints, simulated, sharpness), public)
    used = used_fields(seen, prompts=False)
    used = used if raw_hints is None else (*used, "smashed")
    return Reconstruction(images, hints, used=used, objective=objective, n_evals=1)


def _means(weights: Float[Tensor, "n m"], public: ImageSet) -> list[Float[Tensor, "n 3 s s"]]:
    """Return weighted means of the public images and of their hints."""
    return [(weights @ part.flatten(1)).view(-1, *part.shape[1:]) for part in (public.images, public.need_hints())]


def _weights(
    view: Tensor,
    std: Tensor,
    raw_hints: Tensor | None,
    simulated: CalibrationSet,
    sharpness: float,
    *,
    ruled_out: Tensor | None = None,
) -> Float[Tensor, "n m"]:
    clues = [(view, std.flatten().clamp_min(FLOOR), simulated.data.latents)]
    if raw_hints is not None:
        noise = torch.full((len(raw_hints),), max(simulated.hint_std(), FLOOR))
        clues.append((raw_hints, noise, simulated.public_hints))
    return public_posterior(clues, ruled_out=ruled_out, sharpness=sharpness)


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
