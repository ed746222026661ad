"""Fine-tune the public base on private data under differential privacy: DP-LDM (Liu, Lyu et al. 2024), resumable."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from splitlab.core import checkpoint, storage
from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.core.seeds import PUBLISHED, Key, source
from splitlab.data.image_set import ImageSet, digest
from splitlab.data.overlap import name_repeats
from splitlab.diffusion.base import Base, encoded_images
from splitlab.diffusion.denoisers import Denoiser
from splitlab.diffusion.trainable import count_trainable, merge_lora
from splitlab.dp.conditioning import denoiser, make_conditioning, save_embedder
from splitlab.dp.sample import Tuned
from splitlab.dp.settings import DPConfig, mechanism
from splitlab.dp.state import State, resume, settings_of, start_state
from splitlab.privacy.accounting import PrivacyEvent, epsilon_entry
from splitlab.privacy.accounting import epsilon as epsilon_of
from splitlab.privacy.draws import end_run, integers, normal, run_key
from splitlab.privacy.mechanisms import (
    Inputs,
    Mechanism,
    clipped_sum,
    plain_gradient,
    poisson_sample,
    release,
    step,
    trainable_parameters,
)

WARM_UP = 10
"""Steps until the learning rate is reached."""


def finetune(
    name: str,
    config: DPConfig,
    base: Base,
    private: ImageSet,
    *,
    out: str | Path,
    cache: str | Path,
    start: Tuned | None = None,
    history: Sequence[PrivacyEvent] = (),
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Fine-tune the base on private data and write `out`: `unet/`, `embedder/` or `text_encoder/`, and `record.json`.

    An interrupted call goes on from its last checkpoint when repeated, and ends with the same bits. Its guarantee
    covers every step ever taken; one that is taken again draws the same batch and noise, so it releases nothing new.
    The record has no losses: those of private samples are not covered by the guarantee.

    Batches, timesteps and noise follow from a secret that is drawn at the start, kept beside the checkpoint while the
    run lasts, and then erased: a further call is a further release, with `history` to say so. With
    `config.published_key` the run repeats instead, and its ε is stated as a simulation's.

    Args:
        name: the run's name; its checkpoint has it too.
        config: the run.
        base: the public models; they stay as they are.
        private: the data.
        out: folder to write; it is made. One that exists is replaced only if it holds a fine-tuning's outputs and
            nothing else.
        cache: folder for encoded data and the checkpoint.
        start: a fine-tuned model of the base to go on from, of the same conditioning; None: the base itself.
        history: what was spent on these data before, where `base` or `start` was trained on them, with secret draws.
        callback: `(what, done, total, loss)`.

    Returns the record, as written.

    Raises:
        InputError: before the first step: `out` holds other files, or a run of that folder or name is in progress;
            contradictory or unreachable settings, data that do not fit, or a checkpoint of other settings.
    """
    cache = Path(cache)
    path = cache / f"dp-{name}.safetensors"
    written = storage.whole_folder(out, "finetune", apart={"cache": cache})
    with storage.alone(path, path.with_name(f".{path.name}.lock"), f"a fine-tuning named {name!r}"):
        with written as folder:
            record = _finetune(name, config, base, private, folder, path, start, history, callback)
        end_run(path)
    return record


def _finetune(
    name: str,
    config: DPConfig,
    base: Base,
    private: ImageSet,
    folder: Path,
    path: Path,
    start: Tuned | None,
    history: Sequence[PrivacyEvent],
    callback: Callback | None,
) -> dict[str, Any]:
    """Fine-tune, with checkpoints at `path`, and write all outputs to the empty `folder`; return the record."""
    name_repeats(private, dataset=config.dataset)
    how = mechanism(config, len(private))
    prompts = private.prompts if config.conditioning == "none" else private.need_prompts()
    latents = encoded_images(base, private, cache=path.parent)
    # DP-LDM: the autoencoder stays public, and of the U-Net only a part is trained, here in the latent space.
    conditioning = make_conditioning(
        base, config.conditioning, prompts, classes=config.classes, train_embedder=config.embedder
    )
    model = denoiser(base, conditioning)
    if start:
        _put(model, start, config, base)
    state = start_state(config, model)
    settings = settings_of(config, how, base, private, history) | {"start": digest(start.record) if start else None}
    if path.exists():
        resume(state, path, settings, config.steps)
    state.key = run_key(path, config.published_key, bound_to=digest(settings))
    _run(state, config, how, (latents, conditioning.conditions), path, settings, base.n_timesteps, callback)

    events = (*history, *how.events(state.steps))
    spent = epsilon_of(events, config.delta, accountant=config.accountant) if how.noise_multiplier else math.inf
    randomness = _randomness(state.key, start)
    record = {
        "run": name,
        "config": asdict(config),
        "base": base.digest,
        "n": how.n,
        "steps": state.steps,
        "sample_rate": how.sample_rate,
        "noise_multiplier": how.noise_multiplier,
        "events": [asdict(event) for event in events],
        "randomness": randomness,
        **epsilon_entry(spent, randomness),
        "delta": config.delta,
        "n_trainable": count_trainable(state.model),
        "trainable_share": round(count_trainable(state.model) / sum(p.numel() for p in base.unet.parameters()), 6),
    }
    _write(state, folder, record)
    return record


def _randomness(key: Key, start: Tuned | None) -> str:
    """Say what the guarantee rests on: published randomness, if that of a private start was."""
    simulated = start and start.record.get("events") and start.record.get("randomness") == PUBLISHED
    return PUBLISHED if simulated else key.kind


def _put(model: Denoiser, start: Tuned, config: DPConfig, base: Base) -> None:
    """Give `model` the weights of `start`.

    Raises:
        InputError: it was made from another base, conditions otherwise, or has an embedder where this run has none.
    """
    if start.record.get("base", base.digest) != base.digest:
        raise InputError("the model to start from was made from another base, whose latents differ; give both alike")
    same = (start.conditioning, start.classes) == (config.conditioning, config.classes)
    if not same or (start.embedder is None) != (model.embedder is None):
        raise InputError(
            f"the model to start from is conditioned on {start.conditioning!r}, {len(start.classes)} classes, "
            f"embedder: {start.embedder is not None}; this run on {config.conditioning!r}, {len(config.classes)} "
            f"classes, embedder: {config.embedder}; fine-tune both alike"
        )
    model.unet.load_state_dict(start.unet.state_dict())
    if model.embedder is not None and start.embedder is not None:
        model.embedder.load_state_dict(start.embedder.state_dict())


def _run(
    state: State,
    config: DPConfig,
    how: Mechanism,
    data: tuple[Tensor, Tensor],
    path: Path,
    settings: dict[str, Any],
    n_timesteps: int,
    callback: Callback | None,
) -> None:
    """Take the steps that `state` has not taken yet."""
    label = f"DP-LDM, σ {how.noise_multiplier:.3g}" if how.noise_multiplier else "fine-tuning, not private"
    bar = tqdm(range(state.steps, config.steps), desc=label, initial=state.steps, total=config.steps, mininterval=2)
    for number in bar:
        inputs = draw_inputs(data, config, how, state.key, number, n_timesteps)
        losses = _step(state, inputs, config, how, number)
        if len(losses) and not torch.isfinite(losses).any():
            raise InputError(f"no sample's loss is finite at step {number}; lower lr (now {config.lr:g})")
        loss = losses.nanmean().item()
        if not how.noise_multiplier:  # the guarantee does not cover losses, and what is shown may be kept in a log
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if state.steps % config.checkpoint_every == 0 or state.steps == config.steps:  # writing may still fail
            checkpoint.save(path, state.tensors(), {"steps": state.steps, "settings": settings}, private=True)
        if callback:
            callback("finetune", state.steps, config.steps, loss)


def draw_inputs(
    data: tuple[Tensor, Tensor], config: DPConfig, how: Mechanism, key: Key, number: int, n_timesteps: int
) -> Inputs:
    """Draw step `number`'s Poisson batch, K rows per image: latents, conditions, timesteps and noise.

    Args:
        data: latents `[n, c, h, w]` and conditions `[n, ...]` of the private samples.
        config: the run.
        how: its sampling rate.
        key: the run's.
        number: which step; the draws are a function of it and of the key.
        n_timesteps: T.
    """
    # Sample: every image is in the batch with the same probability, independently (Abadi et al. 2016, alg. 1).
    chosen = poisson_sample(how.n, how.sample_rate, generator=source(key, "dp batch", number))
    rows = chosen.repeat_interleave(config.multiplicity)
    # K draws of timestep and noise per image (DPDM, Dockhorn et al. 2023), averaged before clipping.
    draw = source(key, "dp draws", number)
    timesteps = integers(0, n_timesteps, (len(rows),), draw)
    noise = normal((len(rows), *data[0].shape[1:]), draw)
    return data[0][rows], data[1][rows], timesteps, noise


def _step(state: State, inputs: Inputs, config: DPConfig, how: Mechanism, number: int) -> Tensor:
    """Take one step of DP-SGD (Abadi et al. 2016, alg. 1), or a plain one; return the losses, which stay here."""
    sizes = {"multiplicity": config.multiplicity, "physical_batch": config.physical_batch}
    bound, batch = config.max_grad_norm, how.expected_batch
    if how.noise_multiplier:
        # Clip: each image's gradient, a mean over its K draws, to norm C; and add them up.
        clipped = clipped_sum(state.model, inputs, max_grad_norm=bound, **sizes)
        # Noise and scale: N(0, (σC)²) on the sum, divided by the expected size of a batch.
        draw = source(state.key, "dp noise", number)
        gradient = release(clipped.total, bound, how.noise_multiplier, expected_batch=batch, generator=draw)
        losses = clipped.losses
    else:
        gradient, losses = plain_gradient(state.model, inputs, expected_batch=batch, **sizes)
    # Descend: Adam, with a warm-up, and an average of the weights.
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * min(1.0, (number + 1) / WARM_UP)
    step(state.optimizer, state.model, gradient)
    state.steps += 1
    decay = min(config.ema_decay, (1 + number) / (10 + number))
    with torch.no_grad():
        for name, parameter in trainable_parameters(state.model).items():
            state.average[name].lerp_(parameter, 1 - decay)
    return losses


def _write(state: State, folder: Path, record: dict[str, Any]) -> None:
    """Write the averaged weights in the layout of diffusers, and the record."""
    with torch.no_grad():
        for name, parameter in trainable_parameters(state.model).items():
            parameter.copy_(state.average[name])
    state.model.eval().requires_grad_(False)
    merge_lora(state.model.unet)
    with storage.writing(folder):
        state.model.unet.save_pretrained(folder / "unet")
        save_embedder(state.model.embedder, folder)
    checkpoint.save_json(folder / "record.json", record)
