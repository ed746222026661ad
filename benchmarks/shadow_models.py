"""Membership with shadow models: the likelihood ratio (LiRA, Carlini et al. 2022), beside the loss and what ε allows.

Three attacks on per-sample losses: the loss itself (Yeom et al. 2018), the loss against the public base's
(`splitlab.dp.attacks.membership`), and the likelihood ratio.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from splitlab.core import checkpoint, storage
from splitlab.core.config import reseeded
from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.core.seeds import generator
from splitlab.data.image_set import ImageSet, digest
from splitlab.diffusion.base import Base
from splitlab.dp.attacks.membership import auc, log_losses
from splitlab.dp.finetune import DPConfig, finetune
from splitlab.dp.sample import load_tuned

FPR = 0.01
"""The false-positive rate at which attacks are compared: accusing few wrongly (Carlini et al. 2022)."""


@dataclass(frozen=True)
class Membership:
    """How well an attack tells members from others.

    Attributes:
        auc: probability that a member scores higher than a non-member; 0.5 is chance.
        auc_std: its standard deviation: over targets where there are several, else over bootstrap samples.
        tpr: share of members found at a false-positive rate of `FPR`.
        tpr_std: as `auc_std`.
        auc_bound, tpr_bound: no attack exceeds these, given (ε, δ); 1 without a guarantee.
        n_members, n_others: samples scored, per target.
        n_targets: models attacked.
    """

    auc: float
    auc_std: float
    tpr: float
    tpr_std: float
    auc_bound: float
    tpr_bound: float
    n_members: int
    n_others: int
    n_targets: int = 1


def tpr_at(members: Float[Tensor, " n"], others: Float[Tensor, " m"], *, fpr: float = FPR) -> float:
    """Return the share of members above a threshold that at most `fpr` of the others exceed."""
    allowed = math.floor(fpr * len(others) + 1e-9)
    threshold = others.sort(descending=True).values[allowed]
    return float((members > threshold).double().mean())


def tpr_bound(fpr: float, epsilon: float, delta: float) -> float:
    """Return the largest true-positive rate under (ε, δ)-DP (Kairouz et al. 2015): e^ε FPR + δ, or its mirror image."""
    if math.isinf(epsilon):
        return 1.0
    return min(math.exp(min(epsilon, 700.0)) * fpr + delta, 1 - math.exp(-epsilon) * (1 - delta - fpr), 1.0)


def auc_bound(epsilon: float, delta: float) -> float:
    """Return the area under `tpr_bound`: 1 - (1 - δ)² / (1 + e^ε)."""
    return 1 - (1 - delta) ** 2 / (1 + math.exp(min(epsilon, 700.0)))


def judged(
    members: Float[Tensor, " n"],
    others: Float[Tensor, " m"],
    *,
    epsilon: float = math.inf,
    delta: float = 0.0,
    resamples: int = 200,
    seed: int = 0,
) -> Membership:
    """Score an attack on one model; the spread is over bootstrap samples of members and others.

    Args:
        members: scores of members, higher where membership seems likelier.
        others: scores of non-members.
        epsilon, delta: the model's guarantee.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    draw = generator("bootstrap", seed)
    areas, rates = [], []
    for _ in range(resamples):
        a, b = (x[torch.randint(len(x), (len(x),), generator=draw)] for x in (members, others))
        areas.append(auc(a, b))
        rates.append(tpr_at(a, b))
    return Membership(
        auc=auc(members, others),
        auc_std=float(torch.tensor(areas).std()),
        tpr=tpr_at(members, others),
        tpr_std=float(torch.tensor(rates).std()),
        auc_bound=auc_bound(epsilon, delta),
        tpr_bound=tpr_bound(FPR, epsilon, delta),
        n_members=len(members),
        n_others=len(others),
    )


def likelihood_ratio(
    target: Float[Tensor, " n"], shadows: Float[Tensor, "s n"], member: Bool[Tensor, "s n"]
) -> Float[Tensor, " n"]:
    """Return LiRA's score of each sample (Carlini et al. 2022, algorithm 1, and sec. IV-C): higher, likelier a member.

    Online, where every sample was in some shadow models and out of others: log N(loss; in) - log N(loss; out).
    Offline, where none was in: how far the loss is below what it is in models without the sample. Means are the
    sample's own; variances are pooled over samples, since few shadow models do not give one each (sec. V-B). For the
    same reason a sample's shift from out to in is drawn towards the mean shift of all, as far as its own is noise.

    Args:
        target: log losses under the model attacked.
        shadows: log losses under each shadow model.
        member: which samples each shadow model was trained on.

    Raises:
        InputError: a sample that every shadow model was trained on; samples of which only some were ever in.
    """
    inside, outside = member.sum(0), (~member).sum(0)
    if not outside.all():
        raise InputError("every sample needs a shadow model that was trained without it: train more, or on fewer")
    mean_out, std_out = _fit(shadows, ~member)
    if not inside.any():
        return (mean_out - target) / std_out
    if not inside.all():
        raise InputError("either every sample or none must be in some shadow model: drop the others, or train more")
    mean_in, std_in = _fit(shadows, member)
    noise = std_in**2 / inside + std_out**2 / outside
    shift, middle = mean_in - mean_out, (mean_in + mean_out) / 2
    own = ((shift.var() - noise.mean()) / shift.var().clamp_min(1e-30)).clamp(0, 1)
    shift = torch.lerp(shift.mean().expand_as(shift), shift, own)
    mean_in, mean_out = middle + shift / 2, middle - shift / 2
    z_in, z_out = (target - mean_in) / std_in, (target - mean_out) / std_out
    return (z_out.square() - z_in.square()) / 2 + math.log(std_out / std_in)


def _fit(losses: Tensor, chosen: Tensor) -> tuple[Tensor, float]:
    """Return the mean of each sample's chosen losses, and the standard deviation around it pooled over samples."""
    count = chosen.sum(0)
    mean = (losses * chosen).sum(0) / count
    squares = ((losses - mean).square() * chosen).sum()
    spare = int((count - 1).sum())
    if spare < 1:  # one shadow model: how samples differ from one another is all there is
        return mean, max(float(mean.std()), 1e-12)
    return mean, max(float((squares / spare).sqrt()), 1e-12)


def halves(n: int, models: int, *, seed: int) -> Bool[Tensor, "models n"]:
    """Draw which samples each model is trained on: a random half and its complement in turn, so all are in equally.

    Raises:
        InputError: the number of models is odd or below 4, or there are fewer than 4 samples.
    """
    if models < 4 or models % 2 or n < 4:
        raise InputError(f"{models} models on halves of {n} samples: take 4 models or more, an even number, 4 samples")
    member = torch.zeros(models, n, dtype=torch.bool)
    for pair in range(models // 2):
        order = torch.randperm(n, generator=generator("halves", seed, pair))
        member[2 * pair, order[: n // 2]] = True
        member[2 * pair + 1] = ~member[2 * pair]
    return member


def shadow_losses(
    config: DPConfig,
    base: Base,
    pool: ImageSet,
    *,
    folder: Path,
    models: int = 8,
    draws: int = 16,
    callback: Callback | None = None,
) -> tuple[Float[Tensor, "models n"], Bool[Tensor, "models n"]]:
    """Fine-tune models on random halves of a pool; return each one's log losses on all of it, and who was in.

    What was computed before is read from `folder`; a model's folder is deleted once its losses are known.

    Args:
        config: how all models are fine-tuned; their seeds differ.
        base: the public models.
        pool: samples, of which each model sees half.
        folder: where models and losses are kept, by the content of everything they depend on.
        models: how many, an even number.
        draws: see `log_losses`.
        callback: see `splitlab.dp.finetune.finetune`.
    """
    member = halves(len(pool), models, seed=config.seed)
    losses = []
    for number, chosen in enumerate(member):
        run = reseeded(config, config.seed * 1000 + number)
        data = pool.subset(chosen.nonzero()[:, 0].tolist())
        key = digest({"run": run, "base": base.digest, "data": data.digest, "pool": pool.digest, "draws": draws})[:16]
        path = folder / f"losses-{key}.safetensors"
        if not path.exists():
            finetune(f"shadow-{key}", run, base, data, out=folder / key, cache=folder, callback=callback)
            checkpoint.save(path, {"losses": log_losses(base, load_tuned(folder / key), pool, draws=draws)}, {})
            storage.discard(folder / key, "finetune")
        losses.append(checkpoint.load(path, remedy=checkpoint.CACHED)[0]["losses"])
    return torch.stack(losses), member


def attacks(
    losses: Float[Tensor, "models n"],
    member: Bool[Tensor, "models n"],
    base_losses: Float[Tensor, " n"],
    *,
    epsilon: float = math.inf,
    delta: float = 0.0,
) -> dict[str, Membership]:
    """Run all attacks, each model in turn the target and the others its shadows (as Carlini et al. 2022 evaluate).

    The model on the target's other half is no shadow: without it every sample is in and out of shadows equally often,
    so that how well its two means are known says nothing of its membership in the target.

    Args:
        losses: log losses of every model on every sample (`shadow_losses`).
        member: who was in; models come in pairs on complementary halves (`halves`).
        base_losses: log losses of the public base.
        epsilon, delta: the guarantee that each model has.

    Returns name -> result, the spread over targets.
    """
    scores: dict[str, list[Tensor]] = {"loss": [], "calibrated loss": [], "likelihood ratio": []}
    scores["likelihood ratio, offline"] = []
    for target in range(len(losses)):
        others = [model for model in range(len(losses)) if model // 2 != target // 2]
        scores["loss"].append(-losses[target])
        scores["calibrated loss"].append(base_losses - losses[target])
        scores["likelihood ratio"].append(likelihood_ratio(losses[target], losses[others], member[others]))
        scores["likelihood ratio, offline"].append(_offline(losses[target], losses[others], member[others]))
    return {name: _over_targets(parts, member, epsilon, delta) for name, parts in scores.items()}


def _offline(target: Tensor, shadows: Tensor, member: Tensor) -> Tensor:
    """Score with each sample's models that never saw it, and no others: what an attacker has before choosing whom."""
    mean, std = _fit(shadows, ~member)
    return (mean - target) / std


def _over_targets(scores: Sequence[Tensor], member: Tensor, epsilon: float, delta: float) -> Membership:
    each = [judged(s[m], s[~m], epsilon=epsilon, delta=delta, resamples=2) for s, m in zip(scores, member, strict=True)]
    areas, rates = (torch.tensor([getattr(result, name) for result in each]) for name in ("auc", "tpr"))
    return replace(
        each[0],
        auc=float(areas.mean()),
        auc_std=float(areas.std()),
        tpr=float(rates.mean()),
        tpr_std=float(rates.std()),
        n_targets=len(each),
    )
