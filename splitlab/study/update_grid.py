"""The grid of shared updates: models, cases of them, and the attacks that each is given to."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated, Any

from splitlab.core.config import Count, Natural, Positive, Settings, one_of
from splitlab.core.errors import InputError
from splitlab.core.labels import GRANT_WORDS
from splitlab.federated.attacks import INVERSIONS
from splitlab.federated.client import TRAINABLE
from splitlab.federated.defences import make_defence
from splitlab.study.config import GRIDS

GRANTS = tuple(GRANT_WORDS)

KINDS = ("pixel", "latent", "controlnet", "lora")

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ModelSpec(Settings):
    """A model that clients train, as the server sends it to them: public.

    Attributes:
        kind: "pixel" (a UNet2DModel), "latent" (the base's U-Net), "controlnet" (in front of the base's U-Net), or
            "lora" (adapters on the attention of the base's U-Net).
        size: pixel models: height and width of their images.
        channels: pixel models without `source`: their levels' channels; the weights are random, another draw per seed.
        source: a trained pixel model's or ControlNet's directory.
        rank: of LoRA adapters.
    """

    kind: Annotated[str, one_of(KINDS)]
    size: Count = 32
    channels: tuple[int, ...] = (32, 64)
    source: str = ""
    rank: Count = 4

    @property
    def trained(self) -> bool:
        """Whether its weights were trained before (adapters: those they sit on)."""
        return self.kind != "pixel" or bool(self.source)


@dataclass(frozen=True)
class InversionSpec(Settings):
    """One attack on the updates of a case.

    Attributes:
        attack: its name in `splitlab.federated.attacks.INVERSIONS`.
        grant: facts that the threat model gives the server besides the update: of `GRANTS`.
        options: keyword arguments of the attack function.
    """

    attack: Annotated[str, one_of(INVERSIONS)]
    grant: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse grants that do not exist."""
        super().__post_init__()
        if unknown := set(self.grant) - set(GRANTS):
            raise InputError(f"{', '.join(sorted(unknown))} cannot be granted; choose of {', '.join(GRANTS)}")

    @property
    def name(self) -> str:
        """A file-name-safe name: the attack, and what it is granted."""
        return "-with-".join([self.attack, *(["-".join(self.grant)] if self.grant else [])])


@dataclass(frozen=True)
class Case(Settings):
    """Cells that are alike but for timestep, batch, defence, objective and kind of update: all combinations.

    Attributes:
        model: a key of `UpdateConfig.models`.
        attacks: on every cell.
        dataset: whose private split the clients train on.
        timesteps: of all images of an update; -1: drawn for each, distinct.
        batches: images per update.
        defences: "none" or `name=level` (see `splitlab.federated.defences.DEFENCES`).
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
    trainable: Annotated[str, one_of(TRAINABLE)] = "all"
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    images: Natural = 0
    seeds: Natural = 0
    grids: tuple[str, ...] = GRIDS

    def __post_init__(self) -> None:
        """Refuse words that mean nothing."""
        super().__post_init__()
        for defence in self.defences:
            make_defence(defence)

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
        return int(getattr(make_defence(self.defence), "n_clients", 1))

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
class UpdateConfig(Settings):
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

    grid: Annotated[str, one_of(GRIDS)] = "default"
    models: dict[str, ModelSpec] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()
    images: Count = 3
    seeds: Count = 1
    full_images: Count = 5
    full_seeds: Count = 3
    lr: Positive = 0.01
    published_key: int | None = None

    def __post_init__(self) -> None:
        """Refuse models that do not exist, and cells that would share a file."""
        super().__post_init__()
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
