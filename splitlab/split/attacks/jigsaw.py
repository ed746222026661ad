"""Undo a secret permutation of patches: with the label, the attacker holds exact pieces, only their order is hidden."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.base import encoded
from splitlab.split.attacks.closed_form import closed_form, hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view
from splitlab.split.attacks.networks import fit, initialised
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.attacks.simulated_client import imitable
from splitlab.split.defences.keys import from_patches, to_patches
from splitlab.split.messages import Knowledge, Observation, Reconstruction, senders


def jigsaw(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: Annotated[int, Option("training steps of the transformer (AdamW, one cycle)", least=2)] = 1000,
    batch: Annotated[int, Option("samples per training step", least=1)] = 8,
    width: Annotated[int, Option("width of the transformer, a multiple of its 4 heads", least=4)] = 64,
    n_layers: Annotated[int, Option("layers of the transformer", least=1)] = 4,
    lr: Annotated[float, Option("highest learning rate", above=0)] = 3e-3,
    sweeps: Annotated[int, Option("most exchanges of two patches while fitting moments", least=0)] = 200,
) -> Reconstruction:
    """Find where each patch belongs, put all fields in order, and solve the rest in closed form.

    A permutation is the same for all fields, the label included, so each place's latents follow exactly. One
    permutation per client: the order under which the patches' means and covariances over all its samples fit those of
    public latents best (`place_by_moments`). A permutation per sample: a transformer without positions, trained on
    public data, names each patch's place from all the patches' contents, and an assignment makes a permutation of it
    (as in Noroozi & Favaro 2016, with places in the place of permutations).

    Needs `noisy_latents`, `timesteps` and the label; `smashed` helps unless a fixed noise hides the hints.

    Raises:
        InputError: patch_shuffle is off, or key_mixing is on as well.
    """
    defences = knowledge.defences
    if not defences.patch_shuffle:
        raise InputError("jigsaw undoes patch_shuffle, which is not on here: use closed_form")
    if defences.key_mixing:
        raise InputError("jigsaw cannot undo key_mixing, which is on as well: try no-information attacks only")
    # Step 1: with the label, each place's latents follow exactly; only the places are wrong.
    seen = labelled(observations, knowledge)
    seen.need("noise")
    plain = replace(knowledge, defences=replace(defences, patch_shuffle=0, fresh_keys=False))
    pieces, public = _pieces(seen, observations, plain, defences.patch_shuffle)

    # Step 2: find where each patch belongs.
    if defences.fresh_keys:
        solver, std = _Solver(public, width, n_layers, generator), latent_view(seen, plain)[1].flatten()
        objective = solver.fit(std, generator, callback, steps=steps, batch=batch, lr=lr)
        orders = solver(pieces)
    else:
        orders, objective = _fixed_orders(pieces, public, senders(observations), sweeps, callback)

    # Step 3: put all fields in order, and solve the rest in closed form.
    result = closed_form(_ordered(observations, orders, defences.patch_shuffle), plain, generator=generator)
    hinted = seen.smashed is not None and imitable(knowledge) and not defences.fixed_noise
    used = tuple(dict.fromkeys((*result.used, *(("smashed",) if hinted else ()))))
    return replace(result, used=used, objective=tuple(objective))


def _fixed_orders(
    pieces: Float[Tensor, "n p d"],
    public: Float[Tensor, "m p d"],
    owner: Int[Tensor, " n"],
    sweeps: int,
    callback: Callback | None,
) -> tuple[Int[Tensor, "n p"], list[float]]:
    """Find one order per client."""
    orders, fits = torch.empty(pieces.shape[:2], dtype=torch.int64), []
    clients = owner.unique().tolist()
    for client in clients:
        order, fit = place_by_moments(pieces[owner == client], public, sweeps=sweeps)
        orders[owner == client] = order
        fits.append(fit)
        if callback:
            callback("jigsaw", len(fits), len(clients), fit)
    return orders, fits


def _pieces(
    seen: Observation, observations: Sequence[Observation], knowledge: Knowledge, side: int
) -> tuple[Float[Tensor, "n p d"], Float[Tensor, "m p d"]]:
    """Return the patches of the messages and of the public data: of the image, and of the hint if it follows place by
    place, that is unless a fixed noise differs from place to place.
    """
    data = encoded(knowledge.base, knowledge.public, cache=knowledge.cache)
    maps, public = latent_view(seen, knowledge)[0], data.latents
    if not knowledge.defences.fixed_noise:
        hints = hint_latents(seen, observations, knowledge)
        if hints is not None:
            maps, public = torch.cat([maps, hints], 1), torch.cat([public, data.hint_latents], 1)
    return to_patches(maps, side), to_patches(public, side)


def _ordered(observations: Sequence[Observation], orders: Int[Tensor, "n p"], side: int) -> list[Observation]:
    """Put the patches of all shuffled fields in order, message by message."""
    ordered, first = [], 0
    for message in observations:
        order = orders[first : first + message.batch_size]
        first += message.batch_size
        names = ("noisy_latents", "smashed", "noise", "noise_pred", "noise_pred_gradient")
        fields = {name: value.float() for name, value in message.tensors.items() if name in names}
        moved: dict[str, Any] = {k: from_patches(to_patches(v, side), order, side) for k, v in fields.items()}
        ordered.append(replace(message, **moved))
    return ordered


def place_by_moments(
    pieces: Float[Tensor, "n p d"], public: Float[Tensor, "m p d"], *, sweeps: int = 200
) -> tuple[Int[Tensor, " p"], float]:
    """Find the one order of all samples' patches that makes them likeliest under a Gaussian fitted to public data.

    The start is the assignment of patches to places by each place's own Gaussian; then those two patches are exchanged
    whose exchange raises the likelihood of the whole most, neighbours' correlations included, until none does.

    Returns the order (place i takes patch `order[i]`) and the mean negative log-likelihood, up to a constant.
    """
    n_places, width = public.shape[1:]
    mean, scale = public.mean((0, 1)), public.flatten(0, 1).std(0)
    ours, theirs = (pieces - mean) / scale, (public - mean) / scale
    order = _assigned(_place_costs(ours, theirs))
    centre = theirs.flatten(1).mean(0)
    centred = theirs.flatten(1) - centre
    precision = torch.linalg.inv(centred.T @ centred / len(theirs) + 0.01 * torch.eye(n_places * width))
    moments = ours.flatten(1).T @ ours.flatten(1) / len(ours)
    blocks = [_blocks(matrix, n_places) for matrix in (precision, moments)]
    pairs = (blocks[0].flatten(0, 1) @ blocks[1].flatten(0, 1).T).reshape(n_places, n_places, n_places, n_places)
    linear = -2 * (precision @ centre).reshape(n_places, width) @ ours.mean(0).T
    return _exchanged(order, pairs, linear, sweeps)


def _blocks(matrix: Float[Tensor, "q q"], n_places: int) -> Float[Tensor, "p p e"]:
    width = len(matrix) // n_places
    return matrix.reshape(n_places, width, n_places, width).transpose(1, 2).flatten(2)


def _place_costs(pieces: Float[Tensor, "n p d"], public: Float[Tensor, "m p d"]) -> Float[Tensor, "p p"]:
    """Return the mean negative log-likelihood of patch j's samples under place i's Gaussian."""
    mean, width = public.mean(0), public.shape[2]
    centred = public - mean
    covariance = torch.einsum("npd,npe->pde", centred, centred) / len(public) + 0.01 * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
    costs = []
    for place in range(len(mean)):
        distance = ((pieces - mean[place]) @ factor[place]).square().sum(2).mean(0)
        costs.append(distance - 2 * factor[place].diagonal().log().sum())
    return torch.stack(costs)


def _assigned(costs: Float[Tensor, "p p"]) -> Int[Tensor, " p"]:
    return torch.from_numpy(linear_sum_assignment(costs.numpy())[1])


def _exchanged(
    order: Int[Tensor, " p"], pairs: Float[Tensor, "p p p p"], linear: Float[Tensor, "p p"], sweeps: int
) -> tuple[Int[Tensor, " p"], float]:
    """Exchange two patches at a time by steepest descent; `pairs[i, j, a, b]`: cost of patches a, b at places i, j."""
    places = torch.arange(len(order))
    first, second = torch.triu_indices(len(order), len(order), 1)
    for _ in range(sweeps):
        # the cost is x' pairs x + linear' x for the indicator x of (place, patch); an exchange changes four entries
        slope = 2 * pairs[places, :, order].sum(0) + linear
        left, right = order[first], order[second]
        moves = ((first, right, 1), (first, left, -1), (second, left, 1), (second, right, -1))
        change = sum((sign * slope[i, a] for i, a, sign in moves), torch.zeros(len(first)))
        for i, a, sign in moves:
            for j, b, other in moves:
                change = change + sign * other * pairs[i, j, a, b]
        if change.min() >= -1e-3:
            break
        best = change.argmin()
        order = order.clone()
        order[first[best]], order[second[best]] = right[best], left[best]
    cost = pairs[places[:, None], places, order[:, None], order].sum() + linear[places, order].sum()
    return order, float(cost)


class _Solver:
    """Names each patch's place from the contents of all: a transformer without positions."""

    def __init__(self, public: Float[Tensor, "m p d"], width: int, n_layers: int, generator: torch.Generator):
        self.public = public
        self.mean, self.scale = public.mean((0, 1)), public.flatten(0, 1).std(0)
        with initialised(generator):
            layers = [
                nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(n_layers)
            ]
            self.network = nn.Sequential(
                nn.Linear(public.shape[2], width), nn.GELU(), nn.Linear(width, width), *layers,
                nn.LayerNorm(width), nn.Linear(width, public.shape[1]),
            )  # fmt: skip

    def fit(
        self,
        std: Float[Tensor, " n"],
        generator: torch.Generator,
        callback: Callback | None,
        *,
        steps: int,
        batch: int,
        lr: float,
    ) -> list[float]:
        """Train with cross-entropy on public patches, as noisy as the messages' (`std`)."""
        target = torch.arange(self.public.shape[1]).expand(batch, -1)

        def loss() -> Tensor:
            pieces = self.public[torch.randint(len(self.public), (batch,), generator=generator)]
            noise = torch.randn(pieces.shape, generator=generator)
            pieces = pieces + noise * std[torch.randint(len(std), (batch,), generator=generator)][:, None, None]
            return F.cross_entropy(self.network((pieces - self.mean) / self.scale).transpose(1, 2), target)

        return fit(self.network, loss, "jigsaw", callback, steps=steps, lr=lr, weight_decay=1e-2)

    @torch.no_grad()
    def __call__(self, pieces: Float[Tensor, "n p d"]) -> Int[Tensor, "n p"]:
        """Return each sample's order: place i takes patch `order[i]`."""
        parts = [self.network((part - self.mean) / self.scale) for part in pieces.split(128)]
        costs = -torch.cat(parts).log_softmax(2).transpose(1, 2)
        return torch.stack([_assigned(cost) for cost in costs])


JIGSAW = Family(
    "Patch shuffling",
    "Patches are permuted by a secret permutation. Subtracting the known noise leaves exact latents in the "
    "wrong places; public statistics, or a network trained on public images, say where each patch belongs.",
)

ATTACKS = (
    Attack(
        jigsaw,
        "jigsaw",
        rank=90,
        family=JIGSAW,
        reason="shuffled latents are exact latents, and their patches tell where they belong",
    ),
)
