"""The public diffusion model as the attacker's prior: the image that best explains a noisy view of it."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.sampling import Level, level_model, level_step, sample
from splitlab.split.attacks.calibration import Calibration, CalibrationSet
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import labelled, latent_view, matching_timesteps, used_fields
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.messages import Knowledge, Observation, Reconstruction


@torch.no_grad()
def posterior(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: Annotated[int, Option("U-Net steps; 1: the posterior mean", least=1)] = 1,
    draws: Annotated[int, Option("trajectories to average; more than 1 needs eta above 0", least=1)] = 1,
    eta: Annotated[float, Option("share of fresh noise in every step; 0: DDIM, 1: DDPM", least=0, most=1)] = 0.0,
    guidance: Annotated[float, Option("weight of the prompt's direction; 1: the conditional mean")] = 1.0,
    calibrate: Annotated[bool, Option("shrink estimates to the public mean as much as pays on public data")] = True,
    batch: Annotated[int, Option("samples per U-Net call", least=1)] = 128,
) -> Reconstruction:
    """Denoise what is left of the noise with the public U-Net, from the timestep at which it fits.

    Everything known is taken off first (`latent_view`): with the label, latents plus noise of σ1 / sqrt(ᾱ_t) remain,
    without it the sent state itself. That is a diffusion state at the matching timestep. One step gives the posterior
    mean (Ho et al. 2020, eq. 15; Efron 2011 for why), more steps a DDIM trajectory to 0 (Song et al. 2021, eq. 12).
    The prompt conditions where it is sent, zeros do elsewhere.
    Hints are those of the closed form, exact under one shared draw; under `independent_draws` they are smoothed by
    the public hints' covariance (`wiener`), under hint noise by that or by the public hints themselves
    (`public_posterior`), whichever errs less on imitated messages.

    Needs `timesteps` and `noisy_latents`. Calibration matters where the noise exceeds what the U-Net can handle.
    """
    if draws > 1 and (eta == 0 or steps == 1):
        raise InputError(f"{draws} draws would all be equal: set eta above 0 and steps above 1, or draws to 1")

    def estimate(view: Tensor, std: Tensor, text: Tensor | None, tell: Callback | None = None) -> Tensor:
        how = {"steps": steps, "eta": eta, "guidance": guidance, "generator": generator, "batch": batch}
        draw = partial(denoise, view, std, knowledge, text=text, callback=tell, **how)  # type: ignore[arg-type]
        return torch.stack([draw() for _ in range(draws)]).mean(0)

    # Step 1: take off all that is known; what is left is a diffusion state, and the U-Net denoises it.
    seen = labelled(observations, knowledge)
    view, std = latent_view(seen, knowledge)
    latents = estimate(view, std, seen.encoder_hidden_states, callback)

    # Step 2: do the same to public samples, and shrink by what that tells.
    public = CalibrationSet(seen, observations, knowledge, generator)
    if calibrate:
        learned = estimate(public.view, public.std, public.text)
        latents = Calibration(public.std, learned, public.latents)(std, latents)

    # Step 3: the hints follow by algebra, and are smoothed where noise is left in them.
    hints = public.hints(hint_latents(seen, observations, knowledge))
    pictures = None if hints is None else knowledge.base.decode(hints)
    used = used_fields(seen) if hints is None else (*used_fields(seen), "smashed")
    n_evals = steps * draws * (2 if guidance != 1 and seen.encoder_hidden_states is not None else 1)
    return Reconstruction(knowledge.base.decode(latents), pictures, used=used, n_evals=n_evals)


@torch.no_grad()
def denoise(
    view: Float[Tensor, "n c h w"],
    std: Float[Tensor, "n 1 1 1"],
    knowledge: Knowledge,
    *,
    text: Float[Tensor, "n l d"] | None = None,
    steps: int = 1,
    eta: float = 0.0,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
    batch: int = 128,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Estimate latents x from views x + std n, n ~ N(0, 1), with the public U-Net.

    view / sqrt(1 + std²) is a diffusion state with ᾱ = 1 / (1 + std²). Views with less noise than half of the
    schedule's first level are returned as they are. Further steps go down evenly in timesteps (`level_step`).

    Args:
        view, std: the views and the standard deviation of their noise.
        knowledge: for the base model.
        text: prompts' embeddings; None: zeros.
        steps, eta, guidance, batch: see `posterior`.
        generator: of fresh noise; needed where `eta` is above 0.
        callback: told of every batch.
    """
    base = knowledge.base
    levels = ((1 - base.alphas_cumprod) / base.alphas_cumprod).sqrt()
    result = view.clone()
    noisy = torch.nonzero(std.flatten() > levels[0] / 2)[:, 0]
    for done, part in enumerate(noisy.split(batch) if len(noisy) else (), start=1):
        blank = torch.zeros(len(part), *base.text_shape)
        condition = blank if text is None else text[part]
        away = None if text is None or guidance == 1 else blank
        model = level_model(base.unet, condition, blank=away, guidance=guidance)
        path = _path(std[part], steps, levels, knowledge)
        result[part] = sample(model, view[part], path, level_step(eta, generator))
        if callback:
            callback("denoise", min(done * batch, len(noisy)), len(noisy), 0.0)
    return result


def _path(std: Tensor, steps: int, levels: Float[Tensor, " T"], knowledge: Knowledge) -> list[Level]:
    """Go down evenly in timesteps from that of matching noise; noise of a level is never more than that before."""
    first, _ = matching_timesteps(std, knowledge)
    path = [Level(first, std)]
    for step in range(1, steps):
        timesteps = (first * (steps - step)) // steps
        path.append(Level(timesteps, torch.minimum(levels[timesteps][:, None, None, None], path[-1].std)))
    return path


POSTERIOR = Family(
    "Diffusion posterior",
    "What algebra leaves is latents plus Gaussian noise, a state of the public diffusion model at the timestep "
    "of matching noise: its U-Net denoises it.",
)

ATTACKS = (
    Attack(
        posterior,
        "diffusion posterior",
        rank=30,
        family=POSTERIOR,
        reason="what the label does not cover is Gaussian noise, which the public denoiser removes",
    ),
)
