"""What is left out of a message: prompts, and half of the bits."""

from dataclasses import replace

import torch

from splitlab.core.seeds import Key, Source
from splitlab.split.defences.record import FLOATS, Defence, Defences
from splitlab.split.messages import Observation


def hide_prompts(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Send no text embeddings."""
    return replace(message, encoder_hidden_states=None)


def halve(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Send 16 bits per number."""
    return message.map(lambda value: value.half() if value.is_floating_point() else value.to(torch.int16))


DEFENCES = (
    Defence(
        "hide_prompts",
        off=False,
        says="send no text embeddings; the server trains with zeros",
        label="prompts hidden",
        place=150,
        touches=("encoder_hidden_states",),
        transform=hide_prompts,
    ),
    Defence(
        "half",
        off=False,
        says="send fp16 (and 16-bit timesteps)",
        label="fp16",
        place=160,
        touches=("timesteps", *FLOATS),
        transform=halve,
    ),
)
