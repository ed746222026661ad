"""The noisy inputs x_t of updates, from the patch test alone: neither noise nor loss enters, see `patches`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from splitlab.federated.attacks.optimise import Objective, Watch, lbfgs
from splitlab.federated.attacks.patches import Layer, SpanTest, capture, choose_layers
from splitlab.federated.attacks.problem import Problem, Recorder

AGAIN = 1e-2
"""Two starts whose values differ by less than this, relatively, have ended in the same minimum."""


RANK = 1e-6
"""Smaller singular values, in units of the largest, are a float32 gradient's rounding: 7e-8 at most was seen where the
exact value is zero, 1e-5 at least where it is not."""


@dataclass(frozen=True)
class NoisyInputs:
    """What the patch test found.

    Attributes:
        noisy: `[n, c, h, w]`.
        value: `[n]`: the share of patch energy outside of the gradient's row space; 0: certain.
        starts: random starts made.
    """

    noisy: Tensor
    value: Tensor
    starts: int


def find_noisy(
    problem: Problem,
    *,
    generator: torch.Generator,
    recorder: Recorder | None = None,
    n_evals: int = 400,
    n_starts: int = 8,
    goal: float = 1e-6,
    margin: float | None = None,
) -> NoisyInputs | None:
    """Find the noisy input of every sample, by L-BFGS from random starts; None if no shared layer allows the test.

    Samples that are not at `goal`, or that copy another sample of their update, start again; what the samples found so
    far account for is then left out of the test. Rounding or a defence's noise keep the test off 0, also at the truth:
    there a sample is settled when two of at least four starts have ended at its smallest value.

    Args:
        problem: the updates.
        generator: of the starts, standard normal as noisy inputs nearly are.
        recorder: told of every evaluation.
        n_evals: evaluations per start.
        n_starts: starts per sample at most.
        goal: what counts as found: below it a sample makes no further start.
        margin: layers are added until they state this many times as many equations as unknowns. A few layers together
            have far fewer false minima than the first alone (one start in five found a latent with 10, all with 40);
            several images fill a deeper layer's rows to the last and are found more exactly without it. None: 40 for
            one image per update, else 10.
    """
    margin = margin or (40.0 if problem.batch == 1 else 10.0)
    layers = _layers(problem, margin)
    if not layers:
        return None
    search = _Search(problem, layers, goal, recorder)
    starts = 0
    while starts < n_starts and (samples := search.open()).numel():
        starts += 1
        search.start(samples, n_evals, generator)
        search.settled = search.twice & (starts >= 4 and problem.is_inexact)
    return NoisyInputs(search.best.reshape(-1, *problem.shape), search.value, starts)


def _layers(problem: Problem, margin: float) -> list[Layer]:
    """Choose layers that tell the images apart from others."""
    available = problem.layers()
    while chosen := choose_layers(available, batch=problem.batch, unknowns=problem.unknowns, margin=margin):
        lacking = [layer for layer in chosen if _is_blind(problem, layer)]
        if not lacking:
            return chosen
        available = [layer for layer in available if layer not in lacking]
    return []


def _is_blind(problem: Problem, layer: Layer) -> bool:
    """Say whether a layer's gradient lacks the rank of its patches, or cannot tell two images from their mixtures.

    In front of a norm over single channels, or of a softmax, the patches' mean is lacking: every row of the signal that
    comes back sums to zero over the positions; rounding to 16 bits and defences hide that. Where its input is affine in
    the images, the span of several holds all their mixtures.
    """
    if problem.batch > 1 and _is_affine(problem, layer):
        return True
    if problem.is_inexact:
        return False
    gradients = (gradient[f"{layer.name}.weight"].flatten(1).double() for gradient in problem.gradients)
    strengths = torch.stack([torch.linalg.svdvals(gradient) for gradient in gradients])
    return bool((strengths[:, problem.batch * layer.positions - 1] < RANK * strengths[:, 0]).any())


@torch.no_grad()
def _is_affine(problem: Problem, layer: Layer) -> bool:
    images = torch.randn(3, *problem.shape, generator=torch.Generator().manual_seed(0))
    images[2] = images[:2].mean(0)
    inputs = capture(problem.model, [layer.name], problem.run, images)[layer.name]
    gap = (inputs[2] - inputs[:2].mean(0)).abs().max()
    return bool(gap <= 1e-5 * inputs.abs().max())


class _Search:
    """The best noisy inputs `[n, c h w]` so far, and their values `[n]`."""

    def __init__(self, problem: Problem, layers: list[Layer], goal: float, recorder: Recorder | None):
        self.problem, self.timesteps, self.goal, self.recorder = problem, problem.timesteps, goal, recorder
        self.test = SpanTest(problem.model, layers, problem.gradients, batch=problem.batch)
        self.best = torch.zeros(problem.n_samples, problem.unknowns)
        self.value = torch.full((problem.n_samples,), torch.inf)
        self.owners = torch.arange(problem.n_samples) // problem.batch
        self.settled, self.twice = torch.zeros(2, problem.n_samples, dtype=torch.bool)

    def open(self) -> Tensor:
        """Return the samples that are not found yet."""
        return ((self.value > self.goal) & ~self.settled).nonzero()[:, 0]

    def start(self, samples: Tensor, n_evals: int, generator: torch.Generator) -> None:
        """Descend once from random points, and keep what is better."""
        end = lbfgs(
            self.objective(samples),
            torch.randn(len(samples), self.problem.unknowns, generator=generator),
            n_evals=n_evals,
            goal=self.goal * 1e-3,
            stall=60,
            watch=self.watch(samples),
        )
        for sample, point, reached in zip(samples.tolist(), end.point, end.value, strict=True):
            again = bool((reached - self.value[sample]).abs() < AGAIN * reached)
            self.twice[sample] = again or (self.twice[sample] and bool(reached > self.value[sample]))
            if reached < self.value[sample] and not self.is_copy(sample, point):
                self.best[sample], self.value[sample] = point, reached

    def explained(self) -> dict[str, Tensor] | None:
        """Return, by layer, the rows `[n, batch positions, d]` that the images found so far account for."""
        done, problem = self.value <= self.goal, self.problem
        if problem.batch == 1 or not done.any():
            return None
        every = torch.arange(problem.n_samples)
        noisy = self.best.reshape(-1, *problem.shape)
        result = {}
        for name, rows in self.test.bases(lambda x: problem.predict(x, self.timesteps, every), noisy).items():
            known = (rows * done[:, None, None]).reshape(len(problem.updates), -1, rows.shape[2])
            _, sizes, axes = torch.linalg.svd(known.double(), full_matrices=False)
            result[name] = (axes * (sizes > 1e-6)[..., None]).float().repeat_interleave(problem.batch, 0)
        return result

    def objective(self, samples: Tensor) -> Objective:
        """Return the mean loss of the patch test over the layers, as a function of noisy inputs."""
        problem, explained = self.problem, self.explained()
        others = None if explained is None else {name: rows[samples] for name, rows in explained.items()}

        def forward(noisy: Tensor) -> Tensor:
            return problem.predict(noisy, self.timesteps[samples], samples)

        def objective(z: Tensor) -> tuple[Tensor, Tensor]:
            z = z.detach().requires_grad_(True)
            noisy, owners = z.reshape(-1, *problem.shape), self.owners[samples]
            losses = self.test.losses(forward, noisy, owners, explained=others).mean(1)
            return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]

        return objective

    def watch(self, samples: Tensor) -> Watch:
        """Return what shows the recorder all samples, those under way as they are."""

        def watch(count: int, point: Tensor, value: Tensor) -> None:
            if self.recorder is not None:
                shown = self.best.clone()
                shown[samples] = point
                noisy = shown.reshape(-1, *self.problem.shape)
                self.recorder.tell(float(value.mean()), noisy / self.problem.rates(self.timesteps)[0])

        return watch

    def is_copy(self, sample: int, point: Tensor) -> bool:
        """Say whether `point` is what another sample of the same update has already found."""
        others = ((self.owners == self.owners[sample]) & (self.value <= self.goal)).nonzero()[:, 0].tolist()
        return any(other != sample and bool((self.best[other] - point).square().mean() < 1e-2) for other in others)
