"""What a run's clients may claim: the privacy events of all they sent of one image, or why there is none."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.privacy.accounting import PrivacyEvent, epsilon
from splitlab.split.config import TrainConfig
from splitlab.split.privacy import message_events

DELTA = 1e-5
"""The δ at which a run's ε is stated."""

NOISES = ("feature_noise", "hint_noise", "hint_layout_noise", "fixed_noise")
"""The defences that add noise."""


@dataclass(frozen=True)
class Guarantee:
    """What may be claimed for one image and its hint over a whole run, another image in its place.

    Attributes:
        events: the mechanisms that owned both a bound and a noise; none where there is no guarantee.
        why: why there is none; empty where there is one.
    """

    events: tuple[PrivacyEvent, ...] = ()
    why: str = ""

    @property
    def epsilon(self) -> float:
        """ε at `DELTA`; infinite without a guarantee."""
        return epsilon(self.events, DELTA) if self.events else math.inf


def guarantee(config: TrainConfig, alphas_cumprod: Float[Tensor, " T"], *, n: int) -> Guarantee:
    """Account for a run on `n` private samples: every image is sent once per epoch.

    It holds where the clients' draws are secret; of a run with a published key it is a simulation's
    (`TrainConfig.randomness`). Their defences are public. Prompts that are sent are not covered, and so there is no
    guarantee with them.

    Args:
        config: the run.
        alphas_cumprod: ᾱ of the noise schedule.
        n: private samples over all clients.
    """
    defences = config.defences
    if config.scheme not in ("split", "u_shaped"):
        return Guarantee(why=f"nothing that the scheme {config.scheme!r} shares is bounded and noised")
    if not any(getattr(defences, name) for name in NOISES):
        return Guarantee(why="no noise hides what the label does not reveal")
    if defences.fixed_noise and not defences.feature_noise:
        return Guarantee(why="fixed noise is one tensor for all messages: it is estimated from them and taken off")
    if not (defences.hide_prompts or defences.borrowed_colours):
        return Guarantee(why="prompts are sent as they are; hide them")
    if not defences.latent_norm:
        return Guarantee(why="noise without a bound on what it hides: clip the latents to a norm (latent_norm)")
    try:
        return Guarantee(message_events(defences, alphas_cumprod, messages=messages_per_image(config, n)))
    except InputError as error:
        return Guarantee(why=str(error))


def messages_per_image(config: TrainConfig, n: int) -> int:
    """Return how often the image that is sent most often is sent, with `n` samples in all."""
    return math.ceil(config.steps * config.batch_size / n)
