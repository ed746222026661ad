"""Regularised maximum likelihood (rMLE; He et al. 2019): search for the image that the client would send this for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.base import Base, denoised
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view, matching_timesteps
from splitlab.split.attacks.record import Attack, Family
from splitlab.split.messages import Knowledge, Observation, Reconstruction

CHOICES = {
    "space": ("pixels", "latents"),
    "prior": ("denoiser", "none"),
    "start": ("denoised", "view", "mean"),
    "hints": ("solve", "optimise", "none"),
}
"""What the options of `likelihood` may be."""

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
    steps: int = 20,
    lr: float | None = None,
    space: str = "pixels",
    tv: float | None = None,
    prior: str = "denoiser",
    start: str = "denoised",
    hints: str = "solve",
    batch: int = 128,
) -> Reconstruction:
    """Find the image whose passage through the client's own encoder and noising is the most likely, given a prior.

    rMLE (He et al. 2019, "Model inversion attacks against collaborative inference", eq. 1): minimise the distance of
    the features, plus total variation. Here the features are latents in Gaussian noise, so the distance is the
    likelihood's: |E(x) - z|² / (2 s²) + λ TV(x), with z the latents that the message leaves once all that is known is
    taken off and s² the variance of what is left in them (`channel.latent_view`). That is the mismatch of the sent
    noisy latents over its variance, only rescaled. s is 0 with the label and without feature noise; `ACCURACY` is
    added in quadrature. λ = `tv` over the public images' mean gradient: natural images of a kind share it.

    Where s > 0, total variation alone is a poor prior. `prior="denoiser"` lets the public diffusion model complete the
    likelihood: z and s are replaced by the mean and standard deviation of its posterior, the one-step estimate at the
    matching timestep (Ho et al. 2020, eq. 15) and its error as measured on public images at that noise level.
    `prior="none"` is He et al.'s attack as it stands.

    The hint is a second unknown of the same message: for every image, the hint latents activation⁻¹(smashed - fixed
    noise) - noisy_latents match `smashed` exactly, so it takes no part in the search for the image. Keys (mixing,
    shuffling) are not modelled. There are no restarts; nothing is drawn.

    Args:
        observations: what was sent; needs `noisy_latents` and `timesteps`; uses the label, as sent or as solved for
            from a U-shaped split's gradient, the prompts (denoiser) and `smashed` (hints) where there are any.
        knowledge: the threat model; the client is white-box.
        generator: unused.
        callback: told of every step's objective, the mean over its batch's samples.
        steps: of Adam, with a cosine decay. 20 are enough from the default start; "mean" takes 300 with lr 0.1.
        lr: first step size, in pixel values of [-1, 1] or in the latents' units; None: `LR`.
        space: "pixels": vary the image; "latents": vary latents and decode them, which skips the encoder and stays
            within what the decoder can draw: over twice the time, and no better than decoding at once.
        tv: weight of total variation relative to a Laplace prior of the public images' mean gradient; None: `TV`.
        prior: "denoiser" or "none"; the same where s = 0.
        start: "denoised": the decoded one-step estimate (the decoded latents where s = 0); "view": z decoded; "mean":
            the mean public image.
        hints: "solve": decode the latents that solve for `smashed`; "optimise": search pixels for them, as for the
            image; "none".
        batch: samples searched for at once; it sets memory and speed only.

    Raises:
        InputError: a needed field was not sent, or an option is out of range.
    """
    _check(space=space, prior=prior, start=start, hints=hints)
    lr = LR[space] if lr is None else lr
    if steps < 1 or batch < 1 or not lr > 0 or (tv is not None and not tv >= 0):
        raise InputError(
            f"likelihood: steps {steps} and batch {batch} must be 1 or more, lr {lr} positive and tv {tv} not negative"
        )
    seen = labelled(observations, knowledge)
    problem, used = _image_problem(seen, knowledge, prior, start, space, batch)
    weight = TV[problem.kind] if tv is None else tv
    search = _Search(space, weight / mean_gradient(knowledge.public.images), steps, lr, batch)
    images, objective = _minimise(problem, search, knowledge.base, "likelihood", callback)
    found = None
    solved = None if hints == "none" else hint_latents(seen, observations, knowledge)
    if solved is not None:
        used = (*used, "smashed")
        found = knowledge.base.decode(solved)
        if hints == "optimise":
            problem = _Problem(solved, torch.full_like(solved[:, :1, :1, :1], ACCURACY), found, "exact")
            weight = TV["exact"] / mean_gradient(knowledge.public.need_hints())
            search = _Search("pixels", weight, steps, LR["pixels"] if space == "latents" else lr, batch)
            found, _ = _minimise(problem, search, knowledge.base, "likelihood of hints", callback)
    return Reconstruction(images, found, used=used, objective=tuple(objective), n_evals=steps)


def _check(**chosen: str) -> None:
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise InputError(f"likelihood: {name} {value!r} is unknown; choose one of {', '.join(CHOICES[name])}")


def _image_problem(
    seen: Observation, knowledge: Knowledge, prior: str, start: str, space: str, batch: int
) -> tuple[_Problem, tuple[str, ...]]:
    """Say what to match and where to start; return the fields that this took, too."""
    base = knowledge.base
    view, std = latent_view(seen, knowledge)
    label = ("noise",) if seen.noise_pred is None else ("noise_pred", "noise_pred_gradient")
    used = ["timesteps", "noisy_latents", *(label if seen.noise is not None else ())]
    target, first, noisy = view, view, bool((std > 0).any())
    if noisy and (prior == "denoiser" or start == "denoised"):
        first = denoise(view, std, seen.encoder_hidden_states, knowledge, batch=batch)
        if seen.encoder_hidden_states is not None:
            used.append("encoder_hidden_states")
    if noisy and prior == "denoiser":
        target = first
        std = denoising_error(std, knowledge, prompts=seen.encoder_hidden_states is not None, batch=batch)
    place = first if start == "denoised" else view
    if start == "mean":
        images = knowledge.public.images.mean(0, keepdim=True).repeat(len(view), 1, 1, 1)
        place = images if space == "pixels" else base.encode(images)
    elif space == "pixels":
        place = base.decode(place)
    kind = prior if noisy else "exact"
    return _Problem(target, (std.square() + ACCURACY**2).sqrt(), place, kind), tuple(used)


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
        state = alphas[part].sqrt() * view[part]
        noise_pred = base.unet(state, timesteps[part], encoder_hidden_states=text[part]).sample
        parts.append(denoised(state, noise_pred, alphas[part]))
    return torch.cat(parts)


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
        found = denoise(latents + level * noise, level.expand(n)[:, None, None, None], text, knowledge, batch=batch)
        errors.append((found - latents).square().mean().sqrt().log())
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
            own = _Problem(problem.target[part], problem.std[part], problem.start[part], problem.kind)

            def tell(step: int, value: float, weight: int = len(part)) -> None:
                nonlocal done
                totals[step] += value * weight / len(problem.target)
                done += 1
                bar.update()
                if callback:
                    callback(what, done, len(parts) * search.steps, value)

            images.append(_descend(own, search, base, tell))
    return torch.cat(images), totals.tolist()


def _descend(
    problem: _Problem, search: _Search, base: Base, tell: Callable[[int, float], None]
) -> Float[Tensor, "b 3 s s"]:
    """Run Adam on one batch; samples do not interact, as Adam scales every number by its own history."""
    pixels = search.space == "pixels"
    # Convolutions on a CPU are up to twice as fast on this layout.
    variable = problem.start.clone(memory_format=torch.channels_last)
    variable.requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=search.lr, betas=(0.9, 0.99))
    for step in range(search.steps):
        optimizer.param_groups[0]["lr"] = search.lr * 0.5 * (1 + math.cos(math.pi * step / search.steps))
        images, latents = _passage(variable, pixels, base)
        misfit = ((latents - problem.target) / problem.std).square().sum((1, 2, 3)) / 2
        objective = misfit + search.tv * total_variation(images)
        (variable.grad,) = torch.autograd.grad(objective.sum(), variable)
        optimizer.step()
        with torch.no_grad():
            if pixels:
                variable.clamp_(-1.0, 1.0)
        tell(step, float(objective.detach().mean()))
    found = variable.detach().contiguous()
    return found if pixels else base.decode(found)


def _passage(variable: Tensor, pixels: bool, base: Base) -> tuple[Tensor, Tensor]:
    """Return images and latents that belong to the variable, in the graph: `Base`'s own methods keep no gradient."""
    scale = base.vae.config.scaling_factor
    if pixels:
        return variable, base.vae.encode(variable).latent_dist.mean * scale
    return base.vae.decode(variable / scale).sample, variable


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
