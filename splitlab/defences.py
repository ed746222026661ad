"""What a client does to a message before it leaves: pure transforms, folded left to right.

A defence is public; what it draws and the client's key are not. Each names the fields it may change, and a test holds
it to that. The timestep floor is no transform of a message: it decides how timesteps are drawn, before there is one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from splitlab.config import Defences
from splitlab.controlnet import symsigmoid
from splitlab.errors import InputError
from splitlab.seeds import generator
from splitlab.types import Observation

Transform = Callable[[Observation, torch.Generator], Observation]


@dataclass(frozen=True)
class Defence:
    """A transform of messages and the observation fields that it may change."""

    name: str
    touches: tuple[str, ...]
    apply: Transform


def draw_timesteps(defences: Defences, batch: int, n_timesteps: int, draw: torch.Generator) -> Int[Tensor, " b"]:
    """Draw timesteps uniformly from [timestep_floor, T) (S1's timestep sampling policy).

    Raises:
        InputError: the floor leaves no timestep.
    """
    if defences.timestep_floor >= n_timesteps:
        raise InputError(
            f"timestep_floor {defences.timestep_floor} leaves none of the {n_timesteps} timesteps: lower it"
        )
    return torch.randint(defences.timestep_floor, n_timesteps, (batch,), generator=draw)


def fixed_noise_tensor(defences: Defences, shape: tuple[int, ...], client_key: int) -> Tensor:
    """Return a client's secret tensor `[c, h, w]`, the same for every message it ever sends."""
    return torch.randn(shape, generator=generator("fixed noise", client_key)) * defences.fixed_noise


def transforms(defences: Defences, *, client_key: int) -> tuple[Defence, ...]:
    """Return the transforms that `defences` switches on, in the order in which a client applies them."""
    chain = []
    if defences.symsigmoid:
        chain.append(Defence("symsigmoid", ("smashed",), _symsigmoid))
    if defences.fixed_noise:
        chain.append(Defence("fixed_noise", ("smashed",), _add_fixed_noise(defences, client_key)))
    if defences.hide_prompts:
        chain.append(Defence("hide_prompts", ("encoder_hidden_states",), _hide_prompts))
    if defences.half:
        floats = ("noisy_latents", "smashed", "noise", "encoder_hidden_states")
        chain.append(Defence("half", ("timesteps", *floats), _half))
    return tuple(chain)


def protect(message: Observation, chain: tuple[Defence, ...], draw: torch.Generator) -> Observation:
    """Fold `chain` over a message."""
    for defence in chain:
        message = defence.apply(message, draw)
    return message


def _symsigmoid(message: Observation, draw: torch.Generator) -> Observation:
    return replace(message, smashed=symsigmoid(message.need("smashed")))


def _add_fixed_noise(defences: Defences, client_key: int) -> Transform:
    def add(message: Observation, draw: torch.Generator) -> Observation:
        smashed = message.need("smashed")
        noise = fixed_noise_tensor(defences, tuple(smashed.shape[1:]), client_key)
        return replace(message, smashed=smashed + noise)

    return add


def _hide_prompts(message: Observation, draw: torch.Generator) -> Observation:
    return replace(message, encoder_hidden_states=None)


def _half(message: Observation, draw: torch.Generator) -> Observation:
    return message.map(lambda value: value.half() if value.is_floating_point() else value.to(torch.int16))
