"""UnSplit (Erdoğan et al. 2022): recover inputs of a client whose weights are unknown, by cloning it meanwhile."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.core.schedule import cosine
from splitlab.diffusion.controlnet import image_hint_controlnet
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.messages import Knowledge, Observation, Reconstruction, stack


def unsplit(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    epochs: Annotated[int, Option("passes over all samples, per restart", least=1)] = 30,
    restarts: Annotated[int, Option("how often to begin anew; the smallest misfit is kept", least=1)] = 2,
    batch: Annotated[int, Option("samples per step", least=1)] = 32,
    lr: Annotated[float, Option("Adam's first step size for hints", above=0)] = 0.1,
    clone_lr: Annotated[float, Option("Adam's first step size for the clone's weights", above=0)] = 2e-3,
    tv: Annotated[float, Option("weight of total variation", least=0)] = 0.1,
    sparsity: Annotated[float, Option("weight of the mean difference from the mean public hint", least=0)] = 0.1,
    calibrate: Annotated[bool, Option("give brightnesses the distribution of the public hints'")] = True,
) -> Reconstruction:
    """Search hints x and weights of a clone g together, so that g(x) is what was sent (Erdoğan et al. 2022, alg. 1).

    Minimises |g(x) - smashed|² / |smashed|² + tv TV(x) + sparsity |x - mean public hint|₁ in turns over x and g; one
    backward pass serves a step of both. All messages share one clone, as their client's encoder hardly moves between
    late messages. The clone has the public architecture and weights of its own; x starts at the mean public hint, is
    kept in [-1, 1], and is grey where the public hints are. Both step sizes fall to zero along a cosine. `calibrate`
    makes outlines stand out and tell whose they are, at the price of squared error where they lie beside the true ones.

    What stays open: a clone may answer for hints that are fainter than the true ones, or lie some pixels beside them.
    Needs `smashed` `[b, k, h, w]`, from late in a run of split_gradients.

    Raises:
        InputError: `smashed` is that of another scheme, or all zero.
    """
    smashed = _informative(stack(observations).need("smashed"), knowledge)
    tries = []
    for restart in range(restarts):

        def told(done: int, misfit: float, first: int = restart * epochs) -> None:
            if callback:
                callback("unsplit", first + done, restarts * epochs, misfit)

        clone = hint_encoder(knowledge, int(torch.randint(2**31, (1,), generator=generator)))
        search = _Search(
            clone, smashed, knowledge.public.need_hints(), batch, (lr, clone_lr), (tv, sparsity), generator
        )
        tries.append(search.run(epochs, generator, told))
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


class _Search:
    """One restart's variables, the hints batch by batch and a clone, and how they are moved."""

    def __init__(
        self,
        clone: nn.Module,
        smashed: Float[Tensor, "n k h w"],
        public: Float[Tensor, "m 3 s s"],
        batch: int,
        rates: tuple[float, float],
        weights: tuple[float, float],
        generator: torch.Generator,
    ):
        self.clone, self.rates, self.weights = clone, rates, weights
        self.mean = _mean_hint(public)
        start = self.mean + 0.05 * torch.randn((len(smashed), *self.mean.shape[1:]), generator=generator)
        self.parts = [part.clone().requires_grad_() for part in start.clamp(-1.0, 1.0).split(batch)]
        self.sent, self.scale = smashed.split(batch), smashed.square().mean()
        self.n = len(smashed)
        self.optimizers = [torch.optim.Adam([part], betas=(0.5, 0.99)) for part in self.parts]
        self.cloning = torch.optim.Adam(clone.parameters())

    def run(
        self, epochs: int, generator: torch.Generator, told: Callable[[int, float], None]
    ) -> tuple[Float[Tensor, "n 3 s s"], list[float]]:
        """Search; return the hints and every epoch's misfit."""
        misfits: list[float] = []
        for epoch in tqdm(range(epochs), desc="unsplit", mininterval=2, leave=False):
            rates = [cosine(rate, epoch, epochs) for rate in self.rates]
            total = 0.0
            for number in torch.randperm(len(self.parts), generator=generator).tolist():
                total += self._step(number, rates) * len(self.parts[number]) / self.n
            misfits.append(total)
            told(epoch + 1, total)
        return torch.cat(self.parts).detach().expand(-1, 3, -1, -1).clone(), misfits

    def _step(self, number: int, rates: Sequence[float]) -> float:
        """Move one batch of hints and the clone by one gradient (Erdoğan et al. 2022, alg. 1)."""
        hints, (tv, sparsity) = self.parts[number], self.weights
        misfit = F.mse_loss(self.clone((hints.expand(-1, 3, -1, -1) + 1.0) / 2.0), self.sent[number]) / self.scale
        sparse = (hints - self.mean).abs().mean()
        loss = misfit + tv * total_variation(hints) + sparsity * sparse
        optimizers = (self.optimizers[number], self.cloning)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            optimizer.param_groups[0]["lr"] = rate
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            hints.clamp_(-1.0, 1.0)
        return misfit.item()


def _mean_hint(hints: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "1 c s s"]:
    """Return the mean public hint; of one channel if all public hints are grey."""
    grey = bool((hints == hints[:, :1]).all())
    return (hints[:, :1] if grey else hints).mean(0, keepdim=True)


def total_variation(images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbouring pixels, horizontally plus vertically."""
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def calibrated(hints: Float[Tensor, "n 3 s s"], public: Float[Tensor, "m 3 s s"]) -> Float[Tensor, "n 3 s s"]:
    """Map the values of all hints together, in their order, to the distribution of the public hints' values."""
    values = hints[:, :1] if (hints == hints[:, :1]).all() else hints
    target = public.flatten().sort().values
    ranks = values.flatten().argsort(stable=True).argsort(stable=True).double() / max(1, values.numel() - 1)
    return target[(ranks * (len(target) - 1)).round().long()].view(values.shape).expand_as(hints).clone()


CLONE = Family(
    "UnSplit",
    "Conventional split learning trains the client's part, so its weights are not public: input and a clone of "
    "the client are optimised in turn until the clone's output is what was sent (Erdoğan et al. 2022). It is "
    "after the hint, the input of that part.",
)

ATTACKS = (Attack(unsplit, "UnSplit", rank=100, family=CLONE, schemes=("split_gradients",)),)
