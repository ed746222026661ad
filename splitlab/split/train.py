"""The training loop: one for all schemes. Resumable, recorded, and observed byte for byte."""

import math
import os
import platform
import resource
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core import checkpoint, storage
from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.core.pixels import to_uint8
from splitlab.core.progress import Callback
from splitlab.core.schedule import cosine
from splitlab.core.seeds import PUBLISHED, Key, generator
from splitlab.data.colours import are_shapes
from splitlab.data.image_set import ImageSet, digest, partition
from splitlab.data.overlap import refuse_overlap
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, encoded
from splitlab.diffusion.controlnet import LatentHintControlNet, control_pipeline, generate, predict_noise
from splitlab.privacy.accounting import epsilon_entry
from splitlab.privacy.draws import end_run, new_key, run_key
from splitlab.split.client import Client, client_send
from splitlab.split.config import TrainConfig
from splitlab.split.defences import disguised, disguises, recorded
from splitlab.split.messages import Truth
from splitlab.split.privacy import DELTA, guarantee
from splitlab.split.schemes import Scheme, Step, make_scheme
from splitlab.split.wire import Header, write_transcript, write_truth

PACKAGES = ("splitlab", "torch", "diffusers", "transformers", "safetensors", "numpy")


@dataclass
class Progress:
    """What a run has gathered so far; saved with every checkpoint."""

    losses: list[float]
    messages: list[bytes]
    truths: list[Truth]
    up_bytes: int = 0
    down_bytes: int = 0
    client_s: float = 0.0
    server_s: float = 0.0

    def add(self, step: Step, config: TrainConfig) -> None:
        """Take in one step; keep its message if the run's transcript is to hold it."""
        self.losses.append(step.loss)
        self.up_bytes += step.up_bytes
        self.down_bytes += step.down_bytes
        self.client_s += step.client_s
        self.server_s += step.server_s
        due = len(self.losses) > config.record_from and len(self.messages) < config.record_messages
        if due and step.message is not None and step.truth is not None:
            self.messages.append(step.message)
            self.truths.append(step.truth)


def make_clients(
    base: Base, private: ImageSet, config: TrainConfig, *, key: Key | None = None, cache: Path | None = None
) -> list[Client]:
    """Encode the private data once, disguised where that is a defence, and share them out among the run's clients.

    All draws follow from `key`; None: as `config` says, a secret one being new. What a secret key disguised is not kept
    in the folder `cache`.
    """
    key = key or new_key(config.published_key)
    private = disguised(private, config.defences, key=key)
    lasting = key.kind == PUBLISHED or not disguises(config.defences)
    data = encoded(base, private, cache=cache if lasting else None)
    n = min(config.samples or len(private), len(private))
    return [
        Client(
            number=number,
            base=base,
            data=data[share.start : share.stop],
            indices=torch.arange(share.start, share.stop),
            defences=config.defences,
            key=key if key.kind == PUBLISHED else key.derived("client's own", number),
            prompts=private.prompts[share.start : share.stop] if config.defences.borrowed_colours else (),
        )
        for number, share in enumerate(partition(n, config.n_clients))
    ]


def train(
    run: str,
    config: TrainConfig,
    base: Base,
    private: ImageSet,
    heldout: ImageSet,
    *,
    out: str | Path,
    cache: str | Path,
    public: ImageSet | None = None,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Train one run and write `out`.

    There will be `controlnet/`; `transcript.safetensors`, what the server saw (empty where it saw no activations);
    `truth.safetensors`, what it did not see; `samples.safetensors`, images generated for held-out hints; `record.json`,
    all numbers that repeat exactly, which is returned; `timing.json`, those that do not; `server.safetensors`, what a
    malicious server (`config.server` "hijack") trained meanwhile, empty for an honest one.

    Args:
        run, config, base: the run's name, the run, public models.
        private: the clients' data.
        heldout: data that no scheme and no base model was trained on, for the evaluation.
        out: folder to write; it is made. One that exists is replaced only if it holds a run's outputs and nothing else.
        cache: folder for encoded data and checkpoints. A call that was interrupted goes on from its last checkpoint
            when repeated, and ends with bit-identical weights.
        public: what a malicious server learns from; an honest one makes no use of it, but it must be apart.
        callback: `(what, done, total, loss)`.

    Raises:
        InputError: before the first step: `out` holds other files, or another run is writing it; the splits share
            images, or have no hints or prompts; the data do not fit the base model or the batch size, the loss is not
            finite, the disk is full, or a malicious server has no public data.
    """
    depends = {"config": config, "base": base.digest, "data": private.digest}
    depends |= {"torch": torch.__version__, "numpy": np.__version__}
    if config.server == "hijack" and public is not None:
        depends["public"] = public.digest
    cache = Path(cache)
    state = cache / f"train-{digest({'run': run} | depends)[:16]}.safetensors"
    written = storage.whole_folder(out, "train", apart={"cache": cache})
    with storage.alone(state, state.with_name(f".{state.name}.lock"), "a run of that name, data and settings"):
        with written as folder:
            key = run_key(state, config.published_key, bound_to=digest(depends))
            record = _train(run, config, base, key, (private, heldout, public), folder, state, callback)
        end_run(state)
    return record


def _train(
    run: str,
    config: TrainConfig,
    base: Base,
    key: Key,
    data: tuple[ImageSet, ImageSet, ImageSet | None],
    folder: Path,
    state: Path,
    callback: Callback | None,
) -> dict[str, Any]:
    """Train, with checkpoints at `state`, and write all outputs to the empty `folder`; return the record."""
    (private, heldout, public), cache = data, state.parent
    public_too = {"public": public} if public else {}
    splits = {"private": private} | public_too
    if heldout is private:  # one set passed twice is meant; splits that were loaded by name are two
        warnings.warn("the held-out images are the private ones: all scores are scores on training data", stacklevel=3)
    else:
        splits["heldout"] = heldout
    refuse_overlap(splits, dataset=config.dataset)
    asked = heldout.subset(range(min(config.eval_samples, len(heldout))))
    prompts, hints = asked.need_prompts(), asked.need_hints()
    clients = make_clients(base, private, config, key=key, cache=cache)
    scheme = make_scheme(base, config, clients, private.need_hints(), public=public)
    progress = _run(scheme, config, state, callback)
    controlnet = scheme.controlnet().eval()
    draw = generator(config.seed, "generate")
    pictures = generate(control_pipeline(base, controlnet), prompts, hints, generator=draw)
    record = _record(run, config, base, progress) | {
        "n_trainable": sum(p.numel() for p in controlnet.parameters()),
        "eval_loss": round(eval_loss(base, controlnet, heldout, cache=cache), 6),
        **control_scores(pictures, asked),
        "privacy": _privacy(config, base, sum(len(client.data) for client in clients), key.kind),
    }

    with storage.writing(folder / "controlnet"):
        controlnet.save_pretrained(folder / "controlnet")
    samples = {"images": to_uint8(pictures), "hints": to_uint8(hints)}
    checkpoint.save(folder / "samples.safetensors", samples, {"prompts": prompts})
    write_transcript(folder / "transcript.safetensors", _header(run, config, base, private), progress.messages)
    write_truth(folder / "truth.safetensors", progress.truths)
    hijacker = scheme.modules.get("hijacker")
    checkpoint.save(folder / "server.safetensors", dict(hijacker.state_dict()) if hijacker else {}, {})
    checkpoint.save_json(folder / "record.json", record)
    checkpoint.save_json(folder / "timing.json", _timing(config, progress))
    return record


def record(
    run: str,
    config: TrainConfig,
    base: Base,
    private: ImageSet,
    *,
    transcript: Path,
    truth: Path,
    cache: Path | None = None,
) -> None:
    """Write the first `record_messages` messages of a run of S1's split, and their truth, without training.

    S1's client does not depend on the server's model, so they are those that `train` would record: of a published key,
    bit for bit. Secret draws are another set every time. `transcript` and `truth` are the files to write.

    Raises:
        InputError: the scheme's messages do depend on training.
    """
    if config.scheme != "split":
        raise InputError(f"run {run}: messages of scheme {config.scheme!r} depend on the training; use `train`")
    clients = make_clients(base, private, config, cache=cache)
    numbers = range(config.record_from, config.record_from + config.record_messages)
    sent = [client_send(clients[n % len(clients)], n // len(clients), config.batch_size) for n in numbers]
    write_transcript(transcript, _header(run, config, base, private), [message for message, _ in sent])
    write_truth(truth, [kept for _, kept in sent])


def _header(run: str, config: TrainConfig, base: Base, private: ImageSet) -> Header:
    return Header(run, config.dataset, config.scheme, config.defences, private.size, base.digest, config.n_clients)


def _run(scheme: Scheme, config: TrainConfig, state: Path, callback: Callback | None) -> Progress:
    """Run the steps that `state` does not hold yet."""
    start, progress = _restore(scheme, state) if state.exists() else (0, Progress([], [], []))
    bar = tqdm(range(start, config.steps), desc=config.scheme, initial=start, total=config.steps, mininterval=2)
    number = start
    try:
        for number in bar:
            step = scheme.step(number, learning_rate(number, config))
            if not math.isfinite(step.loss):
                raise InputError(
                    f"the loss is {step.loss} at step {number}; lower lr (now {config.lr:g}) or check the data. "
                    f"The checkpoint before it and all earlier outputs are intact"
                )
            progress.add(step, config)
            if callback:
                callback("train", number + 1, config.steps, step.loss)
            if (number + 1) % 25 == 0:
                bar.set_postfix(loss=f"{sum(progress.losses[-25:]) / 25:.4f}", refresh=False)
            if (number + 1) % config.checkpoint_every == 0 or number + 1 == config.steps:  # writing may still fail
                _checkpoint(scheme, state, number + 1, progress)
    except KeyboardInterrupt:
        kept = number - number % config.checkpoint_every if number else 0
        print(f"interrupted at step {number}; run it again to go on from step {max(start, kept)}")
        raise
    return progress


def learning_rate(step: int, config: TrainConfig) -> float:
    """Warm up over 5 % of the steps, then decay along a cosine to zero."""
    return cosine(config.lr, step, config.steps, warm_up=max(1, config.steps // 20))


def _checkpoint(scheme: Scheme, state: Path, step: int, progress: Progress) -> None:
    tensors = checkpoint.training_state(scheme.modules, scheme.optimizers)
    tensors["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
    for i, (message, truth) in enumerate(zip(progress.messages, progress.truths, strict=True)):
        tensors[f"message/{i}"] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        tensors |= {f"truth/{i}/{name}": value for name, value in truth.tensors.items()}
    totals = {name: getattr(progress, name) for name in ("up_bytes", "down_bytes", "client_s", "server_s")}
    meta = {"step": step, "n_messages": len(progress.messages), "totals": totals}
    checkpoint.save(state, tensors, meta | {"prompts": [truth.prompts for truth in progress.truths]}, private=True)


def _restore(scheme: Scheme, state: Path) -> tuple[int, Progress]:
    tensors, meta = checkpoint.load(state, remedy=checkpoint.CACHED)
    checkpoint.restore_training_state(tensors, scheme.modules, scheme.optimizers)
    count: int = meta["n_messages"]  # type: ignore[assignment]
    messages = [tensors[f"message/{i}"].numpy().tobytes() for i in range(count)]
    prompts: list[list[str]] = meta["prompts"]  # type: ignore[assignment]
    named = [{n: tensors[f"truth/{i}/{n}"] for n in ("indices", "timesteps", "noise")} for i in range(count)]
    truths = [Truth(**one, prompts=tuple(texts)) for one, texts in zip(named, prompts, strict=True)]
    totals: dict[str, Any] = meta["totals"]  # type: ignore[assignment]
    return int(meta["step"]), Progress(tensors["losses"].tolist(), messages, truths, **totals)  # type: ignore[call-overload]


def _record(run: str, config: TrainConfig, base: Base, progress: Progress) -> dict[str, Any]:
    """Gather what a run did that repeats exactly."""
    samples = config.steps * config.batch_size
    return {
        "run": run,
        "config": recorded(config),
        "base": base.digest,
        "loss": [round(x, 6) for x in progress.losses],
        "up_bytes_per_sample": round(progress.up_bytes / samples, 2),
        "down_bytes_per_sample": round(progress.down_bytes / samples, 2),
    }


def _privacy(config: TrainConfig, base: Base, n: int, randomness: str) -> dict[str, Any]:
    """Account for the run: the events of what was sent of one image, their ε, or why there is none."""
    found = guarantee(config, base.alphas_cumprod, n=n)
    stated = epsilon_entry(round(found.epsilon, 4) if found.events else None, randomness)
    events = [asdict(event) for event in found.events]
    return {"events": events, "randomness": randomness, **stated, "delta": DELTA, "why": found.why}


def control_scores(pictures: Tensor, asked: ImageSet) -> dict[str, float | None]:
    """Score generated `pictures` `[n, 3, s, s]` against the hints they were asked to follow.

    `control_iou` (discs, `metrics.disc_iou`) is None where the prompts are not shapes prompts; `control_edges`
    (`metrics.edge_control`) is 0 where the hints do not matter.
    """
    shapes = are_shapes(asked.prompts)
    return {
        "control_iou": round(metrics.disc_iou(pictures, asked.need_hints()).mean().item(), 4) if shapes else None,
        "control_edges": round(metrics.edge_control(pictures, asked.need_hints()).mean().item(), 4),
    }


@torch.no_grad()
def eval_loss(base: Base, controlnet: ControlNetModel, heldout: ImageSet, *, cache: Path | None = None) -> float:
    """Return the mean denoising loss on held-out data: fixed timesteps and noise, prompts given, alike for all runs."""
    data = encoded(base, heldout, cache=cache)
    draw = generator("eval loss")
    timesteps = torch.linspace(0, base.n_timesteps - 1, len(data)).long()[torch.randperm(len(data), generator=draw)]
    noise = torch.randn(data.latents.shape, generator=draw)
    noisy = base.noised(data.latents, noise, timesteps)
    hints = data.hint_latents if isinstance(controlnet, LatentHintControlNet) else (heldout.need_hints() + 1.0) / 2.0
    total = 0.0
    for part in torch.arange(len(data)).split(64):
        control = controlnet(noisy[part], timesteps[part], data.text[part], controlnet_cond=hints[part])
        noise_pred = predict_noise(base.unet, noisy[part], timesteps[part], data.text[part], control)
        total += F.mse_loss(noise_pred, noise[part]).item() * len(part)
    return total / len(data)


def _timing(config: TrainConfig, progress: Progress) -> dict[str, Any]:
    """Gather what differs from machine to machine and run to run."""
    samples = config.steps * config.batch_size
    return {
        "client_s_per_sample": progress.client_s / samples,
        "server_s_per_sample": progress.server_s / samples,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "seed": config.seed,
    }


def _processor() -> str:
    """Name the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _commit() -> str | None:
    """Return the checkout's commit, with "+" where files differ from it; None outside a checkout."""
    git: Callable[..., subprocess.CompletedProcess[str]] = lambda *words: subprocess.run(  # noqa: E731
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    try:
        head = git("rev-parse", "--short", "HEAD")
        dirty = git("status", "--porcelain", "--", "splitlab", "notebooks", "params.yaml", "params").stdout.strip()
    except OSError:
        return None
    return head.stdout.strip() + ("+" if dirty else "") if head.returncode == 0 else None
