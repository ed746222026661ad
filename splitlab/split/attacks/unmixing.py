"""Undo a secret mixing key: the mixtures span the affine hull of the images, and hardly anything else in it is one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.base import Encoded, encoded, noised
from splitlab.diffusion.controlnet import symsigmoid
from splitlab.split.attacks.closed_form import closed_form
from splitlab.split.attacks.latent_view import labelled, latent_view
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.attacks.simulated_client import imitable
from splitlab.split.defences.matched import signal_level
from splitlab.split.defences.record import FEATURES
from splitlab.split.messages import Knowledge, Observation, Reconstruction, senders

OVERLAPS = (0.3, 0.5, 0.7)
"""Largest correlations of two starting sources, each tried as a start; the likeliest outcome is kept."""


def unmixing(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    rounds: Annotated[int, Option("of refinement", least=0)] = 12,
    bandwidth: Annotated[float, Option("variance of the public density's kernel / public variance", above=0)] = 0.1,
) -> Reconstruction:
    """Find the inverse W of each secret key K, unmix all fields with it, and solve the rest in closed form.

    Samples that are mixed share timestep and noise, and the rows of K sum to one: with the label, K latents follows
    exactly, and W has rows that sum to one as well, so that neither sign nor scale is open. A key that is used again
    is found by FastICA over all its groups (Hyvärinen 1999). For a key used once, the start are the public samples,
    sent as the client would send them, that lie nearest to the span of the mixtures (`search`). Either is refined by
    denoising source separation (`refine`).

    Sources come in the order of their largest weights in the mixtures: no attacker can know a group's true order.

    Needs `noisy_latents`, `timesteps` and the label; `smashed` helps where it can be imitated: a client without trained
    parts or fixed noise. The objective is each key's log-likelihood per source.

    Raises:
        InputError: key_mixing is off, patch_shuffle is on as well, or messages are not whole groups.
    """
    # Step 1: with the label, mixtures of latents follow exactly; whiten them by the public data.
    group, fresh = knowledge.defences.key_mixing, knowledge.defences.fresh_keys
    _check(observations, knowledge)
    seen = labelled(observations, knowledge)
    seen.need("noise")
    spaces = _spaces(seen, knowledge)

    # Step 2: find each key's inverse.
    owner = torch.arange(len(spaces)) if fresh else senders(observations)[::group]
    unmixers, scores = torch.empty(len(spaces), group, group), []
    keys = owner.unique().tolist()
    for key in tqdm(keys, desc="unmixing", mininterval=2, leave=False):
        groups = [spaces[i] for i in (owner == key).nonzero().flatten().tolist()]
        score, unmixers[owner == key] = _unmixer(groups, fresh, generator, rounds, bandwidth)
        scores.append(score)
        if callback:
            callback("unmixing", len(scores), len(keys), score)

    # Step 3: unmix all fields, and solve the rest in closed form.
    plain = replace(knowledge, defences=replace(knowledge.defences, key_mixing=0, fresh_keys=False))
    result = closed_form(_unmixed(observations, unmixers), plain, generator=generator)
    used = tuple(dict.fromkeys((*result.used, *(("smashed",) if _hinted(seen, knowledge) else ()))))
    return replace(result, used=used, objective=tuple(scores), n_evals=rounds)


def _unmixer(
    groups: Sequence["Space"], fresh: bool, generator: torch.Generator, rounds: int, bandwidth: float
) -> tuple[float, Float[Tensor, "g g"]]:
    """Return the objective and the W of the groups that one key mixed: the likeliest that any start leads to."""
    columns = torch.cat([space.mixtures for space in groups], 1)
    if fresh:
        starts = [search(groups[0], overlap, generator) for overlap in OVERLAPS]
    else:
        starts = [fast_ica(columns, generator)]
    score, unmixer = max((refine(groups, start, rounds, bandwidth) for start in starts), key=lambda pair: pair[0])
    return score, _in_slots(_affine(unmixer, columns))


def _check(observations: Sequence[Observation], knowledge: Knowledge) -> None:
    group = knowledge.defences.key_mixing
    if not group:
        raise InputError("unmixing undoes key_mixing, which is not on here: use closed_form")
    if knowledge.defences.patch_shuffle:
        raise InputError("unmixing cannot undo patch_shuffle, which is on as well: try no-information attacks only")
    for message in observations:
        if message.batch_size % group:
            raise InputError(
                f"message {message.sequence} of client {message.client} has {message.batch_size} samples, "
                f"not whole groups of key_mixing {group}: give messages as they were sent"
            )


@dataclass(frozen=True)
class Space:
    """One group's mixtures and the public data, sent as the client would, in whitened coordinates.

    Principal components of the public data, scaled to unit variance, so that sources are nearly orthogonal there.

    Attributes:
        mixtures: `[g, d]`: K sources (`[q, g, d]` for several groups).
        public: `[m, d]`.
    """

    mixtures: Tensor
    public: Tensor


def _hinted(seen: Observation, knowledge: Knowledge) -> bool:
    fixed = knowledge.defences.fixed_noise or knowledge.defences.independent_draws
    return imitable(knowledge) and seen.smashed is not None and not fixed


def _spaces(seen: Observation, knowledge: Knowledge) -> list[Space]:
    """Return one space per group; what the label and the timestep decide is imitated on the public data."""
    group, defences = knowledge.defences.key_mixing, knowledge.defences
    data = encoded(knowledge.base, knowledge.public, cache=knowledge.cache)
    view, std = (part.unflatten(0, (-1, group)) for part in latent_view(seen, knowledge))
    levels = std[:, 0].flatten().tolist()
    images = (
        [_whitened(v, data.latents, s) for v, s in zip(view, levels, strict=True)]
        if max(levels)
        else _shared(view, data.latents)
    )
    if not _hinted(seen, knowledge):
        return images
    smashed, noisy_latents = (seen.need(name).unflatten(0, (-1, group)) for name in ("smashed", "noisy_latents"))
    if not defences.symsigmoid:
        hints = _shared(smashed - noisy_latents, data.hint_latents)
    else:
        firsts = torch.arange(0, seen.batch_size, group).split(1)
        hints = [
            _whitened(mixtures, _imitated(seen, first, data, knowledge), defences.feature_noise)
            for mixtures, first in zip(smashed, firsts, strict=True)
        ]
    both = zip(images, hints, strict=True)
    return [Space(torch.cat([i.mixtures, h.mixtures], 1), torch.cat([i.public, h.public], 1)) for i, h in both]


def _shared(mixtures: Float[Tensor, "q g c h w"], public: Float[Tensor, "m c h w"]) -> list[Space]:
    """Whiten all groups alike."""
    space = _whitened(mixtures, public, 0.0)
    return [Space(mixture, space.public) for mixture in space.mixtures]


def _imitated(seen: Observation, first: Tensor, data: Encoded, knowledge: Knowledge) -> Float[Tensor, "m c h w"]:
    """Return public activations at the timestep and noise of sample `first`, which its group shares."""
    alphas = signal_level(knowledge.defences, seen.need("timesteps")[first], knowledge.base.alphas_cumprod)
    noise = seen.need("noise")[first].expand_as(data.latents)
    return symsigmoid(data.hint_latents + noised(data.latents, noise, alphas.expand(len(data), -1, -1, -1)))


def _whitened(
    mixtures: Float[Tensor, "*q g c h w"], public: Float[Tensor, "m c h w"], std: float, *, keep: float = 1e-3
) -> Space:
    """Whiten by the components with at least `keep` of the largest variance; `std`: noise the sources carry."""
    mean = public.flatten(1).mean(0)
    centred = public.flatten(1) - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    kept = values > keep * values[-1]
    whiten = vectors[:, kept] / (values[kept] + std**2).sqrt()
    return Space((mixtures.flatten(-3) - mean) @ whiten, centred @ whiten)


def fast_ica(
    columns: Float[Tensor, "g s"], generator: torch.Generator, *, iterations: int = 200, restarts: int = 3
) -> Float[Tensor, "g g"]:
    """Unmix by symmetric FastICA with G = log cosh (Hyvärinen 1999, eq. 20 with symmetric orthogonalisation).

    Of several random starts, the one farthest from Gaussian is kept (negentropy as in eq. 6 there).
    """
    n = len(columns)
    basis, whiten = _basis(columns)
    white, best, most = basis * math.sqrt(columns.shape[1]), torch.eye(n), -math.inf
    for _ in range(restarts):
        rows = _orthogonal(torch.randn(n, n, generator=generator))
        for _ in range(iterations):
            bent = torch.tanh(rows @ white)
            update = bent @ white.T / white.shape[1] - (1 - bent.square()).mean(1, keepdim=True) * rows
            last, rows = rows, _orthogonal(update)
            if (1 - (last * rows).sum(1).abs()).max() < 1e-6:
                break
        gaussian = 0.374567  # E log cosh of a standard normal number
        negentropy = float(((rows @ white).cosh().log().mean(1) - gaussian).square().sum())
        if negentropy > most:
            best, most = rows, negentropy
    return _signed(best @ whiten)


def search(space: Space, overlap: float, generator: torch.Generator) -> Float[Tensor, "g g"]:
    """Find W for a key used once: the public samples nearest to the mixtures' span stand for the sources.

    A public sample is taken if its projection correlates with those already taken by less than `overlap`.
    """
    basis, whiten = _basis(space.mixtures)
    group = len(basis)
    inside = space.public @ basis.T
    outside = 1 - inside.square().sum(1) / space.public.square().sum(1)
    directions = F.normalize(inside[outside.argsort()[: 50 * group]], dim=1)
    overlaps = (directions @ directions.T).abs().numpy()
    taken = [0]
    for i in range(1, len(directions)):
        if len(taken) < group and overlaps[i, taken].max() < overlap:
            taken.append(i)
    kept = directions[taken]
    rest = torch.randn(group - len(kept), group, generator=generator)
    rest = rest - rest @ torch.linalg.pinv(kept) @ kept
    return _signed(_orthogonal(torch.cat([kept, F.normalize(rest, dim=1)])) @ whiten)


def refine(
    spaces: Sequence[Space], unmixer: Float[Tensor, "g g"], rounds: int, bandwidth: float
) -> tuple[float, Float[Tensor, "g g"]]:
    """Denoising source separation (Särelä & Valpola 2005): denoise the sources, move W to meet them, orthogonalise.

    The denoiser is the best one for the public data blurred by a Gaussian kernel: the mean of all public samples
    weighted by that kernel (Nadaraya 1964; Watson 1964).

    Returns the mean log-density of the sources under that blur, up to a constant, and W, of the best round.
    """
    basis, whiten = _basis(torch.cat([space.mixtures for space in spaces], 1))
    best, most = unmixer, -math.inf
    for _ in range(rounds + 1):
        moved, score = torch.zeros_like(unmixer), 0.0
        start = 0
        for space in spaces:
            sources = unmixer @ space.mixtures
            width = sources.shape[1]
            logits = -torch.cdist(sources, space.public).square() / (2 * bandwidth * width)
            score += float(logits.logsumexp(1).mean()) / len(spaces)
            moved += (logits.softmax(1) @ space.public) @ basis[:, start : start + width].T
            start += width
        if score > most:
            best, most = unmixer, score
        unmixer = _signed(_orthogonal(moved) @ whiten)
    return most, best


def _basis(columns: Float[Tensor, "g s"]) -> tuple[Float[Tensor, "g s"], Float[Tensor, "g g"]]:
    """Return an orthonormal basis of the mixtures' span, and the matrix that makes unit-variance mixtures of it."""
    left, values, basis = torch.linalg.svd(columns, full_matrices=False)
    scale = math.sqrt(columns.shape[1]) / values.clamp_min(1e-6 * values[0])
    return basis, scale[:, None] * left.T


def _orthogonal(rows: Float[Tensor, "g g"]) -> Float[Tensor, "g g"]:
    left, _, right = torch.linalg.svd(rows)
    return left @ right


def _signed(unmixer: Float[Tensor, "g g"]) -> Float[Tensor, "g g"]:
    """Turn sources so that the rows of W have positive sums: they should be one."""
    return torch.where(unmixer.sum(1, keepdim=True) < 0, -unmixer, unmixer)


def _affine(unmixer: Float[Tensor, "g g"], columns: Float[Tensor, "g s"]) -> Float[Tensor, "g g"]:
    """Make every row sum to one by the change that moves its source least."""
    least = torch.linalg.solve(columns @ columns.T, torch.ones(len(columns)))
    return unmixer + (1 - unmixer.sum(1, keepdim=True)) * least / least.sum()


def _in_slots(unmixer: Float[Tensor, "g g"]) -> Float[Tensor, "g g"]:
    """Order sources so that each stands where its weight is largest: the assignment of largest total weight."""
    _, sources = linear_sum_assignment(-torch.linalg.pinv(unmixer).numpy())
    return unmixer[torch.from_numpy(sources)]


def _unmixed(observations: Sequence[Observation], unmixers: Float[Tensor, "k g g"]) -> list[Observation]:
    """Apply W to the fields that were mixed, message by message."""
    group, first, undone = unmixers.shape[1], 0, []
    for message in observations:
        n_groups = message.batch_size // group
        whole = torch.block_diag(*unmixers[first : first + n_groups])
        first += n_groups
        mixed = {name: value.float() for name, value in message.tensors.items() if name in FEATURES}
        fields: dict[str, Any] = {k: torch.einsum("ij,jchw->ichw", whole, v) for k, v in mixed.items()}
        undone.append(replace(message.float(), **fields))
    return undone


UNMIXING = Family(
    "Mixing by a secret key",
    "Samples that share timestep and noise are mixed by a secret row-stochastic matrix. Subtracting the known "
    "noise leaves linear mixtures of latents, which blind source separation takes apart.",
)

ATTACKS = (
    Attack(
        unmixing,
        "unmixing",
        rank=80,
        family=UNMIXING,
        reason="a linear key over many messages is undone by blind source separation",
    ),
)
