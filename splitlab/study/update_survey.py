"""Federated updates recorded and attacked alike: models, noise levels, batches, defences, and who knows what.

`record_updates` is the clients: one file per update in `sent`, the facts that a threat model may grant the server in
`granted`, the rest in `truth`. `attack_updates` reads the first two and public files.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.parallel import parallel
from splitlab.core.paths import resolve
from splitlab.core.seeds import Key, generator, source
from splitlab.data.image_set import ImageSet, digest
from splitlab.data.overlap import refuse_overlaps
from splitlab.diffusion.base import Base
from splitlab.diffusion.base_files import load_model
from splitlab.diffusion.controlnet import LatentHintControlNet
from splitlab.diffusion.denoisers import ControlledUNet, plain_attention
from splitlab.federated.attacks import INVERSIONS, ON_IMAGES
from splitlab.federated.client import InversionKnowledge, pixel_unet, share
from splitlab.federated.defences import make_defence, share_protected
from splitlab.federated.saved import SavedInversion, guess, save_inversion, saved_inversion, timed
from splitlab.federated.update import Update, UpdateTruth, read_granted, read_update, write_update, write_update_truth
from splitlab.privacy.draws import new_key, normal, permutation
from splitlab.study.kept import code_digest, file_digest, hand_out
from splitlab.study.update_grid import Cell, InversionSpec, ModelSpec, UpdateConfig

LoadSplit = Callable[[str, str], ImageSet]
"""`(dataset, split) -> data`."""


def public_model(spec: ModelSpec, base: Base, seed: int) -> nn.Module:
    """Return the model that the server sends: the same for everybody who calls this.

    Raises:
        InputError: its directory is missing or holds another kind of model.
    """
    if spec.kind == "pixel":
        if not spec.source:
            return pixel_unet(spec.size, seed=seed, channels=spec.channels)
        return plain_attention(load_model(UNet2DModel, resolve(spec.source))).eval()
    unet = plain_attention(type(base.unet).from_config(base.unet.config))
    unet.load_state_dict(base.unet.state_dict())
    if spec.kind == "controlnet":
        controlnet: ControlNetModel = plain_attention(load_model(LatentHintControlNet, resolve(spec.source)))
        return ControlledUNet(unet, controlnet).eval()
    if spec.kind == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            unet.add_adapter(LoraConfig(r=spec.rank, lora_alpha=spec.rank, target_modules=targets))
    return unet.eval()


def record_updates(config: UpdateConfig, base: Base, load: LoadSplit, *, out: Path) -> list[str]:
    """Be the clients: write every update of the grid below `out`/sent, what else there is to `granted` and `truth`.

    Returns the cells' names.

    Raises:
        InputError: the splits of a data set share images, or have too few.
    """
    refuse_overlaps((cell.dataset for cell, _, _ in config.cells), load)
    key = new_key(config.published_key)
    for name in ("sent", "granted", "truth"):  # of an empty grid too
        (out / name).mkdir(parents=True, exist_ok=True)
    for cell, n, seeds in (bar := tqdm(config.cells, desc="record", mininterval=2)):
        bar.set_postfix_str(cell.name, refresh=False)
        for seed in range(seeds):
            _record_cell(config, cell, base, load(cell.dataset, "private"), n, seed, key.of_repeat(seed), out)
    return [cell.name for cell, _, _ in config.cells]


def _record_cell(
    config: UpdateConfig, cell: Cell, base: Base, private: ImageSet, n: int, seed: int, key: Key, out: Path
) -> None:
    spec, defence = config.models[cell.model], make_defence(cell.defence)
    model = public_model(spec, base, seed)
    truth = _truth(cell, spec, base, private, n, seed, key)
    kind, _, steps = cell.update.partition("=")
    arguments: dict[str, Any] = {"trainable": cell.trainable, "objective": cell.objective, "kind": kind}
    arguments |= {"alphas_cumprod": base.alphas_cumprod, "dtype": getattr(torch, cell.dtype)}
    if kind == "fedavg":
        arguments |= {"local_steps": int(steps or 1), "lr": config.lr}
    parts = [truth[i : i + cell.batch] for i in range(0, len(truth), cell.batch)]
    for index in range(n):
        own, *others = parts[index * cell.clients : (index + 1) * cell.clients]
        draw = source("update defence", cell.name, key, index)
        if defence is None:
            update = share(model, own, **arguments)
        else:
            update = share_protected(model, own, defence, generator=draw, others=others, **arguments)
        write_update(out / "sent" / cell.name / f"{seed}-{index}.safetensors", update)
    facts = {name: getattr(truth, name) for name in ("timesteps", "noise", "text", "hint_latents")}
    granted = {name: value for name, value in facts.items() if value is not None}
    meta = {"batch_size": cell.together}
    checkpoint.save(out / "granted" / cell.name / f"{seed}.safetensors", granted, meta, private=True)
    write_update_truth(out / "truth" / cell.name / f"{seed}.safetensors", truth)


def _truth(
    cell: Cell, spec: ModelSpec, base: Base, private: ImageSet, n_updates: int, seed: int, key: Key
) -> UpdateTruth:
    """Draw images (the first, another stretch per seed), timesteps and noise of all updates of a cell."""
    n = n_updates * cell.together
    if n * (seed + 1) > len(private):
        raise InputError(f"{cell.name}: needs {n * (seed + 1)} private images, {cell.dataset} has {len(private)}")
    chosen = torch.arange(seed * n, (seed + 1) * n)
    pixels = private.images[chosen]
    draw = source("updates", cell.model, cell.dataset, cell.timestep, cell.batch, key)
    if cell.timestep < 0:
        drawn = [permutation(base.n_timesteps, draw)[: cell.together] for _ in range(n_updates)]
        timesteps = torch.cat(drawn)
    else:
        timesteps = torch.full((n,), cell.timestep)
    if spec.kind == "pixel":
        images = resized(pixels, spec.size)
        return UpdateTruth(images, timesteps, normal(images.shape, draw))
    clean, texts = base.encode(pixels), private.need_prompts()
    prompts = tuple(texts[i] for i in chosen.tolist())
    hints = base.encode(private.need_hints()[chosen]) if spec.kind == "controlnet" else None
    noise, text = normal(clean.shape, draw), base.encode_prompts(prompts)
    return UpdateTruth(clean, timesteps, noise, text, hints, images=pixels, prompts=prompts)


def resized(images: Tensor, size: int) -> Tensor:
    """Return images averaged down to `size` x `size`."""
    return images if images.shape[-1] == size else F.interpolate(images, size=(size, size), mode="area")


def attack_updates(
    config: UpdateConfig,
    base: Base,
    load: LoadSplit,
    *,
    recorded: Path,
    out: Path,
    cache: Path | None = None,
    workers: int = 1,
) -> None:
    """Run every attack of the grid on the updates below `recorded`/sent; of the data, only public splits are read.

    What is there already is kept, so an interrupted call goes on where it was; with a `cache` even if `out` is gone.
    """
    out.mkdir(parents=True, exist_ok=True)  # of an empty grid too
    calls = [
        (config, cell, seed, base, load(cell.dataset, "public"), recorded, out, cache)
        for cell, _, seeds in config.cells
        for seed in range(seeds)
    ]
    for _ in parallel(_attack_kept_cell, calls, desc="attack", workers=workers):
        pass


def _attack_kept_cell(
    config: UpdateConfig,
    cell: Cell,
    seed: int,
    base: Base,
    public: ImageSet,
    recorded: Path,
    out: Path,
    cache: Path | None,
) -> None:
    """Attack a cell below `cache`, where what follows from the same updates is found again, and hand it out."""
    if cache is None:
        _attack_cell(config, cell, seed, base, public, recorded, out)
        return
    evidence = sorted((recorded / "sent" / cell.name).glob(f"{seed}-*.safetensors"))
    evidence.append(recorded / "granted" / cell.name / f"{seed}.safetensors")
    follows_from = {"cell": cell, "model": config.models[cell.model], "base": base.digest, "public": public.digest}
    follows_from |= {"evidence": [file_digest(path) for path in evidence]}
    follows_from |= {"code": code_digest("federated", "study/update_survey.py")}
    kept = cache / "inversions" / f"{cell.name}-{seed}-{digest(follows_from)[:16]}"
    _attack_cell(config, cell, seed, base, public, recorded, kept)
    hand_out(kept, out)


def _attack_cell(
    config: UpdateConfig, cell: Cell, seed: int, base: Base, public: ImageSet, recorded: Path, out: Path
) -> None:
    spec = config.models[cell.model]
    model = public_model(spec, base, seed)
    sent = sorted((recorded / "sent" / cell.name).glob(f"{seed}-*.safetensors"))
    updates = [read_update(path, model=model) for path in sent]
    facts, batch = read_granted(recorded / "granted" / cell.name / f"{seed}.safetensors")
    folder, n = out / cell.name, len(updates) * cell.together
    size = spec.size if spec.kind == "pixel" else public.images.shape[-1]
    draw = generator("no information", cell.name, seed)
    blind = guess(public, n, size=size, batch=cell.together, n_timesteps=base.n_timesteps, generator=draw)
    save_inversion(folder / f"no_information-{seed}.safetensors", blind)
    for attack in cell.attacks:
        path = folder / f"{attack.name}-{seed}.safetensors"
        if not path.exists():
            known = _knowledge(model, spec, base, attack, facts, batch)
            save_inversion(path, _attack(attack, updates, known, cell, seed))


def _knowledge(
    model: nn.Module, spec: ModelSpec, base: Base, attack: InversionSpec, facts: Mapping[str, Tensor], batch: int
) -> InversionKnowledge:
    granted: dict[str, Any] = {name: facts[name] for name in attack.grant if name in facts}
    if "batch_size" in attack.grant:
        granted["batch_size"] = batch
    return InversionKnowledge(model, base.alphas_cumprod, None if spec.kind == "pixel" else base, **granted)


def _attack(
    spec: InversionSpec, updates: list[Update], known: InversionKnowledge, cell: Cell, seed: int
) -> SavedInversion:
    """Run one attack; one that cannot says why instead."""
    attack, draw = INVERSIONS[spec.attack].function, generator("inversion", cell.name, spec.name, seed)
    together = spec.attack in ON_IMAGES
    try:
        found, cpu_s = timed(
            lambda: (
                attack(updates, known, generator=draw, **spec.options)
                if together
                else [attack(update, known, generator=draw, **spec.options) for update in updates]
            )
        )
    except InputError as error:
        return SavedInversion(spec.attack, spec.grant, refused=str(error))
    return saved_inversion(found, attack=spec.attack, n_updates=len(updates), granted=spec.grant, cpu_s=cpu_s)
