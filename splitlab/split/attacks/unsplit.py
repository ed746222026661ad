"""UnSplit (Erdoğan et al. 2022): recover inputs of a client whose weights are unknown, by cloning it meanwhile."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.controlnet import image_hint_controlnet
from splitlab.split.attacks.record import Attack, Family
from splitlab.split.messages import Knowledge, Observation, Reconstruction, stack


@dataclass(frozen=True)
class _Settings:
    """How to search; see `unsplit`."""

    epochs: int
    batch: int
    lr: float
    clone_lr: float
    tv: float
    sparsity: float


def unsplit(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    epochs: int = 30,
    restarts: int = 2,
    batch: int = 32,
    lr: float = 0.1,
    clone_lr: float = 2e-3,
    tv: float = 0.1,
    sparsity: float = 0.1,
    calibrate: bool = True,
) -> Reconstruction:
    """Search hints x and weights of a clone g together, so that g(x) is what was sent (Erdoğan et al. 2022, alg. 1).

    Minimises |g(x) - smashed|² / |smashed|² + tv TV(x) + sparsity |x - mean public hint|₁ in turns over x and g; one
    backward pass serves a step of both. All messages share one clone, as their client's encoder hardly moves between
    late messages. The clone has the public architecture and weights of its own; x starts at the mean public hint, is
    kept in [-1, 1], and is grey where the public hints are. Of several restarts that of the smallest misfit is kept.

    What stays open: a clone may answer for hints that are fainter than the true ones, or lie some pixels beside them.

    Args:
        observations: what was sent; needs `smashed` `[b, k, h, w]`, from late in a run of split_gradients.
        knowledge: the threat model.
        generator: of the clone's initial weights, the start's perturbation and the order of samples.
        callback: told of every epoch's misfit.
        epochs: passes over all samples, per restart.
        restarts: how often to begin anew.
        batch: samples per step.
        lr, clone_lr: Adam's step sizes for hints and weights; both fall to zero along a cosine.
        tv: weight of the total variation (`total_variation`).
        sparsity: weight of the mean absolute difference from the mean public hint.
        calibrate: give the brightnesses found the distribution of the public hints': outlines then stand out and tell
            whose they are, at the price of squared error where they lie beside the true ones.

    Raises:
        InputError: no `smashed` was sent, it is that of another scheme, or all zero; or `epochs`, `restarts` or
            `batch` is below 1.
    """
    for name, value in {"epochs": epochs, "restarts": restarts, "batch": batch}.items():
        if value < 1:
            raise InputError(f"unsplit: {name} must be 1 or more, got {value}")
    smashed = _informative(stack(observations).need("smashed"), knowledge)
    settings = _Settings(epochs, batch, lr, clone_lr, tv, sparsity)
    tries = []
    for restart in range(restarts):

        def told(done: int, misfit: float, first: int = restart * epochs) -> None:
            if callback:
                callback("unsplit", first + done, restarts * epochs, misfit)

        clone = hint_encoder(knowledge, int(torch.randint(2**31, (1,), generator=generator)))
        tries.append(_search(clone, smashed, knowledge, settings, generator, told))
    hints, misfits = min(tries, key=lambda tried: tried[1][-1])
    if calibrate:
        hints = calibrated(hints, knowledge.public.need_hints())
    return Reconstruction(hints=hints, used=("smashed",), objective=tuple(misfits), n_evals=epochs * restarts)


def _informative(smashed: Tensor, knowledge: Knowledge) -> Tensor:
    if knowledge.scheme != "split_gradients":
        raise InputError(
            f"unsplit clones a client with a trained hint encoder, and scheme {knowledge.scheme!r} has none; "
            "run it on a transcript of scheme 'split_gradients'"
        )
    empty = int((~smashed.flatten(1).any(1)).sum())
    if empty:
        raise InputError(
            f"smashed is all zero in {empty} of {len(smashed)} samples: a hint encoder's last convolution starts at "
            "zero, so first messages carry nothing; attack later ones (record_from)"
        )
    return smashed


def hint_encoder(knowledge: Knowledge, seed: int) -> nn.Module:
    """Build a hint encoder of the public architecture: hints `[b, 3, s, s]` in [0, 1] to `[b, k, h, w]`.

    Its last convolution is drawn as the others are: at zero, as clients start, no gradient would reach the hints.
    """
    encoder = image_hint_controlnet(knowledge.base, seed=seed).controlnet_cond_embedding
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.conv_out.reset_parameters()
    return encoder


def _search(
    clone: nn.Module,
    smashed: Tensor,
    knowledge: Knowledge,
    settings: _Settings,
    generator: torch.Generator,
    told: Callable[[int, float], None],
) -> tuple[Tensor, list[float]]:
    """Run one restart: return hints `[n, 3, s, s]` and every epoch's misfit."""
    mean = _mean_hint(knowledge.public.need_hints())
    start = mean + 0.05 * torch.randn((len(smashed), *mean.shape[1:]), generator=generator)
    parts = [part.clone().requires_grad_() for part in start.clamp(-1.0, 1.0).split(settings.batch)]
    wanted, scale = smashed.split(settings.batch), smashed.square().mean()
    searches = [torch.optim.Adam([part], betas=(0.5, 0.99)) for part in parts]
    cloning = torch.optim.Adam(clone.parameters())
    misfits: list[float] = []
    for epoch in tqdm(range(settings.epochs), desc="unsplit", mininterval=2, leave=False):
        decay = 0.5 + 0.5 * math.cos(math.pi * epoch / settings.epochs)
        total = 0.0
        for number in torch.randperm(len(parts), generator=generator).tolist():
            hints = parts[number]
            misfit = F.mse_loss(clone((hints.expand(-1, 3, -1, -1) + 1.0) / 2.0), wanted[number]) / scale
            sparse = (hints - mean).abs().mean()
            loss = misfit + settings.tv * total_variation(hints) + settings.sparsity * sparse
            for optimizer, rate in ((searches[number], settings.lr), (cloning, settings.clone_lr)):
                optimizer.zero_grad(set_to_none=True)
                optimizer.param_groups[0]["lr"] = rate * decay
            loss.backward()
            searches[number].step()
            cloning.step()
            with torch.no_grad():
                hints.clamp_(-1.0, 1.0)
            total += misfit.item() * len(hints) / len(smashed)
        misfits.append(total)
        told(epoch + 1, total)
    return torch.cat(parts).detach().expand(-1, 3, -1, -1).clone(), misfits


def _mean_hint(hints: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "1 c s s"]:
    """Return the mean public hint; of one channel if all public hints are grey."""
    grey = bool((hints == hints[:, :1]).all())
    return (hints[:, :1] if grey else hints).mean(0, keepdim=True)


def total_variation(images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbouring pixels, horizontally plus vertically."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def calibrated(hints: Float[Tensor, "n 3 s s"], public: Float[Tensor, "m 3 s s"]) -> Float[Tensor, "n 3 s s"]:
    """Map the values of all hints together, in their order, to the distribution of the public hints' values."""
    found = hints[:, :1] if (hints == hints[:, :1]).all() else hints
    target = public.flatten().sort().values
    ranks = found.flatten().argsort(stable=True).argsort(stable=True).double() / max(1, found.numel() - 1)
    return target[(ranks * (len(target) - 1)).round().long()].view(found.shape).expand_as(hints).clone()


CLONE = Family(
    "UnSplit",
    "Conventional split learning trains the client's part, so its weights are not public: input and a clone of "
    "the client are optimised in turn until the clone's output is what was sent (Erdoğan et al. 2022). It is "
    "after the hint, the input of that part.",
)

ATTACKS = (Attack(unsplit, "UnSplit", rank=100, family=CLONE),)
