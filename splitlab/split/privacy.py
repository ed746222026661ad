"""What a split client's messages honestly buy: the privacy events of images and hints, and what a run may claim."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.privacy.accounting import ADJACENCIES, PrivacyEvent, epsilon
from splitlab.split.config import TrainConfig
from splitlab.split.defences import Defences
from splitlab.split.defences.hint_layout_noise import LAYOUT_SENSITIVITY
from splitlab.split.defences.matched import sent_timesteps, signal_level

DELTA = 1e-5
"""The δ at which a run's ε is stated."""


def message_mu(alpha_bar: float, *, norm: float, feature_noise: float, adjacency: str = "replace_one") -> float:
    """Return μ of the image in one message whose latents were clipped to `norm` and noised by one shared draw.

    The message is a function of sqrt(ᾱ) latents + sqrt(1 - ᾱ) noise + σ1 n. The label gives `noise` away and it is
    independent of the image, so what is left is a Gaussian mechanism of std σ1 on sqrt(ᾱ) latents, and two neighbours
    are at most sqrt(ᾱ) 2 R apart ("replace_one": another image) or sqrt(ᾱ) R ("add_remove_one": zero latents in its
    place). μ is that distance over σ1 (Dong et al. 2022, Thm 2.7). Scaling, activation and rounding only process it.
    What hint and prompt say of the image needs a mechanism of its own (`hint_event`, `hide_prompts`).

    Args:
        alpha_bar: ᾱ in [0, 1] of the noised latents before feature noise (`signal_level`).
        norm: R > 0, the L2 norm to which the client clips each sample's latents.
        feature_noise: σ1 > 0.
        adjacency: "replace_one" or "add_remove_one".

    Raises:
        InputError: there is no bound or no noise, and so no guarantee.
    """
    if adjacency not in ADJACENCIES:
        raise InputError(f"adjacency must be one of {', '.join(ADJACENCIES)}, got {adjacency!r}")
    if not 0 <= alpha_bar <= 1:
        raise InputError(f"alpha_bar must lie in [0, 1], got {alpha_bar}")
    if not 0 < norm < math.inf:
        raise InputError(f"noise without a bound on what it hides has no ε: clip to a norm above 0, got {norm}")
    if not 0 < feature_noise < math.inf:
        raise InputError(f"a bound without noise has no ε: give a noise above 0, got {feature_noise}")
    return math.sqrt(alpha_bar) * ADJACENCIES[adjacency] * norm / feature_noise


def message_events(
    defences: Defences, alphas_cumprod: Float[Tensor, " T"], *, messages: int = 1, adjacency: str = "replace_one"
) -> tuple[PrivacyEvent, PrivacyEvent]:
    """Return the events of sending one image and its hint `messages` times, both bounded by `latent_norm`.

    They cover all that S1's client sends of the two (`matched_message_event`, `hint_event`); ε is that of both in one
    list. A noised layout in place of the hint needs no norm: its three numbers are bounded by themselves. The prompt is
    covered if it is hidden, and else it is sent as it is.

    Raises:
        InputError: the image or the hint has no bound or no noise, and so the message has no guarantee.
    """
    norm = defences.latent_norm
    image = matched_message_event(defences, alphas_cumprod, norm=norm, messages=messages, adjacency=adjacency)
    if defences.hint_layout_noise:  # drawn once per image, and bounded by what a layout can be
        return image, hint_event(defences.hint_layout_noise, norm=LAYOUT_SENSITIVITY / 2, adjacency=adjacency)
    repeats = 1 if defences.per_image_noise else messages
    return image, hint_event(defences.hint_noise, norm=norm, messages=repeats, adjacency=adjacency)


def matched_message_event(
    defences: Defences,
    alphas_cumprod: Float[Tensor, " T"],
    *,
    norm: float,
    messages: int = 1,
    adjacency: str = "replace_one",
) -> PrivacyEvent:
    """Return the event of sending one image `messages` times with feature noise, matched or not: its `message_mu`.

    Each message draws its noise anew, so that messages of later epochs compose. Timesteps are sent and do not depend
    on the image; the floor's has the largest ᾱ and bounds all others. With `per_image_noise` all messages are computed
    from one noised copy of the latents: one event, ᾱ = 1, however often they are sent.

    Raises:
        InputError: no feature noise, no bound, or draws that are independent between fields (two views of one image).
    """
    if defences.independent_draws:
        raise InputError("independent_draws sends the image twice, through an activation: no ε; switch it off")
    alpha_bar, repeats = 1.0, 1
    if not defences.per_image_noise:
        floor = alphas_cumprod.new_tensor([defences.timestep_floor]).long()
        named = sent_timesteps(defences, floor, alphas_cumprod)
        alpha_bar, repeats = float(signal_level(defences, named, alphas_cumprod)), messages
    mu = message_mu(alpha_bar, norm=norm, feature_noise=defences.feature_noise, adjacency=adjacency)
    return PrivacyEvent("gaussian", 1 / mu, 1.0, repeats, adjacency)


def hint_event(hint_noise: float, *, norm: float, messages: int = 1, adjacency: str = "replace_one") -> PrivacyEvent:
    """Return the event of sending one hint `messages` times, clipped to `norm`, under noise of std `hint_noise`.

    The server subtracts the latents, which it was sent, and is left with the hint and the hint's own noise: a Gaussian
    mechanism. Hints are often computed from the image, so its whole message is both events in one list.

    Raises:
        InputError: there is no bound or no noise, and so no guarantee.
    """
    mu = message_mu(1.0, norm=norm, feature_noise=hint_noise, adjacency=adjacency)
    return PrivacyEvent("gaussian", 1 / mu, 1.0, messages, adjacency)


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


def message_guarantee(defences: Defences, alphas_cumprod: Float[Tensor, " T"]) -> Guarantee:
    """Account for one message of one sample; what acts on several samples together earns no ε and is left out."""
    once = TrainConfig(scheme="split", steps=1, batch_size=1, defences=defences.of_one_sample)
    return guarantee(once, alphas_cumprod, n=1)


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
    if not any(defence.adds and defence.adds.gaussian for defence in defences.active):
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
