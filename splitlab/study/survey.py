"""Every defence judged alike: one transcript and one trained ControlNet per defence setting, all else equal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from tqdm import tqdm

from splitlab.core import checkpoint
from splitlab.core.config import Count, Settings, one_of, reseeded
from splitlab.core.errors import InputError
from splitlab.core.parallel import parallel
from splitlab.data.image_set import ImageSet, digest
from splitlab.data.overlap import refuse_overlaps
from splitlab.diffusion.base import Base
from splitlab.split.config import AttackSpec, Defences, TrainConfig
from splitlab.split.defences import recorded
from splitlab.split.train import record, train
from splitlab.study.config import GRIDS

UTILITY_COLUMNS = ("dataset", "setting", "defences", "steps", "seed", "eval_loss", "control_iou", "control_edges")

LoadSplit = Callable[[str, str], ImageSet]
"""`(dataset, split) -> data`."""


@dataclass(frozen=True)
class SurveyConfig(Settings):
    """Which defences are judged, on what data, by which attacks.

    Attributes:
        grid: "default" runs the settings that `default` lists, "full" every setting on every data set.
        default: data set -> names of settings.
        datasets: the data sets of the full grid.
        settings: name -> the clients' defences.
        accumulate: settings that are also recorded over many epochs of few images, for attacks that link messages.
        attacks: the attacks on every transcript (those with `when` only where that defence is on).
        epoch_attacks: the attacks on the transcripts of `accumulate`.
        messages: messages per transcript, of `batch_size` samples.
        epochs: epochs over `epoch_samples` images in a transcript of `accumulate`.
        epoch_samples: how many images those are.
        batch_size, steps, seeds: of the training that shows what a setting costs.
        published_key: see `splitlab.split.config.TrainConfig`; training of another seed has a key that differs by as
            much.
    """

    grid: Annotated[str, one_of(GRIDS)] = "default"
    default: dict[str, tuple[str, ...]] = field(default_factory=dict)
    datasets: tuple[str, ...] = ("shapes",)
    settings: dict[str, Defences] = field(default_factory=dict)
    accumulate: tuple[str, ...] = ()
    attacks: tuple[AttackSpec, ...] = ()
    epoch_attacks: tuple[AttackSpec, ...] = ()
    messages: Count = 16
    epochs: Count = 10
    epoch_samples: Count = 64
    batch_size: Count = 32
    steps: Count = 300
    seeds: Count = 1
    published_key: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that do not exist."""
        super().__post_init__()
        named = {name for names in self.default.values() for name in names} | set(self.accumulate)
        if unknown := sorted(named - set(self.settings)):
            raise InputError(f"survey: no setting is called {', '.join(unknown)}; there: {', '.join(self.settings)}")

    @property
    def cells(self) -> list[tuple[str, str]]:
        """The (data set, setting) pairs of the chosen grid."""
        if self.grid == "full":
            return [(dataset, name) for dataset in self.datasets for name in self.settings]
        return [(dataset, name) for dataset, names in self.default.items() for name in names]

    def run(self, dataset: str, setting: str) -> TrainConfig:
        """Return the training run of one cell."""
        return TrainConfig(
            dataset=dataset,
            scheme="split",
            defences=self.settings[setting],
            steps=self.steps,
            batch_size=self.batch_size,
            record_messages=self.messages,
            published_key=self.published_key,
        )

    def transcripts(self) -> dict[str, "Planned"]:
        """Return name -> every transcript of the chosen grid."""
        planned = {
            f"survey-{dataset}-{name}": Planned("survey", name, self.run(dataset, name)) for dataset, name in self.cells
        }
        count = self.epochs * self.epoch_samples // self.batch_size
        for dataset, name in self.cells:
            if name in self.accumulate:
                run = replace(self.run(dataset, name), samples=self.epoch_samples, record_messages=count)
                planned[f"epochs-{dataset}-{name}"] = Planned("epochs", name, run)
        return planned


@dataclass(frozen=True)
class Planned:
    """A transcript to record and attack.

    Attributes:
        kind: "survey", or "epochs": of many epochs over few images.
        setting: the name of its defences.
        config: the run.
    """

    kind: str
    setting: str
    config: TrainConfig


def record_survey(
    config: SurveyConfig, base: Base, load: LoadSplit, *, seen: Path, hidden: Path, cache: Path | None = None
) -> list[str]:
    """Record every transcript of the grid below `seen`, and what its server did not see below `hidden`.

    Returns the runs' names.

    Raises:
        InputError: the splits of a data set share images.
    """
    transcripts = config.transcripts()
    refuse_overlaps((planned.config.dataset for planned in transcripts.values()), load)
    for folder in (seen, hidden):  # of an empty grid too
        folder.mkdir(parents=True, exist_ok=True)
    for run, planned in tqdm(transcripts.items(), desc="record"):
        files = {"transcript": seen / run / "transcript.safetensors", "truth": hidden / run / "truth.safetensors"}
        record(run, planned.config, base, load(planned.config.dataset, "private"), cache=cache, **files)
        facts = {"run": run, "kind": planned.kind, "setting": planned.setting, "base": base.digest}
        checkpoint.save_json(hidden / run / "record.json", facts | {"config": recorded(planned.config)})
    return list(transcripts)


def utility(config: SurveyConfig, base: Base, load: LoadSplit, *, cache: Path, workers: int = 1) -> pd.DataFrame:
    """Train every setting on the first data set, the default grid's on the others; measure how well hints are followed.

    What was trained before, with the same parameters, data and base model, is read from `cache`.

    Returns a table of `UTILITY_COLUMNS`.
    """
    cells = [(config.datasets[0], name) for name in config.settings]
    cells += [(dataset, name) for dataset in config.datasets[1:] for name in ("none", *config.default.get(dataset, ()))]
    tries = [
        (dataset, name, replace(reseeded(config.run(dataset, name), seed), record_messages=1))
        for dataset, name in cells
        for seed in range(config.seeds)
    ]
    calls = [
        (f"{dataset}-{name}-{one.seed}", one, base, load(dataset, "private"), load(dataset, "heldout"), cache)
        for dataset, name, one in tries
    ]
    rows = [
        {"dataset": dataset, "setting": name, "defences": str(one.defences), "steps": one.steps, "seed": one.seed}
        | {key: found[key] for key in ("eval_loss", "control_iou", "control_edges")}
        for (dataset, name, one), found in zip(
            tries, parallel(_trained, calls, desc="utility", workers=workers), strict=True
        )
    ]
    return pd.DataFrame(rows, columns=list(UTILITY_COLUMNS)).round(4)


def _trained(
    name: str, config: TrainConfig, base: Base, private: ImageSet, heldout: ImageSet, cache: Path
) -> Mapping[str, Any]:
    key = digest({"config": config, "base": base.digest, "private": private.digest, "heldout": heldout.digest})[:16]
    folder = cache / "utility" / f"{name}-{key}"
    if not (folder / "record.json").exists():
        train(name, config, base, private, heldout, out=folder, cache=cache)
    return checkpoint.load_json(folder / "record.json")
