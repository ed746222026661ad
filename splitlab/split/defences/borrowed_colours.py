"""Borrowed colours: a shapes image in two public colours drawn at random, and the prompt that names those."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import Source
from splitlab.data.colours import COLOURS, are_shapes, rgb, split_prompt
from splitlab.data.image_set import ImageSet, changed
from splitlab.privacy.draws import integers
from splitlab.split.defences.record import Defence, Defences, latent_hints_only

LEAST_CONTRAST = 0.25 * math.sqrt(3.0)
"""Distance in RGB between borrowed colours: that of the shapes themselves."""


def borrow_colours(data: ImageSet, defences: Defences, draws: Sequence[Source]) -> ImageSet:
    """Recolour every image, and name the new colours in its prompt: both then say nothing of its own.

    Raises:
        InputError: the prompts do not name any colours.
    """
    if not are_shapes(data.prompts):
        raise InputError(
            "borrowed_colours needs prompts '<colour> circle with <colour> background', which say what to "
            "recolour; these are others: switch it off"
        )
    prompts = tuple(borrowed_prompt(draw) for draw in draws)
    return changed(data, images=in_colours(data.images, data.prompts, prompts), prompts=prompts)


def borrowed_prompt(draw: Source) -> str:
    """Draw a shapes prompt of two public colours, at least `LEAST_CONTRAST` apart, that says nothing of any image."""
    names = list(COLOURS)
    while True:
        disc, ground = (names[int(integers(0, len(names), (1,), draw))] for _ in range(2))
        if math.dist(rgb(disc), rgb(ground)) >= LEAST_CONTRAST:
            return f"{disc} circle with {ground} background"


def in_colours(
    images: Float[Tensor, "n 3 h w"], prompts: Sequence[str], new: Sequence[str]
) -> Float[Tensor, "n 3 h w"]:
    """Recolour shapes in [-1, 1] from the two colours that `prompts` name to those that `new` name.

    A pixel keeps its place between the two, in [0, 1] from ground to disc (`discs`): nothing else of it is kept.
    """
    disc, ground = colours_of(new)
    return ground + discs(images, prompts) * (disc - ground)


def discs(images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "n 1 h w"]:
    """Return each pixel's place between ground (0) and disc (1), from the colours that the prompt names."""
    disc, ground = colours_of(prompts)
    towards = disc - ground
    place = ((images - ground) * towards).sum(1, keepdim=True) / towards.square().sum(1, keepdim=True)
    return place.clamp(0.0, 1.0)


def colours_of(prompts: Sequence[str]) -> tuple[Float[Tensor, "n 3 1 1"], Float[Tensor, "n 3 1 1"]]:
    """Return the disc's and the ground's colours, in [-1, 1], that shapes prompts name."""
    pairs = [[rgb(name) for name in split_prompt(prompt)] for prompt in prompts]
    values = torch.tensor(pairs)[..., None, None] * 2.0 - 1.0
    return values[:, 0], values[:, 1]


FOR_SENT_HINTS = latent_hints_only(
    "hint_layout_noise, borrowed_colours, random_symmetry are for schemes 'split', 'u_shaped': give none"
)

DEFENCES = (
    Defence(
        "borrowed_colours",
        off=False,
        says="shapes only: once per image, recolour it to two public colours drawn at random, and send the prompt that "
        "names those",
        label="borrowed colours",
        place=1,
        touches=("noisy_latents", "smashed", "encoder_hidden_states"),
        replaces=borrow_colours,
        excludes=(
            ("hide_prompts",),
            "borrowed_colours sends prompts that say nothing of the image: leave hide_prompts or it out",
        ),
        refuses_run=FOR_SENT_HINTS,
    ),
)
