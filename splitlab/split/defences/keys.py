"""Secret keys: samples mixed with one another, or the patches of each in another order."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.seeds import Key, Source, source
from splitlab.privacy.draws import normal, permutation, uniform
from splitlab.split.defences.record import FEATURES, Defence, Defences
from splitlab.split.messages import Observation


def draw_noise(defences: Defences, shape: tuple[int, ...], draw: Source) -> Float[Tensor, "b c h w"]:
    """Draw the diffusion noise of a batch; samples that are mixed with one another share it."""
    group = defences.key_mixing or 1
    drawn = normal((math.ceil(shape[0] / group), *shape[1:]), draw)
    return drawn.repeat_interleave(group, 0)[: shape[0]]


def mixing_key(n: int, draw: Source) -> Float[Tensor, "n n"]:
    """Draw a row-stochastic matrix, its rows uniform on the simplex (Dirichlet with all parameters 1)."""
    weights = -uniform((n, n), draw).clamp_min(1e-9).log()
    return weights / weights.sum(1, keepdim=True)


def mix(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Mix every group of samples by a key: the client's own, or one drawn anew."""
    n = defences.key_mixing
    if message.batch_size % n:
        raise InputError(f"key_mixing {n} does not divide a batch of {message.batch_size}: change either")
    kept = mixing_key(n, source("mixing key", client_key))
    keys = [mixing_key(n, draw) if defences.fresh_keys else kept for _ in range(message.batch_size // n)]
    whole, maps = torch.block_diag(*keys), {name: message.need(name) for name in FEATURES}
    return message.changed(**{k: torch.einsum("ij,jchw->ichw", whole.to(v), v) for k, v in maps.items()})


def shuffle(message: Observation, defences: Defences, client_key: Key, draw: Source) -> Observation:
    """Permute patches alike in all maps, the label included: the server could not train otherwise."""
    side, latents = defences.patch_shuffle, message.need("noisy_latents")
    n, (height, width) = len(latents), latents.shape[2:]
    if height % side or width % side:
        raise InputError(f"patch_shuffle {side} does not divide latents of {height}x{width}: give a divisor")
    places = height * width // side**2
    keys = draw if defences.fresh_keys else source("patch key", client_key)
    order = torch.stack([permutation(places, keys) for _ in range(n if defences.fresh_keys else 1)]).expand(n, -1)
    maps = {name: getattr(message, name) for name in (*FEATURES, "noise")}
    moved = {k: from_patches(to_patches(v, side), order, side) for k, v in maps.items() if v is not None}
    return message.changed(**moved)


def to_patches(maps: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n p d"]:
    """Cut maps into their (h / side)(w / side) square patches, row by row, each flattened."""
    return torch.nn.functional.unfold(maps, side, stride=side).transpose(1, 2)


def from_patches(patches: Float[Tensor, "n p d"], order: Int[Tensor, "n p"], side: int) -> Float[Tensor, "n c h w"]:
    """Put patches together again to square maps, patch `order[i, j]` of sample i at place j."""
    moved = patches.gather(1, order[..., None].expand_as(patches)).transpose(1, 2)
    length = round(math.sqrt(patches.shape[1])) * side
    return torch.nn.functional.fold(moved, length, side, stride=side)


def _whole_groups(defences: Defences, scheme: str, batch_size: int) -> str:
    if batch_size % defences.key_mixing == 0:
        return ""
    return f"batch_size {batch_size} is no multiple of key_mixing {defences.key_mixing}: change either"


DEFENCES = (
    Defence(
        "key_mixing",
        off=0,
        says="mix that many samples, which share timestep and noise, by a secret row-stochastic key",
        label="{:g} samples mixed by a secret key",
        place=120,
        touches=FEATURES,
        transform=mix,
        in_latent_view=False,
        needs_several=True,
        least=2,
        must="is a number of samples, 2 or more (0: off)",
        refuses_run=_whole_groups,
        usual=(2, 4, 16),
    ),
    Defence(
        "patch_shuffle",
        off=0,
        says="cut messages into square patches of that side, in latent pixels, and permute them by a secret "
        "permutation",
        label="patches of side {:g} shuffled",
        place=130,
        touches=(*FEATURES, "noise"),
        transform=shuffle,
        in_latent_view=False,
        needs_several=True,
        must="is a patch's side and must be 0 or more",
        usual=(4, 2, 1),
    ),
    Defence(
        "fresh_keys",
        off=False,
        says="draw mixing keys and permutations anew for every message and sample; else one per client",
        label="keys drawn anew each time",
        place=140,
        touches=(*FEATURES, "noise"),
        in_latent_view=False,
        needs_several=True,
        needs=(
            ("key_mixing", "patch_shuffle"),
            "fresh_keys needs a key: switch key_mixing or patch_shuffle on, or leave it out",
        ),
    ),
)
