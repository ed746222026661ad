"""GIDM and GIDM+ (Huang, Hong, Roos & Chen 2024), run honestly: every unknown starts at random, none at the truth.

GIDM knows noise and timestep. Phase 1 searches the latent space of a diffusion prior: x_T is optimised through a DDIM
sampler until the image's gradient matches (summed squared L2, Adam). Phase 2 goes on in the image itself. GIDM+ knows
neither: image, noise and timestep are optimised together ("triple optimisation"); the timestep by a softmax over the
schedule whose means of t and of the signal rates are what the model sees, so that its logits receive a gradient.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion import sampling
from splitlab.federated.attacks.problem import Inversion, Problem, Recorder
from splitlab.federated.attacks.record import Attack
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.update import Update


def gidm(
    update: Update | Sequence[Update],
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    prior: nn.Module | None = None,
    sampler_steps: int = 16,
    latent_evals: int = 2500,
    pixel_evals: int = 2500,
    lr: float = 0.01,
    cpu_s: float | None = None,
) -> Inversion:
    """Run GIDM: noise and timesteps known.

    Args:
        update, knowledge, generator, callback: see `record.Attack`.
        prior: a trained noise-predicting model over the same samples as the attacked one; None: the public base's
            U-Net where there is one, else the attacked model itself.
        sampler_steps: DDIM steps of phase 1, back-propagated through with checkpoints.
        latent_evals: evaluations of phase 1; 0 leaves it out.
        pixel_evals: evaluations of phase 2.
        lr: Adam's learning rate in both.
        cpu_s: stop after this many CPU seconds, at most half of them in phase 1.
    """
    problem = Problem(update, knowledge)
    noise, timesteps = problem.need("noise"), problem.timesteps
    recorder = Recorder(problem, "gidm", latent_evals + pixel_evals, callback)
    signal, sigma = problem.rates(timesteps)

    def gap(clean: Tensor) -> Tensor:
        target = noise if problem.objective == "epsilon" else signal * noise - sigma * clean
        return _gaps(problem, signal * clean + sigma * noise, target, timesteps)

    start = torch.randn((problem.n_samples, *problem.shape), generator=generator)
    clean = start
    # Phase 1 (sec. 4.1): search the prior's latent space; the image is what its sampler makes of the latent.
    if latent_evals:
        sample = _sampler(problem, prior, sampler_steps)
        half = None if cpu_s is None else cpu_s / 2
        (start,), clean = _adam([start], lambda z: (sample(z), gap), latent_evals, lr, recorder, half)
    # Phase 2 (sec. 4.2): go on in the image itself.
    (clean,), _ = _adam([clean], lambda z: (z, gap), pixel_evals, lr, recorder, cpu_s)
    return recorder.finish(clean, gap(clean).detach(), timesteps, noise)


def gidm_plus(
    update: Update | Sequence[Update],
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    n_evals: int = 2500,
    lr: float = 0.01,
    timestep_lr: float = 0.1,
    cpu_s: float | None = None,
) -> Inversion:
    """Run GIDM+: noise and timesteps unknown; granted ones are ignored. The model has to take fractional timesteps.

    Image and noise start standard normal, the timestep as no opinion.

    Args:
        update, knowledge, generator, callback: see `record.Attack`.
        n_evals: evaluations.
        lr: Adam's learning rate for image and noise.
        timestep_lr: for the logits of the timesteps.
        cpu_s: stop after this many CPU seconds.
    """
    problem = Problem(update, knowledge)
    _check_fractions(problem)
    recorder = Recorder(problem, "gidm_plus", n_evals, callback)
    alphas = knowledge.alphas_cumprod.float()
    shape = (problem.n_samples, *problem.shape)
    clean = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    logits = torch.zeros(problem.n_samples, len(alphas))
    steps = torch.arange(len(alphas), dtype=torch.float32)

    def expand(clean: Tensor, noise: Tensor, logits: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        chances = logits.softmax(1)
        alpha = (chances @ alphas)[:, None, None, None]

        def gap(clean: Tensor) -> Tensor:
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            target = noise if problem.objective == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            return _gaps(problem, noisy, target, chances @ steps)

        return clean, gap

    rates = (lr, lr, timestep_lr)
    (clean, noise, logits), _ = _adam([clean, noise, logits], expand, n_evals, rates, recorder, cpu_s)
    _, gap = expand(clean, noise, logits)
    timesteps = (logits.softmax(1) @ steps).round().long()
    return recorder.finish(clean, gap(clean).detach(), timesteps, noise)


@torch.no_grad()
def _check_fractions(problem: Problem) -> None:
    try:
        problem.predict(torch.zeros(1, *problem.shape), torch.tensor([0.5]), torch.tensor([0]))
    except (RuntimeError, TypeError, IndexError) as error:  # a table is looked up by whole numbers
        raise InputError(f"GIDM+ needs a model that takes fractional timesteps, this one does not ({error})") from None


def _adam(
    variables: Sequence[Tensor],
    expand: Callable[..., tuple[Tensor, Callable[[Tensor], Tensor]]],
    n_evals: int,
    lr: float | Sequence[float],
    recorder: Recorder,
    cpu_s: float | None,
) -> tuple[list[Tensor], Tensor]:
    """Minimise the sum of all updates' gaps; return the last variables and the image that they stand for."""
    leaves = [value.detach().clone().requires_grad_(True) for value in variables]
    rates = [lr] * len(leaves) if isinstance(lr, float) else list(lr)
    groups = [{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves, rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    clean = leaves[0].detach()
    for _ in range(n_evals):
        if cpu_s is not None and recorder.cpu_s >= cpu_s:
            break
        clean, gap = expand(*leaves)
        gaps = gap(clean)
        optimizer.zero_grad()
        gaps.sum().backward(inputs=leaves)
        optimizer.step()
        recorder.tell(float(gaps.detach().mean()), clean)
    with torch.no_grad():
        clean, _ = expand(*leaves)
    return [value.detach() for value in leaves], clean.detach()


def _gaps(problem: Problem, noisy: Tensor, target: Tensor, timesteps: Tensor) -> Float[Tensor, " u"]:
    """Return each update's summed squared L2 between its own and the candidates' gradient, differentiable."""
    shared = {n: p for n, p in problem.model.named_parameters() if n in problem.gradients[0]}
    gaps = []
    for number, wanted in enumerate(problem.gradients):
        part = slice(number * problem.batch, (number + 1) * problem.batch)
        parameters = {name: value.detach().requires_grad_(True) for name, value in shared.items()}
        samples = torch.arange(number * problem.batch, (number + 1) * problem.batch)
        predicted = problem.predict(noisy[part], timesteps[part], samples, parameters=parameters)
        loss = (predicted - target[part]).square().mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
        pairs = zip(gradients, parameters, strict=True)
        gaps.append(torch.stack([(gradient - wanted[name]).square().sum() for gradient, name in pairs]).sum())
    return torch.stack(gaps)


def _sampler(problem: Problem, prior: nn.Module | None, steps: int) -> Callable[[Tensor], Tensor]:
    """Return DDIM (Song et al. 2021, eq. 12, η = 0) from x_T to a clean sample, differentiable, with checkpoints."""
    base = problem.knowledge.base
    network = prior or (problem.model if base is None else base.unet)
    alphas = problem.knowledge.alphas_cumprod.float()
    if steps < 1 or steps > len(alphas):
        raise InputError(f"sampler_steps must be in 1 to {len(alphas)}, got {steps}; GIDM uses 16")
    grid = torch.linspace(len(alphas) - 1, 0, steps).round().long().tolist()
    text = None
    if isinstance(network, UNet2DConditionModel):
        if base is None:
            raise InputError("a text-conditional prior needs knowledge.base for its empty prompt; give a pixel prior")
        text = base.encode_prompts([""]).expand(problem.n_samples, -1, -1)

    def noise_pred(x: Tensor, timestep: int) -> Tensor:
        times = torch.full((len(x),), timestep)
        return network(x, times).sample if text is None else network(x, times, text).sample

    model = partial(checkpoint, noise_pred, use_reentrant=False)
    return lambda x: sampling.sample(model, x, grid, sampling.ddim_step(alphas))


ATTACKS = (
    Attack(
        gidm,
        "GIDM",
        rank=50,
        family="GIDM",
        needs=("timesteps", "noise"),
        as_published=True,
        may_be_0=("latent_evals", "pixel_evals"),
    ),
    Attack(gidm_plus, "GIDM+", rank=60, family="GIDM", as_published=True),
)
