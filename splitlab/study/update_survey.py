"""Federated updates recorded and attacked alike: models, noise levels, batches, defences, and who knows what.

`record_updates` is the clients: one file per update in `sent`, the facts that a threat model may grant the server in
`granted`, the rest in `truth`. `attack_updates` reads the first two and public files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
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
from splitlab.core.parallel import abreast
from splitlab.core.paths import resolve
from splitlab.core.seeds import Key, generator, source
from splitlab.data.image_set import ImageSet
from splitlab.data.overlap import refuse_overlaps
from splitlab.diffusion.base import Base
from splitlab.diffusion.base_files import load_model
from splitlab.diffusion.controlnet import LatentHintControlNet
from splitlab.federated.attacks import INVERSIONS, ON_IMAGES
from splitlab.federated.client import TRAINABLE, ControlledUNet, InversionKnowledge, pixel_unet, plain_attention, share
from splitlab.federated.defences import (
    Clip,
    GaussianNoise,
    PerExample,
    Quantise,
    SecureAggregation,
    Sign,
    Soteria,
    TopK,
    UpdateDefence,
    share_protected,
)
from splitlab.federated.saved import SavedInversion, guess, save_inversion, saved_inversion, timed
from splitlab.federated.update import Update, UpdateTruth, read_granted, read_update, write_update, write_update_truth
from splitlab.privacy.draws import new_key, normal, permutation
from splitlab.study.config import GRIDS

GRANTS = ("batch_size", "timesteps", "noise", "text", "hint_latents")
KINDS = ("pixel", "latent", "controlnet", "lora")

DEFENCES: dict[str, Callable[[float], UpdateDefence]] = {
    "noise": lambda level: GaussianNoise(level),
    "clip": lambda level: Clip(level),
    "top_k": lambda level: TopK(level),
    "bits": lambda level: Quantise(int(level)),
    "sign": lambda level: Sign(),
    "dp_sgd": lambda level: PerExample(1.0, level),
    "soteria": lambda level: Soteria(level),
    "aggregation": lambda level: SecureAggregation(int(level)),
}
"""Defences by the name that a parameter file gives them, `name=level`; see `splitlab.federated.defences`."""

LoadSplit = Callable[[str, str], ImageSet]
"""`(dataset, split) -> data`."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that clients train, as the server sends it to them: public.

    Attributes:
        kind: "pixel" (a UNet2DModel), "latent" (the base's U-Net), "controlnet" (in front of the base's U-Net), or
            "lora" (adapters on the attention of the base's U-Net).
        size: pixel models: height and width of their images.
        channels: pixel models without `source`: their levels' channels; the weights are random, another draw per seed.
        source: a trained pixel model's or ControlNet's directory.
        rank: of LoRA adapters.
    """

    kind: str
    size: int = 32
    channels: tuple[int, ...] = (32, 64)
    source: str = ""
    rank: int = 4

    def __post_init__(self) -> None:
        """Refuse kinds that do not exist."""
        if self.kind not in KINDS:
            raise InputError(f"model kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")

    @property
    def trained(self) -> bool:
        """Whether its weights were trained before (adapters: those they sit on)."""
        return self.kind != "pixel" or bool(self.source)


@dataclass(frozen=True)
class InversionSpec:
    """One attack on the updates of a case.

    Attributes:
        attack: its name in `splitlab.federated.attacks.INVERSIONS`.
        grant: facts that the threat model gives the server besides the update: of `GRANTS`.
        options: keyword arguments of the attack function.
    """

    attack: str
    grant: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse attacks and grants that do not exist."""
        if self.attack not in INVERSIONS:
            raise InputError(f"attack {self.attack!r} is unknown; choose one of {', '.join(INVERSIONS)}")
        if unknown := set(self.grant) - set(GRANTS):
            raise InputError(f"{', '.join(sorted(unknown))} cannot be granted; choose of {', '.join(GRANTS)}")

    @property
    def name(self) -> str:
        """A file-name-safe name: the attack, and what it is granted."""
        return "-with-".join([self.attack, *(["-".join(self.grant)] if self.grant else [])])


@dataclass(frozen=True)
class Case:
    """Cells that are alike but for timestep, batch, defence, objective and kind of update: all combinations.

    Attributes:
        model: a key of `UpdateConfig.models`.
        attacks: on every cell.
        dataset: whose private split the clients train on.
        timesteps: of all images of an update; -1: drawn for each, distinct.
        batches: images per update.
        defences: "none" or `name=level` (see `DEFENCES`).
        objectives: "epsilon", "v_prediction".
        updates: "gradient", or "fedavg=4": the weight difference after 4 local steps.
        trainable: which parameters are shared, of `splitlab.federated.client.TRAINABLE`.
        dtype: what the update is cast to: "float32", "float16", "bfloat16".
        images, seeds: of this case; 0: as everywhere.
        grids: the grids it belongs to.
    """

    model: str
    attacks: tuple[InversionSpec, ...]
    dataset: str = "photos"
    timesteps: tuple[int, ...] = (100,)
    batches: tuple[int, ...] = (1,)
    defences: tuple[str, ...] = ("none",)
    objectives: tuple[str, ...] = ("epsilon",)
    updates: tuple[str, ...] = ("gradient",)
    trainable: str = "all"
    dtype: str = "float32"
    images: int = 0
    seeds: int = 0
    grids: tuple[str, ...] = GRIDS

    def __post_init__(self) -> None:
        """Refuse words that mean nothing."""
        for defence in self.defences:
            make_defence(defence)
        if self.trainable not in TRAINABLE:
            raise InputError(f"trainable {self.trainable!r} is unknown; choose one of {', '.join(TRAINABLE)}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise InputError(f"dtype {self.dtype!r} is unknown; choose one of float32, float16, bfloat16")

    def cells(self) -> Iterator["Cell"]:
        """List the combinations."""
        for t, batch, defence, objective, update in product(
            self.timesteps, self.batches, self.defences, self.objectives, self.updates
        ):
            yield Cell(
                self.model, self.dataset, t, batch, defence, objective, update, self.trainable, self.dtype, self.attacks
            )


@dataclass(frozen=True)
class Cell:
    """One combination of a `Case`: updates that differ in image, noise and seed only."""

    model: str
    dataset: str
    timestep: int
    batch: int
    defence: str
    objective: str
    update: str
    trainable: str
    dtype: str
    attacks: tuple[InversionSpec, ...]

    @property
    def clients(self) -> int:
        """How many clients' updates are aggregated before the server sees one."""
        defence = make_defence(self.defence)
        return defence.n_clients if isinstance(defence, SecureAggregation) else 1

    @property
    def together(self) -> int:
        """How many images are behind what the server sees as one update."""
        return self.batch * self.clients

    @property
    def name(self) -> str:
        """A file-name-safe name, without what is as by default."""
        when = "drawn" if self.timestep < 0 else str(self.timestep)
        parts = [self.model, self.dataset, f"t{when}", f"b{self.batch}"]
        usual = {"defence": "none", "objective": "epsilon", "update": "gradient", "trainable": "all"}
        usual |= {"dtype": "float32"}
        parts += [str(getattr(self, key)) for key, value in usual.items() if getattr(self, key) != value]
        return "-".join(parts).replace("=", "")


@dataclass(frozen=True)
class UpdateConfig:
    """Which updates are recorded, and who attacks them with what knowledge.

    Attributes:
        grid: "default" or "full".
        models: name -> model.
        cases: the cells and their attacks.
        images: private images per cell and seed at the default grid; `full_images` at the full one.
        seeds: seeds per cell (of random weights, noise and attacker) at the default grid; `full_seeds` at the full one.
        lr: of the local steps of FedAvg.
        published_key: seed of a published key that the clients' timesteps, noise and defences follow from, so that
            others can repeat the recording; None: a secret, as the system's entropy.
    """

    grid: str = "default"
    models: dict[str, ModelSpec] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()
    images: int = 3
    seeds: int = 1
    full_images: int = 5
    full_seeds: int = 3
    lr: float = 0.01
    published_key: int | None = None

    def __post_init__(self) -> None:
        """Refuse grids and models that do not exist, and cells that would share a file."""
        if self.grid not in GRIDS:
            raise InputError(f"updates.grid {self.grid!r} is unknown; choose one of {', '.join(GRIDS)}")
        if unknown := sorted({case.model for case in self.cases} - set(self.models)):
            raise InputError(f"updates: no model is called {', '.join(unknown)}; there: {', '.join(self.models)}")
        seen: set[tuple[str, str]] = set()
        for cell, _, _ in self.cells:
            for spec in cell.attacks:
                if (cell.name, spec.name) in seen:
                    raise InputError(f"updates: {spec.name} on {cell.name} is asked for twice; ask once")
                seen.add((cell.name, spec.name))

    @property
    def chosen(self) -> tuple[Case, ...]:
        """The cases of the grid."""
        return tuple(case for case in self.cases if self.grid in case.grids)

    @property
    def cells(self) -> list[tuple["Cell", int, int]]:
        """The cells of the grid, those of one name merged, each with its numbers of updates and seeds."""
        merged: dict[str, tuple[Cell, int, int]] = {}
        full = self.grid == "full"
        for case in self.chosen:
            images = self.full_images if full else case.images or self.images
            seeds = self.full_seeds if full else case.seeds or self.seeds
            for cell in case.cells():
                before, n, s = merged.get(cell.name, (replace(cell, attacks=()), 0, 0))
                attacks = before.attacks + cell.attacks
                merged[cell.name] = replace(before, attacks=attacks), max(n, images), max(s, seeds)
        return list(merged.values())


def make_defence(words: str) -> UpdateDefence | None:
    """Return the defence that `name=level` means; None for "none".

    Raises:
        InputError: no such defence, or a level that is no number.
    """
    name, _, level = words.partition("=")
    if words == "none":
        return None
    if name not in DEFENCES:
        raise InputError(f"defence {words!r} is unknown; choose 'none' or <name>=<level>: {', '.join(DEFENCES)}")
    try:
        return DEFENCES[name](float(level or 0.0))
    except ValueError:
        raise InputError(f"defence {words!r}: {level!r} is no number; write {name}=<level>") from None


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
    config: UpdateConfig, base: Base, load: LoadSplit, *, recorded: Path, out: Path, workers: int = 1
) -> None:
    """Run every attack of the grid on the updates below `recorded`/sent; of the data, only public splits are read.

    What is there already is kept, so an interrupted call goes on where it was.
    """
    out.mkdir(parents=True, exist_ok=True)  # of an empty grid too
    calls = [
        (config, cell, seed, base, load(cell.dataset, "public"), recorded, out)
        for cell, _, seeds in config.cells
        for seed in range(seeds)
    ]
    for _ in abreast(_attack_cell, calls, desc="attack", workers=workers):
        pass


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
    blind = guess(public, n, size=size, batch=cell.together, n_timesteps=base.n_timesteps, draw=draw)
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
    knowledge = " + ".join(spec.grant) or "the update"
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
        return SavedInversion(spec.attack, knowledge, refused=str(error))
    return saved_inversion(
        found, attack=spec.attack, knowledge=knowledge, n_updates=len(updates), granted=spec.grant, cpu_s=cpu_s
    )
