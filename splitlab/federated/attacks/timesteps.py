"""Timesteps in closed form, from gradients of linear layers whose input is a public function of the timestep.

The first layer that sees the timestep (see `time_layers`) reads e(t): its weight has the gradient Σ_b δ_b e(t_b)ᵀ, its
bias Σ_b δ_b. For one image their ratio is e(t). For several, the rows lie in the span of the e(t_b), and each of the T
candidates is held against that span. Local SGD steps only add terms of the same form, so a weight difference serves as
well. Where the timestep is looked up in a table, the rows of the table's gradient that are not zero are the timesteps.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.federated.attacks.record import Attack
from splitlab.federated.attacks.row_spaces import Block, block, unit_rows
from splitlab.federated.attacks.shapes import input_shape
from splitlab.federated.attacks.time_layers import TimeLayer, TimeProbe
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.defences import effects
from splitlab.federated.update import Update, check_update

PENALTY = 20.0
"""What one timestep more must gain in log-likelihood, per row. Measured over float32, float16 and bfloat16 updates: the
best wrong one gains up to 10, the least of 8 right ones 90."""

EXPLAINED = 1e-3
"""A single timestep stands if it leaves at most this share of what a sparsified update still shows."""

DOUBTFUL = 0.1
"""Share of a timestep's embedding outside the row space from which on it is doubted: right ones leave 0.01 under noise
as strong as the gradient, wrong ones 0.6."""

INPUT_ERROR = 1e-6
"""Relative error of a layer's input as computed here: less than its square in energy is not worth explaining."""


@dataclass(frozen=True)
class TimestepsFound:
    """What an attack on timesteps made of an update.

    Attributes:
        timesteps: `[k]` int64, ascending, each once.
        evidence: `[k]`: what each explains that no other does, over what is left per dimension (noise: about 1).
        residuals: `[T]`: share of each candidate's embedding outside the row space, the MUSIC spectrum (Schmidt 1986).
        spectrum: `[d]`: singular values of the first layer's gradient, rows scaled to unit noise.
        n_repeats: how many of the batch share a timestep with another, where the server knows the batch's size.
    """

    timesteps: Tensor
    evidence: Tensor
    residuals: Tensor
    spectrum: Tensor
    n_repeats: int | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the result, in words."""
        worst = float(self.residuals[self.timesteps].max()) if len(self.timesteps) else 1.0
        if worst < DOUBTFUL:
            return ()
        return (
            f"the timesteps found leave {100 * worst:.0f} % of their embedding unexplained, so they are likely wrong: "
            "check the length of alphas_cumprod, and call=",
        )


@dataclass(frozen=True)
class _Layer:
    """One layer, float64: n rows of unit noise, turned into `[d, d]`, and its input for each candidate `[T, d]`."""

    rows: Tensor
    n: int
    inputs: Tensor


def timesteps(
    update: Update,
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    layers: str = "strongest",
    most: int = 64,
) -> TimestepsFound:
    """Read the set of timesteps off an update; how many there are is found too.

    Args:
        update, knowledge, generator, callback: see `record.Attack`; nothing is drawn. `batch_size`, if granted, bounds
            the set and tells how many timesteps repeat.
        layers: "embedding": the first layer that sees the timestep, exact also after local steps; "all": also the later
            ones, as the projections in every residual block, which withstands more noise but, after local steps, takes
            the weights they had at the start; "strongest": the first layer, or all where it was not shared or the
            client, whose defence is public, added noise. An update that a defence made sparse is held
            against single timesteps first, entry by entry.
        most: the largest set to look for; never more than the embedding's width.

    Raises:
        InputError: the update holds no such gradient, or it is zero.
    """
    check_update(update, knowledge.model)
    if layers not in ("strongest", "embedding", "all"):
        raise InputError(f"layers must be 'strongest', 'embedding' or 'all', got {layers!r}")
    probe = TimeProbe(knowledge, input_shape(knowledge.model, size=update.size, channels=knowledge.channels))
    first = probe.first()
    if first.is_table and update.shows(f"{first.name}.weight"):
        return _from_table(update, first, probe, knowledge.batch_size)
    inputs = _inputs(update, first, probe, everything=_everything(update, first, layers))
    if "sparse" in effects(update.defence) and (single := _single(update, inputs, knowledge.batch_size)):
        return single
    used = [_layer(update, knowledge.model, name, value) for name, value in inputs.items()]
    most = min(most, used[0].inputs.shape[1] - 2, knowledge.batch_size or most)
    strengths, residuals = _music(used[0])
    count = int((strengths.square() > PENALTY * used[0].n).sum())
    chosen, cost = _settle(used, residuals.argsort()[: min(max(count, 1), most)].tolist(), most)
    if any(_unexplained(layer, chosen) > 2.0 for layer in used):
        chosen, cost = min((chosen, cost), _settle(used, [], most), key=lambda end: end[1])
    if callback:
        callback("timesteps", len(chosen), most, cost)
    evidence = [_evidence(used, chosen, index) for index in range(len(chosen))]
    n_repeats = None if knowledge.batch_size is None else knowledge.batch_size - len(chosen)
    return TimestepsFound(torch.tensor(chosen), torch.tensor(evidence), residuals, strengths, n_repeats)


def _gradient(update: Update, name: str) -> Tensor:
    value = update.gradients.get(name)
    if value is None:
        raise InputError(
            f"timesteps are not recoverable: the update has no gradient of {name}; the time embedding was frozen or "
            "not shared, nor was a residual block's projection of it (which layers='all' reads)"
        )
    if not value.any():
        raise InputError(
            f"timesteps are not recoverable: the gradient of {name} is zero; the time embedding is frozen, a defence "
            "zeroed it, or nothing behind it is reached, as in a ControlNet whose zero convolutions are still zero"
        )
    return value


def _everything(update: Update, first: TimeLayer, layers: str) -> bool:
    """Say whether to read more than the first layer."""
    if layers != "strongest":
        return layers == "all"
    noised = update.kind == "gradient" and "noised" in effects(update.defence)
    return not update.shows(f"{first.name}.weight") or noised


def _inputs(update: Update, first: TimeLayer, probe: TimeProbe, *, everything: bool) -> dict[str, Tensor]:
    """Return the layers that show timesteps, each with its input for every candidate `[T, d]`."""
    seeing = probe.all() if everything else [first]
    shared = [layer for layer in seeing if not layer.is_table and update.shows(f"{layer.name}.weight")]
    if not shared:
        _gradient(update, f"{first.name}.weight")
    return probe.inputs(shared)


def _from_table(update: Update, first: TimeLayer, probe: TimeProbe, batch_size: int | None) -> TimestepsFound:
    """Return the timesteps whose rows of a table's gradient stand out; without a defence all others are zero."""
    rows = probe.inputs([first])[first.name][:, 0].long()
    energy = update.gradients[f"{first.name}.weight"].double().square().sum(1)[rows]
    noise = energy.median()
    chosen = (energy > PENALTY * noise).nonzero()[:, 0]
    repeats = None if batch_size is None else batch_size - len(chosen)
    return TimestepsFound(
        chosen, energy[chosen] / noise.clamp_min(1e-300), 1 - energy / energy.sum(), energy.sqrt(), repeats
    )


def _single(update: Update, inputs: dict[str, Tensor], batch_size: int | None) -> TimestepsFound | None:
    """Return the one timestep that explains what entries there are, if one does.

    A row of a weight's gradient, with the bias's entry appended, is δ (e(t), 1); whatever entries of it are left, the
    best δ for them leaves |g|² - (g·e)² / |e|², all taken over those entries. Rows of one entry fit anything.
    """
    left = whole = torch.zeros(len(next(iter(inputs.values()))), dtype=torch.float64)
    for name, value in inputs.items():
        weight, bias = update.gradients[f"{name}.weight"], update.gradients.get(f"{name}.bias")
        weight = weight.flatten(1)
        rows = torch.cat([weight, torch.zeros(len(weight), 1) if bias is None else bias[:, None]], 1).double()
        rows = rows[(rows != 0).sum(1) > 1]
        candidates = torch.cat([value.double(), value.new_ones(len(value), 1).double()], 1)
        size = candidates.square() @ (rows != 0).double().T
        energy = rows.square().sum()
        left = left + energy - ((candidates @ rows.T).square() / size.clamp_min(1e-300)).sum(1)
        whole = whole + energy
    shares = left / whole.clamp_min(1e-300)
    best = int(shares.argmin())
    if not whole.any() or float(shares[best]) > EXPLAINED:
        return None
    gain = float((1 - shares[best]) / shares[best].clamp_min(1e-12))
    repeats = None if batch_size is None else batch_size - 1
    return TimestepsFound(torch.tensor([best]), torch.tensor([gain]), shares, torch.zeros(0), repeats)


def _layer(update: Update, model: nn.Module, name: str, inputs: Tensor) -> _Layer:
    """Append the bias, whose input is 1, scaled to the weight's RMS so that both carry the same noise."""
    part = block(update, model, f"{name}.weight")
    bias = update.gradients.get(f"{name}.bias")
    if bias is not None and bias.any():
        scale = part.values.square().mean().sqrt() / bias.double().square().mean().sqrt()
        part = Block(torch.cat([part.values, scale * bias.double()[:, None]], 1), part.std)
        inputs = torch.cat([inputs, scale.to(inputs).expand(len(inputs), 1)], 1)
    rows = unit_rows([part])
    return _Layer(torch.linalg.qr(rows.matrix, mode="r")[1], len(rows), inputs.double())


def _music(layer: _Layer) -> tuple[Tensor, Tensor]:
    """Return singular values `[d]` and the share of each candidate `[T]` outside the row space."""
    _, strengths, basis = torch.linalg.svd(layer.rows)
    rank = int((strengths.square() > PENALTY * layer.n).sum())
    noise = basis[min(max(rank, 1), len(basis) - 1) :]
    return strengths, (layer.inputs @ noise.T).square().sum(1) / layer.inputs.square().sum(1)


def _settle(layers: list[_Layer], start: list[int], most: int) -> tuple[list[int], float]:
    """Add, drop and exchange single timesteps as long as the cost falls; return the set and its cost."""
    chosen, cost = list(start), _cost(layers, start)
    while True:
        options = [chosen] if len(chosen) < most else []
        kept = [chosen[:i] + chosen[i + 1 :] for i in range(len(chosen))]
        trials = [(rest, _cost(layers, rest)) for rest in kept if rest]
        for rest in options + kept:
            costs = _costs_with_one_more(layers, rest)
            candidate = int(costs.argmin())
            trials.append(([*rest, candidate], float(costs[candidate])))
        best = sorted(trials, key=lambda trial: trial[1])[:3]
        least, choice = min((_cost(layers, trial), trial) for trial, _ in best)  # free of cancellation
        if least >= cost - 1e-9 * abs(cost) and chosen:
            return sorted(chosen), cost
        chosen, cost = choice, least


def _split(layer: _Layer, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Return the layer's rows and all candidates, without their parts in the span of `chosen`."""
    basis = torch.linalg.qr(layer.inputs[chosen].T)[0] if chosen else layer.inputs.new_zeros(layer.inputs.shape[1], 0)
    return layer.rows - layer.rows @ basis @ basis.T, layer.inputs - layer.inputs @ basis @ basis.T


def _cost(layers: list[_Layer], chosen: list[int]) -> float:
    """Gaussian log-likelihood with unknown noise in each layer, and a price per timestep; lower is better."""
    terms = [_term(layer, _split(layer, chosen)[0].square().sum(), len(chosen)) for layer in layers]
    return float(sum(terms))


def _costs_with_one_more(layers: list[_Layer], chosen: list[int]) -> Float[Tensor, " T"]:
    total = torch.zeros(len(layers[0].inputs), dtype=torch.float64)
    usable = torch.ones(len(total), dtype=torch.bool)
    for layer in layers:
        rows, candidates = _split(layer, chosen)
        size = candidates.square().sum(1)
        usable &= size > 1e-9 * layer.inputs.square().sum(1)
        energy = (candidates @ rows.T).square().sum(1) / size.clamp_min(1e-300)
        total += _term(layer, rows.square().sum() - energy, len(chosen) + 1)
    return total.masked_fill(~usable, torch.inf)


def _term(layer: _Layer, left: Tensor, count: int) -> Tensor:
    m, d = layer.n, layer.inputs.shape[1]
    floor = max(0.5 * m * d, INPUT_ERROR**2 * float(layer.rows.square().sum()))
    return m * d * left.clamp_min(floor).log() + PENALTY * m * count


def _unexplained(layer: _Layer, chosen: list[int]) -> float:
    """Return the mean square of what is left per dimension, in units of the noise."""
    m, d = layer.n, layer.inputs.shape[1]
    return float(_split(layer, chosen)[0].square().sum()) / m / (d - len(chosen))


def _evidence(layers: list[_Layer], chosen: list[int], index: int) -> float:
    """Return what one timestep explains of the first layer, over what is left per dimension."""
    rest = chosen[:index] + chosen[index + 1 :]
    before, after = (_split(layers[0], subset)[0].square().sum() for subset in (rest, chosen))
    spare = layers[0].inputs.shape[1] - len(chosen)
    return float((before - after) / (after / spare).clamp_min(1e-300))


ATTACKS = (Attack(timesteps, "timesteps, closed form", rank=10, finds="timesteps", family="closed form"),)
