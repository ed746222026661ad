"""The public diffusion model as the attacker's prior: the image that best explains a noisy view of it."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.base import Encoded, encoded
from splitlab.split.attacks.closed_form import hint_latents, public_hints
from splitlab.split.attacks.latent_view import labelled, latent_view, matching_timesteps
from splitlab.split.attacks.record import Attack, Family
from splitlab.split.attacks.simulated_client import imitate_known
from splitlab.split.messages import Knowledge, Observation, Reconstruction, senders

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`(view, std, text) -> latents`."""

N_PUBLIC = 256
"""Public samples on which estimates are calibrated."""

HINT_FLOOR = 0.1
"""Least standard deviation at which coarse hints are compared with public ones, which are few."""

LEARNABLE = ("smashed", "noise", "encoder_hidden_states")
"""Fields that help and that a client may not have sent."""


@torch.no_grad()
def posterior(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: int = 1,
    draws: int = 1,
    eta: float = 0.0,
    guidance: float = 1.0,
    calibrate: bool = True,
    batch: int = 128,
) -> Reconstruction:
    """Denoise what is left of the noise with the public U-Net, from the timestep at which it fits.

    Everything known is taken off first (`channel.latent_view`): with the label, latents plus noise of σ1 / sqrt(ᾱ_t)
    remain, without it the sent state itself. That is a diffusion state at the matching timestep. One step gives the
    posterior mean (Ho et al. 2020, eq. 15; Efron 2011 for why), more steps a DDIM trajectory to 0 (Song et al. 2021,
    eq. 12). The prompt conditions where it is sent, zeros do elsewhere.
    Hints are those of the closed form, exact under one shared draw; under `independent_draws` they are smoothed by
    the public hints' covariance (`wiener`), under hint noise by that or by the public hints themselves
    (`public_posterior`), whichever errs less on imitated messages.

    Args:
        observations: what was sent; needs `timesteps` and `noisy_latents`.
        knowledge: the threat model.
        generator: of the public samples for the calibration, and of sampling noise.
        callback: told of every batch.
        steps: U-Net steps; 1: posterior mean.
        draws: trajectories to average; more than 1 needs `eta` above 0.
        eta: share of fresh noise in every step, 0 (DDIM) to 1 (Ho et al.'s sampler).
        guidance: weight of the prompt's direction (Ho & Salimans 2022, eq. 6 with 1 + w); 1: the conditional mean.
        calibrate: shrink estimates towards the mean public latents as much as pays on imitated public messages of
            the same noise level; matters where the noise exceeds what the U-Net can handle.
        batch: samples per U-Net call.

    Raises:
        InputError: `timesteps` or `noisy_latents` were not sent, or the options contradict one another.
    """
    _check(steps, draws, eta)
    seen = labelled(observations, knowledge)
    view, std = latent_view(seen, knowledge)

    def estimate(view: Tensor, std: Tensor, text: Tensor | None, tell: Callback | None = None) -> Tensor:
        options = {"steps": steps, "eta": eta, "guidance": guidance, "batch": batch}
        found = [
            denoise(view, std, knowledge, text=text, generator=generator, callback=tell, **options)  # type: ignore[arg-type]
            for _ in range(draws)
        ]
        return torch.stack(found).mean(0)

    latents = estimate(view, std, seen.encoder_hidden_states, callback)
    images_used = used_fields(seen)
    calibration_set = CalibrationSet(seen, observations, knowledge, generator)
    if calibrate:
        learned = estimate(calibration_set.view, calibration_set.std, calibration_set.text)
        latents = Calibration(calibration_set.std, learned, calibration_set.latents)(std, latents)
    hints = calibration_set.hints(hint_latents(seen, observations, knowledge))
    used = images_used if hints is None else (*images_used, "smashed")
    n_evals = steps * draws * (2 if guidance != 1 and seen.encoder_hidden_states is not None else 1)
    base = knowledge.base
    return Reconstruction(
        base.decode(latents), None if hints is None else base.decode(hints), used=used, n_evals=n_evals
    )


def _check(steps: int, draws: int, eta: float) -> None:
    if steps < 1 or draws < 1:
        raise InputError(f"steps and draws must be 1 or more, got {steps} and {draws}")
    if not 0 <= eta <= 1:
        raise InputError(f"eta is a share of noise from 0 to 1, got {eta}")
    if draws > 1 and (eta == 0 or steps == 1):
        raise InputError(f"{draws} draws would all be equal: set eta above 0 and steps above 1, or draws to 1")


def used_fields(seen: Observation) -> tuple[str, ...]:
    """Name the sent fields that a view of the latents and the U-Net's prompt are taken from."""
    if seen.noise is None:
        label: tuple[str, ...] = ()
    else:
        label = ("noise",) if seen.noise_pred is None else ("noise_pred", "noise_pred_gradient")
    text = () if seen.encoder_hidden_states is None else ("encoder_hidden_states",)
    return ("timesteps", "noisy_latents", *label, *text)


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

    view / sqrt(1 + std²) is a diffusion state with ᾱ = 1 / (1 + std²); there noise_pred is an estimate of n and
    x = view - std noise_pred (Ho et al. 2020, eq. 15). Views with less noise than half of the schedule's first level
    are returned as they are. Further steps go down evenly in timesteps; with s < std the next level,
    u² = eta² s² (1 - s² / std²) and fresh noise z: view ← x + sqrt(s² - u²) noise_pred + u z
    (Song et al. 2021, eq. 12 and 16, divided by sqrt(ᾱ)).

    Args:
        view, std: the views and the standard deviation of their noise.
        knowledge: for the base model.
        text: prompts' embeddings; None: zeros.
        steps: U-Net steps, 1 or more.
        eta: share of fresh noise, 0 to 1.
        guidance: weight of the prompt's direction; 1: conditional.
        generator: of fresh noise; needed where `eta` is above 0.
        batch: samples per U-Net call.
        callback: told of every batch.
    """
    alphas = knowledge.base.alphas_cumprod
    levels = ((1 - alphas) / alphas).sqrt()
    result = view.clone()
    todo = torch.nonzero(std.flatten() > levels[0] / 2)[:, 0]
    for done, part in enumerate(todo.split(batch) if len(todo) else ()):
        x, level = view[part], std[part]
        first, _ = matching_timesteps(level, knowledge)
        for step in range(steps):
            at = (first * (steps - step)) // steps
            condition = None if text is None else text[part]
            noise_pred = _noise_pred(x / (1 + level.square()).sqrt(), at, knowledge, condition, guidance)
            clean = x - level * noise_pred
            if step + 1 < steps:
                lower = torch.minimum(levels[(first * (steps - step - 1)) // steps][:, None, None, None], level)
                fresh = eta * lower * (1 - lower.square() / level.square()).clamp_min(0).sqrt()
                x = clean + (lower.square() - fresh.square()).clamp_min(0).sqrt() * noise_pred
                if eta:
                    x = x + fresh * torch.randn(x.shape, generator=generator)
                level = lower
        result[part] = clean
        if callback:
            callback("denoise", min((done + 1) * batch, len(todo)), len(todo), 0.0)
    return result


def _noise_pred(state: Tensor, timesteps: Tensor, knowledge: Knowledge, text: Tensor | None, guidance: float) -> Tensor:
    base = knowledge.base
    blank = torch.zeros(len(state), *base.text_shape)
    condition = blank if text is None else text
    predicted: Tensor = base.unet(state, timesteps, encoder_hidden_states=condition).sample
    if text is None or guidance == 1:
        return predicted
    plain = base.unet(state, timesteps, encoder_hidden_states=blank).sample
    return plain + guidance * (predicted - plain)


class CalibrationSet:
    """Public messages sent as the real ones were: what an estimate achieves on them, the attacker can measure."""

    def __init__(
        self,
        seen: Observation,
        observations: Sequence[Observation],
        knowledge: Knowledge,
        generator: torch.Generator,
        *,
        n: int = N_PUBLIC,
    ):
        self.data: Encoded = encoded(knowledge.base, knowledge.public, cache=knowledge.cache)
        self.knowledge, self.generator = knowledge, generator
        rounds = -(-n // len(self.data))
        orders = [torch.randperm(len(self.data), generator=generator) for _ in range(rounds)]
        self.chosen = torch.cat(orders)[:n]
        self.sizes = senders(observations).unique(return_counts=True)[1].tolist()
        self.lacks = [name for name in LEARNABLE if getattr(seen, name) is None]
        self.message, self.known = self.send(self.chosen)
        self.latents = self.data.latents[self.chosen]
        self.text = self.message.encoder_hidden_states
        self.view, self.std = latent_view(self.message, self.known)

    def send(self, chosen: Tensor) -> tuple[Observation, Knowledge]:
        """Send the public samples `chosen` once; the message lacks what the real ones lack."""
        message, known = imitate_known(self.data, self.knowledge, self.sizes, chosen, self.generator)
        return message.without(*self.lacks), known

    @property
    def raw_hints(self) -> Tensor | None:
        """The hint latents that the closed form finds in the simulated messages, within the public range."""
        return self.clamp(hint_latents(self.message, [self.message], self.known))

    def clamp(self, raw: Tensor | None) -> Tensor | None:
        """Cut hint latents to the range that public ones have at each position; those noised on purpose stay."""
        if raw is None or self.known.defences.hint_noise:
            return raw
        public = self.public_hints
        return torch.minimum(torch.maximum(raw, public.amin(0)), public.amax(0))

    @cached_property
    def public_hints(self) -> Tensor:
        """All public hint latents as the closed form would find them but for noise."""
        return public_hints(self.data.hint_latents, self.known)

    def hint_std(self) -> float:
        """Root mean square error of the closed form's hint latents, within the public range."""
        raw = self.raw_hints
        if raw is None:
            return 0.0
        return float((raw - self.public_hints[self.chosen]).square().mean().sqrt())

    def hints(self, raw: Tensor | None, counts: Tensor | None = None, *, own: Tensor | None = None) -> Tensor | None:
        """Smooth the closed form's hints where they are noisy or coarse.

        Args:
            raw: `[n, c, h, w]` hint latents, or None.
            counts: `[n]` of how many messages each is the mean.
            own: `[n]` the public hints that they stem from, where the attacker plays the client: not to be known.
        """
        defences = self.known.defences
        if raw is None or not (defences.independent_draws or defences.hint_noise or defences.coarse_hints):
            return raw
        counts = torch.ones(len(raw)) if counts is None else counts
        if not defences.independent_draws:
            return self._guess(raw, counts, own, self._best_guess)
        std = self.hint_std() / counts.sqrt()
        cut = self.clamp(raw)
        return wiener(torch.as_tensor(cut), std[:, None, None, None], self.data.hint_latents)

    def _guess(self, raw: Tensor, counts: Tensor, own: Tensor | None, rule: str) -> Tensor:
        if rule == "raw":
            return raw
        std = max(self.known.defences.hint_noise, HINT_FLOOR) / counts.sqrt()
        if rule == "wiener":
            return wiener(raw, std[:, None, None, None], self.data.hint_latents)
        weights = public_posterior([(raw, std, self.public_hints)], own=own)
        return (weights @ self.data.hint_latents.flatten(1)).view_as(raw)

    @cached_property
    def _best_guess(self) -> str:
        """What to make of noised hints: whichever errs least on the simulated ones."""
        raw = torch.as_tensor(self.raw_hints)
        truth = self.data.hint_latents[self.chosen]
        rules = ("raw", "posterior") if self.known.defences.coarse_hints else ("raw", "wiener", "posterior")
        found = {rule: self._guess(raw, torch.ones(len(raw)), self.chosen, rule) for rule in rules}
        return min(found, key=lambda rule: float((found[rule] - truth).square().mean()))


def public_posterior(
    clues: Sequence[tuple[Float[Tensor, "n ..."], Float[Tensor, " n"], Float[Tensor, "m ..."]]],
    *,
    own: Tensor | None = None,
    sharpness: float = 1.0,
) -> Float[Tensor, "n m"]:
    """Return how likely each public sample is to be the one behind each message, if it were one of them (Bayes).

    Args:
        clues: (views, standard deviations of their white noise, what public samples would show without it).
        own: `[n]` samples that are ruled out, each for one message; None: none.
        sharpness: exponent of the likelihood; large: the likeliest sample takes all.
    """
    total = sum(
        torch.cdist(views.flatten(1), public.flatten(1)).square() / (-2 * std.square()[:, None])
        for views, std, public in clues
    )
    logits = sharpness * torch.as_tensor(total)
    if own is not None:
        logits = logits.scatter(1, own[:, None], -math.inf)
    return logits.softmax(1)


class Calibration:
    """Shrinks estimates to the mean public latents by the factor that pays at their noise level.

    The factor is the slope of the regression of truth on estimate, in bins of equal size over the levels, 0 to 1.

    Args:
        std: noise levels of the public samples' views.
        estimates, truth: `[m, c, h, w]`: what was made of the views, and the latents.
        bins: over the levels.
    """

    def __init__(
        self,
        std: Float[Tensor, "m 1 1 1"],
        estimates: Tensor,
        truth: Tensor,
        *,
        bins: int = 8,
    ):
        self.mean = truth.mean(0, keepdim=True)
        order = std.flatten().argsort()
        self.levels, self.slopes, self.errors = [], [], []
        for part in order.tensor_split(bins):
            centred, wanted = (estimates[part] - self.mean).double(), (truth[part] - self.mean).double()
            slope = float((centred * wanted).sum() / centred.square().sum().clamp_min(1e-12))
            slope = min(max(slope, 0.0), 1.0)
            self.levels.append(float(std.flatten()[part].clamp_min(1e-6).log().mean()))
            self.slopes.append(slope)
            self.errors.append(float((slope * centred - wanted).square().mean().sqrt()))

    def __call__(self, std: Float[Tensor, "n 1 1 1"], estimates: Tensor) -> Tensor:
        """Shrink."""
        return self.mean + self._at(std, self.slopes) * (estimates - self.mean)

    def error(self, std: Float[Tensor, "n 1 1 1"]) -> Float[Tensor, "n 1 1 1"]:
        """Return the root mean square error that shrunk estimates had at these levels."""
        return self._at(std, self.errors)

    def _at(self, std: Tensor, values: Sequence[float]) -> Tensor:
        """Interpolate linearly over log std."""
        levels, table = torch.tensor(self.levels), torch.tensor(values)
        place = std.flatten().clamp_min(1e-6).log()
        right = torch.searchsorted(levels, place).clamp(1, len(levels) - 1)
        low, high = levels[right - 1], levels[right]
        share = ((place - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        return torch.lerp(table[right - 1], table[right], share)[:, None, None, None]


def wiener(
    views: Float[Tensor, "n c h w"], std: Float[Tensor, "n 1 1 1"], public: Float[Tensor, "m c h w"], *, rank: int = 512
) -> Float[Tensor, "n c h w"]:
    """Return the linear least-squares estimate of latents from views with white noise of `std` (Wiener filter).

    In the public data's principal components, of variance λ, each coordinate shrinks by λ / (λ + std²).
    """
    mean, directions, variances = principal(public, rank=rank)
    coordinates = (views.flatten(1) - mean) @ directions
    shrunk = coordinates * variances / (variances + std.flatten()[:, None].square().clamp_min(1e-12))
    return (mean + shrunk @ directions.T).view_as(views)


def principal(public: Float[Tensor, "m c h w"], *, rank: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean `[d]`, principal directions `[d, r]` and variances `[r]` of the first 4 `rank` public latents."""
    flat = public[: 4 * rank].flatten(1)
    mean = flat.mean(0)
    _, scales, rows = torch.linalg.svd(flat - mean, full_matrices=False)
    return mean, rows[:rank].T, scales[:rank].square() / max(len(flat) - 1, 1)


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
