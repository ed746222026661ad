"""Regularised maximum likelihood (rMLE; He et al. 2019): search for the image that the client would send this for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core.progress import Callback
from splitlab.core.schedule import cosine
from splitlab.diffusion import sampling
from splitlab.diffusion.base import Base
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view, matching_timesteps, used_fields
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.messages import Knowledge, Observation, Reconstruction

TV = {"exact": 0.1, "denoiser": 0.025, "none": 0.3}
"""The default weight of total variation where latents are known exactly, and by prior where they are in noise.

Chosen by PSNR on 32 public images each of shapes and photos, none of them among the 600 that played the attacker's
own, between 0.01 and 5. So were `LR` and the default steps.
"""

LR = {"pixels": 0.015, "latents": 0.002}
"""The default step size, by space."""

ACCURACY = 0.03
"""Standard deviation added to every latent's: no search, and no 16-bit message, matches latents more closely."""


@dataclass(frozen=True)
class _Problem:
    """What to match: latents `[n, c, h, w]`, their standard deviation `[n, 1, 1, 1]`; a start; a key of `TV`."""

    target: Tensor
    std: Tensor
    start: Tensor
    kind: str


@dataclass(frozen=True)
class _Search:
    """How to look: the variable's space, total variation's weight (per unit of difference), Adam's steps and rate."""

    space: str
    tv: float
    steps: int
    lr: float
    batch: int


def likelihood(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: Annotated[int, Option("Adam steps; the start at the mean image takes 300 with lr 0.1", least=1)] = 20,
    lr: Annotated[float | None, Option("first step size, in pixel values or latents' units; none: LR", above=0)] = None,
    space: Annotated[str, Option("what is varied", choices=("pixels", "latents"))] = "pixels",
    tv: Annotated[float | None, Option("weight of total variation, 1: Laplace prior; none: TV", least=0)] = None,
    prior: Annotated[str, Option("what completes noisy latents", choices=("denoiser", "none"))] = "denoiser",
    start: Annotated[str, Option("where the search starts", choices=("denoised", "view", "mean"))] = "denoised",
    hints: Annotated[str, Option("what to do about hints", choices=("solve", "optimise", "none"))] = "solve",
    batch: Annotated[int, Option("samples searched for at once; sets memory and speed only", least=1)] = 128,
) -> Reconstruction:
    """Find the image whose passage through the client's own encoder and noising is the most likely, given a prior.

    rMLE (He et al. 2019, "Model inversion attacks against collaborative inference", eq. 1): minimise the distance of
    the features, plus total variation. Here the features are latents in Gaussian noise, so the distance is the
    likelihood's: |E(x) - z|² / (2 s²) + λ TV(x), with z the latents that `latent_view` leaves and s² the variance of
    what is left in them; s is 0 with the label and without feature noise, and `ACCURACY` is added in quadrature.
    λ = `tv` over the public images' mean gradient: natural images of a kind share it.

    Where s > 0, total variation alone is a poor prior. `prior="denoiser"` lets the public diffusion model complete the
    likelihood (`_image_problem`); `prior="none"` is He et al.'s attack as it stands. To vary latents takes over twice
    the time of pixels, and is no better than decoding at once.

    The hint is a second unknown of the same message: for every image, the hint latents activation⁻¹(smashed - fixed
    noise) - noisy_latents match `smashed` exactly, so it takes no part in the search for the image: "solve" decodes
    them, "optimise" searches pixels for them. Keys are not modelled. Needs `noisy_latents` and `timesteps`.
    """
    lr = LR[space] if lr is None else lr
    # Step 1: say what the image has to explain, and where to start.
    seen = labelled(observations, knowledge)
    problem, used = _image_problem(seen, knowledge, prior, start, space, batch)
    weight = TV[problem.kind] if tv is None else tv
    search = _Search(space, weight / mean_gradient(knowledge.public.images), steps, lr, batch)

    # Step 2: search for the image.
    images, objective = _minimise(problem, search, knowledge.base, "likelihood", callback)

    # Step 3: solve for the hint, or search.
    solved = None if hints == "none" else hint_latents(seen, observations, knowledge)
    if solved is None:
        return Reconstruction(images, used=used, objective=tuple(objective), n_evals=steps)
    pictures = knowledge.base.decode(solved)
    if hints == "optimise":
        search = replace(search, space="pixels", lr=LR["pixels"] if space == "latents" else lr)
        pictures = _searched_hints(solved, pictures, search, knowledge, callback)
    return Reconstruction(images, pictures, used=(*used, "smashed"), objective=tuple(objective), n_evals=steps)


def _searched_hints(
    latents: Tensor, start: Tensor, search: _Search, knowledge: Knowledge, callback: Callback | None
) -> Float[Tensor, "n 3 s s"]:
    """Search pixels for the hints that have these latents."""
    problem = _Problem(latents, torch.full_like(latents[:, :1, :1, :1], ACCURACY), start, "exact")
    weight = TV["exact"] / mean_gradient(knowledge.public.need_hints())
    return _minimise(problem, replace(search, tv=weight), knowledge.base, "likelihood of hints", callback)[0]


def _image_problem(
    seen: Observation, knowledge: Knowledge, prior: str, start: str, space: str, batch: int
) -> tuple[_Problem, tuple[str, ...]]:
    """Say what to match and where to start; return the fields that this took, too.

    The prior "denoiser" replaces z and s by the mean and standard deviation of its posterior: the one-step estimate at
    the matching timestep (Ho et al. 2020, eq. 15) and its error as measured on public images at that noise level.
    """
    base = knowledge.base
    view, std = latent_view(seen, knowledge)
    noisy = bool((std > 0).any())
    asked = noisy and (prior == "denoiser" or start == "denoised")
    estimate = denoise(view, std, seen.encoder_hidden_states, knowledge, batch=batch) if asked else view
    target = view
    if noisy and prior == "denoiser":
        target = estimate
        std = denoising_error(std, knowledge, prompts=seen.encoder_hidden_states is not None, batch=batch)
    place = estimate if start == "denoised" else view
    if start == "mean":
        images = knowledge.public.images.mean(0, keepdim=True).repeat(len(view), 1, 1, 1)
        place = images if space == "pixels" else base.encode(images)
    elif space == "pixels":
        place = base.decode(place)
    problem = _Problem(target, (std.square() + ACCURACY**2).sqrt(), place, prior if noisy else "exact")
    return problem, used_fields(seen, prompts=asked)


@torch.no_grad()
def denoise(
    view: Float[Tensor, "n c h w"],
    std: Float[Tensor, "n 1 1 1"],
    text: Float[Tensor, "n l d"] | None,
    knowledge: Knowledge,
    *,
    batch: int = 128,
) -> Float[Tensor, "n c h w"]:
    """Estimate latents from latents plus noise of `std` by the public U-Net at the matching timestep, in one step."""
    base = knowledge.base
    timesteps, alphas = matching_timesteps(std, knowledge)
    if text is None:
        text = torch.zeros(1, *base.text_shape).expand(len(view), -1, -1)
    parts = []
    for part in torch.arange(len(view)).split(batch):
        model = partial(_noise_pred, base, text[part])
        states = alphas[part].sqrt() * view[part]
        parts.append(sampling.sample(model, states, [timesteps[part]], sampling.ddim_step(base.alphas_cumprod)))
    return torch.cat(parts)


def _noise_pred(base: Base, text: Tensor, states: Tensor, timesteps: Tensor) -> Tensor:
    return base.unet(states, timesteps, encoder_hidden_states=text).sample


def denoising_error(
    std: Float[Tensor, "n 1 1 1"],
    knowledge: Knowledge,
    *,
    prompts: bool,
    samples: int = 64,
    levels: int = 8,
    batch: int = 128,
) -> Float[Tensor, "n 1 1 1"]:
    """Return how far off `denoise` is at the noise levels `std`, root mean square per latent, on public images.

    Measured at `levels` levels that span the given ones, on the first `samples` public images, and interpolated
    between them in logarithms. The test noise is one fixed draw: the result is a property of the public model.
    """
    base, public = knowledge.base, knowledge.public
    n = min(samples, len(public))
    latents = base.encode(public.images[:n])
    text = base.encode_prompts(public.prompts[:n]) if prompts else None
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    wanted = std.flatten().clamp_min(1e-3).log()
    knots = torch.linspace(float(wanted.min()), float(wanted.max()) + 1e-3, levels)
    errors = []
    for level in knots.exp():
        estimate = denoise(latents + level * noise, level.expand(n)[:, None, None, None], text, knowledge, batch=batch)
        errors.append((estimate - latents).square().mean().sqrt().log())
    place = (wanted - knots[0]) / (knots[1] - knots[0])
    left = place.long().clamp(0, levels - 2)
    table = torch.stack(errors)
    return torch.lerp(table[left], table[left + 1], place - left).exp()[:, None, None, None]


def total_variation(images: Float[Tensor, "n c h w"], *, smoothing: float = 0.01) -> Float[Tensor, " n"]:
    """Return the isotropic total variation (Rudin, Osher and Fatemi 1992) per image: summed over pixels and channels.

    Args:
        images: any range.
        smoothing: differences well below it count quadratically, so that there is a gradient at 0.
    """
    padded = F.pad(images, (0, 1, 0, 1), mode="replicate")
    down, right = padded[:, :, 1:, :-1] - images, padded[:, :, :-1, 1:] - images
    return ((down.square() + right.square() + smoothing**2).sqrt() - smoothing).sum((1, 2, 3))


def mean_gradient(images: Float[Tensor, "n c h w"], *, samples: int = 512) -> float:
    """Return the mean size of the difference between neighbouring pixels, over the first `samples` images."""
    few = images[:samples]
    size = float(total_variation(few, smoothing=1e-6).mean()) / few[0].numel()
    return max(size, 1e-3)  # public images without any edge do not forbid one


def _minimise(
    problem: _Problem, search: _Search, base: Base, what: str, callback: Callback | None
) -> tuple[Float[Tensor, "n 3 s s"], list[float]]:
    """Minimise the objective batch by batch; return the images and the mean objective before each step."""
    parts = torch.arange(len(problem.target)).split(search.batch)
    totals, images, done = torch.zeros(search.steps), [], 0
    with tqdm(total=len(parts) * search.steps, desc=what, mininterval=2, leave=False) as bar:
        for part in parts:
            batch = _Problem(problem.target[part], problem.std[part], problem.start[part], problem.kind)

            def tell(step: int, value: float, weight: int = len(part)) -> None:
                nonlocal done
                totals[step] += value * weight / len(problem.target)
                done += 1
                bar.update()
                if callback:
                    callback(what, done, len(parts) * search.steps, value)

            images.append(_descend(batch, search, base, tell))
    return torch.cat(images), totals.tolist()


def _descend(
    problem: _Problem, search: _Search, base: Base, tell: Callable[[int, float], None]
) -> Float[Tensor, "b 3 s s"]:
    """Run Adam on one batch; samples do not interact, as Adam scales every number by its own history."""
    pixels, scale = search.space == "pixels", base.vae.config.scaling_factor
    # Convolutions on a CPU are up to twice as fast on this layout.
    variable = problem.start.clone(memory_format=torch.channels_last)
    variable.requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=search.lr, betas=(0.9, 0.99))
    for step in range(search.steps):
        optimizer.param_groups[0]["lr"] = cosine(search.lr, step, search.steps)
        # The passage through the client, in the graph: `Base`'s own methods keep no gradient.
        images = variable if pixels else base.vae.decode(variable / scale).sample
        latents = base.vae.encode(variable).latent_dist.mean * scale if pixels else variable
        # He et al. 2019, eq. 1: the misfit of the features, plus total variation.
        misfit = ((latents - problem.target) / problem.std).square().sum((1, 2, 3)) / 2
        objective = misfit + search.tv * total_variation(images)
        (variable.grad,) = torch.autograd.grad(objective.sum(), variable)
        optimizer.step()
        if pixels:
            with torch.no_grad():
                variable.clamp_(-1.0, 1.0)
        tell(step, float(objective.detach().mean()))
    result = variable.detach().contiguous()
    return result if pixels else base.decode(result)


LIKELIHOOD = Family(
    "Likelihood maximisation (rMLE)",
    "The image is optimised until the client's public computation, run on it, gives what was sent, with total "
    "variation as the prior (He et al. 2019). Given the noise, nothing is left unknown.",
)

ATTACKS = (
    Attack(
        likelihood,
        "likelihood maximisation (rMLE)",
        rank=20,
        family=LIKELIHOOD,
        reason="the label is sent, so the input that explains the message is the image",
    ),
)
