"""What a client does to hide: one file per defence, which says all there is to say of it.

Every module here with `DEFENCES`, a tuple of `Defence` records, joins the catalogue: parameters, tables, report and
playground follow. A defence is a pure function of message, settings and draws; it names the fields that it may change,
and a test holds it to that.
"""

from splitlab.core.catalogue import catalogue
from splitlab.core.seeds import Key, Source, source
from splitlab.data.image_set import ImageSet
from splitlab.split.defences.record import Defence, Defences, declared, read_defences, recorded
from splitlab.split.messages import Observation

__all__ = ["Defence", "Defences", "read_defences", "recorded"]

DEFENCES: dict[str, Defence] = catalogue(__name__, __path__, "DEFENCES")
"""By name, in the order in which a client applies them."""

declared(DEFENCES)


def protect(message: Observation, defences: Defences, *, client_key: Key, draw: Source) -> Observation:
    """Fold the transforms that are on over a message, left to right."""
    for defence in defences.active:
        if defence.transform:
            message = defence.transform(message, defences, client_key, draw)
    return message


def disguises(defences: Defences) -> bool:
    """Say whether these defences change images or hints before they are encoded."""
    return any(defence.replaces for defence in defences.active)


def disguised(data: ImageSet, defences: Defences, *, key: Key) -> ImageSet:
    """Return a data set as its client uses it: every image and hint is replaced once, whatever is sent of it later.

    Args:
        data: the client's own images, hints and prompts.
        defences: those that replace images or hints count; without any, `data` is returned.
        key: what the draws follow from.

    Raises:
        InputError: a defence cannot be applied to these data.
    """
    if not disguises(defences):
        return data
    draws = [source("disguise", key, index) for index in range(len(data))]
    for defence in defences.active:
        if defence.replaces:
            data = defence.replaces(data, defences, draws)
    return data


def unseen(defences: Defences) -> tuple[Defence, ...]:
    """Return the defences that change the noisy latents in a way that `latent_view` does not take into account."""
    return tuple(d for d in defences.active if "noisy_latents" in d.touches and not d.in_latent_view)


def unseen_variance(defences: Defences) -> float:
    """Return the variance of the noise that `unseen` defences add to the noisy latents, Gaussian or not."""
    return sum((defence.adds.std(defences) ** 2 for defence in unseen(defences) if defence.adds), 0.0)
