"""Distances between gradients, and the gradients of candidates: the objective of every matching attack."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.federated.attacks.batched_gradients import Tape
from splitlab.federated.attacks.optimise import Objective
from splitlab.federated.attacks.problem import Problem

Gradients = Mapping[str, Tensor]

Measured = tuple[Tensor, dict[str, Tensor]]
"""Values `[u]` and their derivatives by the gradients found."""


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("ui,ui->u", left.flatten(1), right.flatten(1))


def _times(value: Tensor, factor: Tensor) -> Tensor:
    return value * factor.reshape(-1, *[1] * (value.ndim - 1))


def normalised_l2(guess: Gradients, wanted: Gradients, weights: Gradients) -> Measured:
    """Return `[u]`: Σ_l w_l |g_l - G_l|², with w_l of `layer_weights`: every parameter tensor counts alike."""
    values, slopes = [], {}
    for name, target in wanted.items():
        gap = guess[name] - target
        values.append(weights[name] * _inner(gap, gap))
        slopes[name] = _times(gap, 2 * weights[name])
    return torch.stack(values).sum(0), slopes


def summed_l2(guess: Gradients, wanted: Gradients, weights: Gradients) -> Measured:
    """Return `[u]`: Σ_l |g_l - G_l|², as in DLG (Zhu et al. 2019, eq. 3) and GIDM; 0-weighted tensors drop out."""
    return normalised_l2(guess, wanted, {name: (weight > 0).float() for name, weight in weights.items()})


def scale_free(guess: Gradients, wanted: Gradients, weights: Gradients) -> Measured:
    """Return `[u]`: 1 - cos² of gradients, tensors weighted as in `normalised_l2`: blind to the update's length.

    It is what `normalised_l2` leaves at the best common scale, the right thing where a client clips its update.
    """
    inner, energy, whole = _products(guess, wanted, weights)
    values = 1 - inner.square() / (energy * whole)
    of, at = 2 * inner.square() / (energy.square() * whole), -2 * inner / (energy * whole)
    return values, _slopes(guess, wanted, weights, of, at)


def cosine(guess: Gradients, wanted: Gradients, weights: Gradients) -> Measured:
    """Return `[u]`: 1 - cos of all gradients as one vector (Geiping et al. 2020, eq. 4): blind to their length."""
    on = {name: (weight > 0).float() for name, weight in weights.items()}
    inner, energy, whole = _products(guess, wanted, on)
    lengths = (energy * whole).sqrt()
    return 1 - inner / lengths, _slopes(guess, wanted, on, inner / (lengths * energy), -1 / lengths)


def _products(guess: Gradients, wanted: Gradients, weights: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted inner product of found and wanted, and that of each with itself."""
    pairs = ((guess, wanted), (guess, guess), (wanted, wanted))
    inner, energy, whole = (torch.stack([weights[n] * _inner(a[n], b[n]) for n in wanted]).sum(0) for a, b in pairs)
    return inner, energy.clamp_min(1e-30), whole.clamp_min(1e-30)


def _slopes(guess: Gradients, wanted: Gradients, weights: Gradients, of: Tensor, at: Tensor) -> dict[str, Tensor]:
    return {n: _times(guess[n], weights[n] * of) + _times(wanted[n], weights[n] * at) for n in wanted}


DISTANCES: dict[str, Callable[[Gradients, Gradients, Gradients], Measured]] = {
    "normalised": normalised_l2,
    "scale_free": scale_free,
    "cosine": cosine,
    "l2": summed_l2,
}


def layer_weights(gradients: Gradients, *, share: float = 1.0) -> dict[str, Tensor]:
    """Return the weight of every parameter tensor, 1 / |G_l|², scaled so that they make a mean.

    A tensor whose gradient is next to nothing (in exact arithmetic 0, as an attention's key bias) would only pass on
    rounding errors: its weight is bounded by that of a tensor with 1e-3 of the root mean square of all.

    Args:
        gradients: what was shared.
        share: annealing over layers: only this share of the tensors, from the network's output on, gets a weight.
    """
    n_entries = sum(value.numel() for value in gradients.values())
    mean_square = torch.stack([value.square().sum() for value in gradients.values()]).sum() / n_entries
    names = list(gradients)
    silent = set(names[: len(names) - max(1, round(share * len(names)))])
    weights = {}
    for name, value in gradients.items():
        floor = 1e-6 * mean_square * value.numel()
        weight = 1.0 / torch.maximum(value.square().sum(), floor).clamp_min(1e-30)
        weights[name] = torch.zeros(()) if name in silent else weight / (len(names) - len(silent))
    return weights


class Matcher:
    """The distance of candidates' gradients to the shared ones, for all updates at once.

    One batched pass (see `tape`) gives all updates' values and derivatives; nothing is accumulated into parameters.
    Defences are public: entries that one withholds (zeroes) are left out, and clipped updates compared up to scale.

    Args:
        problem: the updates.
        distance: a key of `DISTANCES`; None: "scale_free" for clipped updates, else "normalised".

    Raises:
        InputError: no such distance.
    """

    def __init__(self, problem: Problem, *, distance: str | None = None):
        distance = distance or ("scale_free" if problem.is_rescaled else "normalised")
        if distance not in DISTANCES:
            raise InputError(f"distance {distance!r} is unknown; choose one of {', '.join(DISTANCES)}")
        self.problem, self.distance = problem, DISTANCES[distance]
        self.names = [name for name, _ in problem.model.named_parameters() if name in problem.gradients[0]]
        self.wanted = {name: torch.stack([g[name] for g in problem.gradients]) for name in self.names}
        self.kept = {name: value != 0 for name, value in self.wanted.items()} if problem.withholds else None
        made = problem.products
        others = [name for name in self.names if name not in made]
        self.tape = Tape(problem.model, [name for name in self.names if name in made], others)
        self.samples = torch.arange(problem.n_samples)
        self.anneal(1.0)

    def anneal(self, share: float) -> None:
        """Count only this share of the parameter tensors, from the output on."""
        each = [layer_weights({n: g[n] for n in self.names}, share=share) for g in self.problem.gradients]
        self.weights = {name: torch.stack([weights[name] for weights in each]) for name in self.names}

    def from_clean(self, noise: Tensor) -> Objective:
        """Return the objective over flattened clean samples `[u, b c h w]`, noise and timesteps known.

        The gradient depends on the image only through x_t = sqrt(ᾱ) x0 + sqrt(1 - ᾱ) noise and the target.
        """
        problem, timesteps = self.problem, self.problem.timesteps
        signal, sigma = problem.rates(timesteps)

        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            z = z.detach().requires_grad_(True)
            clean = z.reshape(-1, *problem.shape)
            target = noise if problem.objective == "epsilon" else signal * noise - sigma * clean
            return self._evaluate(z, signal * clean + sigma * noise, timesteps, lambda output: output - target)

        return objective

    @torch.no_grad()
    def best_scale(self, z: Tensor, noise: Tensor) -> Float[Tensor, " u"]:
        """Return what gradients of clean samples `[u, b c h w]` have to be multiplied with to meet the shared ones."""
        problem, clean = self.problem, z.reshape(-1, *self.problem.shape)
        signal, sigma = problem.rates(problem.timesteps)
        target = noise if problem.objective == "epsilon" else signal * noise - sigma * clean
        with torch.enable_grad(), self.tape as tape:
            prediction = problem.predict(signal * clean + sigma * noise, problem.timesteps, self.samples)
            back = (prediction - target).detach() * (2.0 / (problem.batch * problem.unknowns))
            guess = tape.gradients(prediction, back, batch=problem.batch)
        inner, energy, _ = _products(guess, self.wanted, self.weights)
        return inner / energy

    def from_residual(self, timesteps: Tensor) -> Objective:
        """Return the objective over `[u, 2 b c h w]`: noisy inputs and residuals r = prediction - target.

        The gradient is linear in r: it is J(x_t)ᵀ r times 2 over the number of elements.
        """
        problem = self.problem

        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            z = z.detach().requires_grad_(True)
            noisy, residual = z.reshape(-1, 2, problem.batch, *problem.shape).unbind(1)
            return self._evaluate(z, noisy.flatten(0, 1), timesteps, lambda output: residual.flatten(0, 1))

        return objective

    def _evaluate(
        self, z: Tensor, noisy: Tensor, timesteps: Tensor, residual: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        problem = self.problem
        with self.tape as tape:
            prediction = problem.predict(noisy, timesteps, self.samples)
        back = residual(prediction) * (2.0 / (problem.batch * problem.unknowns))
        guess = tape.gradients(prediction, back, batch=problem.batch)
        if self.kept is not None:
            guess = {name: value * self.kept[name] for name, value in guess.items()}
        values, slopes = self.distance(guess, self.wanted, self.weights)
        return values, tape.pull(slopes, z)


def best_of(values: Float[Tensor, "k u"], candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return, for each update, the candidate of its smallest value, and that value."""
    chosen = values.argmin(0)
    picked = torch.stack([candidates[k][u] for u, k in enumerate(chosen.tolist())])
    return picked, values.min(0).values
