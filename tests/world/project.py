"""Whole projects in small, made in seconds: data, runs, reconstructions, scores, updates, tables and figures."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from splitlab.core.config import parse
from splitlab.core.tables import write_table
from splitlab.data.datasets import SPLITS
from splitlab.data.generate import write_split
from splitlab.data.image_set import ImageSet, load
from splitlab.diffusion.base import Base, load_base
from splitlab.dp.finetune import DPConfig
from splitlab.explorer.explore import Artefacts
from splitlab.report.figures.dp_figures import draw_dp_curve, draw_dp_samples
from splitlab.report.figures.run_figures import draw_figures
from splitlab.report.figures.update_figures import draw_update_figures
from splitlab.split.config import AttackSpec, TrainConfig
from splitlab.split.server import attack_and_save
from splitlab.split.train import train
from splitlab.split.wire import read_transcript
from splitlab.study.config import EvaluateConfig
from splitlab.study.dp_survey import DPCell, DPSurveyConfig, dp_survey
from splitlab.study.evaluate import evaluate_all, evaluate_run
from splitlab.study.survey import UTILITY_COLUMNS, SurveyConfig, record_survey
from splitlab.study.survey_attack import attack_survey
from splitlab.study.update_grid import UpdateConfig
from splitlab.study.update_scores import evaluate_updates
from splitlab.study.update_survey import attack_updates, record_updates
from world import tiny
from world.once import once

_FEW = {"dataset": "tiny", "steps": 4, "batch_size": 3, "local_steps": 2, "record_messages": 4, "eval_samples": 3}
_FEW |= {"published_key": 0}
_ALL = {"timestep_floor": 500, "symsigmoid": True, "fixed_noise": 0.5, "half": True, "hide_prompts": True}

UPDATES = {
    "images": 2,
    "published_key": 0,
    "models": {"pixel": {"kind": "pixel", "size": 16, "channels": [32, 64]}, "latent": {"kind": "latent"}},
    "cases": [
        {
            "model": "pixel",
            "dataset": "tiny",
            "defences": ["none", "noise=1", "noise=100"],
            "attacks": [
                {"attack": "timesteps"},
                {"attack": "unknown_noise", "options": {"n_starts": 2}},
                {"attack": "gidm", "grant": ["timesteps", "noise"], "options": {"latent_evals": 0, "pixel_evals": 4}},
            ],
        },
        {
            "model": "latent",
            "dataset": "tiny",
            "timesteps": [-1],
            "attacks": [{"attack": "timesteps"}, {"attack": "prompts"}],
        },
    ],
}
"""A section `updates` that takes seconds."""


@dataclass(frozen=True)
class World:
    """Folders as the pipeline leaves them, and the parameters it ran with."""

    root: Path
    params: dict[str, Any]

    @property
    def folders(self) -> dict[str, Path]:
        """What `load_material` takes."""
        return {name: self.root / name for name in ("runs", "reconstructions", "metrics", "figures")}

    @property
    def page(self) -> dict[str, Path]:
        """What `write_report` takes."""
        own = {"update_figures": "figures-updates", "dp_figures": "figures-dp"}
        return self.folders | {name: self.root / folder for name, folder in own.items()}

    @property
    def survey(self) -> Path:
        """The survey's folder."""
        return self.root / "survey"

    def draw(self, out: Path) -> list[Path]:
        """Draw all figures below `out`."""
        made = (self.root / name for name in ("runs", "reconstructions", "scores", "metrics"))
        return draw_figures(*made, self.params, out=out, survey=self.survey)


def world(root: Path, base_path: Path) -> World:
    """Return, made in `root`, what tests of figures and report read."""
    made = World(root, _parameters(root, base_path))
    once(root, lambda _: _make(made))
    return made


def _parameters(root: Path, base_path: Path) -> dict[str, Any]:
    return {
        "base": {"source": str(base_path)},
        "datasets": {"tiny": {split: str(root / "data" / split / "tiny.zip") for split in SPLITS}},
        "runs": {
            "central": _FEW | {"scheme": "central"},
            "federated": _FEW | {"scheme": "federated"},
            "split": _FEW | {"scheme": "split"},
            "s1": _FEW | {"scheme": "split", "defences": _ALL},
        },
        "attacks": {
            run: [{"attack": "mean_public", "seeds": 1}, {"attack": "closed_form", "seeds": 1}]
            for run in ("split", "s1")
        },
        "survey": {
            "default": {"tiny": ["none", "mixing", "matched"]},
            "accumulate": ["none"],
            "settings": {"none": {}, "mixing": {"key_mixing": 3}, "matched": {"feature_noise": 1.0, "matched": True}},
            "attacks": [
                {"attack": "mean_public", "seeds": 1},
                {"attack": "closed_form", "seeds": 1},
                {"attack": "closed_form", "seeds": 1, "ignore": ["noise", "defences"]},
                {"attack": "closed_form", "seeds": 1, "ignore": ["noise", "smashed"]},
                {"attack": "one_step", "seeds": 1, "when": "matched"},
            ],
            "epoch_attacks": [{"attack": "mean_public", "seeds": 1}, {"attack": "closed_form", "seeds": 1}],
            "messages": 4,
            "batch_size": 3,
            "epochs": 2,
            "epoch_samples": 6,
            "steps": 2,
            "published_key": 0,
            "datasets": ["tiny"],
        },
        "updates": UPDATES,
        "evaluate": {"buckets": [0, 500, 1000], "candidates": 6, "samples": 6},
    }


def _make(made: World) -> None:
    """Train, attack and evaluate tiny runs, then the survey, updates and private fine-tunings."""
    root, params = made.root, made.params
    base = load_base(params["base"]["source"])
    splits = write_splits(root, "tiny", private=12, heldout=4, public=8)
    train_and_attack(root, params, base, splits, cache=root / "cache")
    survey = parse(SurveyConfig, params["survey"], where="survey")
    places = {"seen": root / "survey" / "transcripts", "hidden": root / "survey" / "truth"}
    record_survey(survey, base, tiny.splits(splits["private"]), cache=root / "cache", **places)
    out = root / "survey" / "reconstructions"
    attack_survey(survey, base, lambda *_: splits["public"], seen=places["seen"], out=out, cache=root / "cache")
    config = parse(EvaluateConfig, params["evaluate"], where="evaluate")
    folders = {name: root / name for name in ("scores", "metrics", "survey")}
    folders["utility"] = root / "metrics" / "utility.csv"
    folders["metrics"].mkdir(parents=True)
    costs = [
        {"dataset": "tiny", "setting": name, "defences": str(defences), "steps": 2, "seed": 0, "eval_loss": 0.1}
        | {"control_iou": 0.5, "control_edges": 0.5}
        for name, defences in survey.settings.items()
    ]
    pd.DataFrame(costs, columns=list(UTILITY_COLUMNS)).to_csv(folders["utility"], index=False)
    evaluate_all(root / "runs", root / "reconstructions", base, params, config, **folders)
    make_updates(parse(UpdateConfig, UPDATES, where="updates"), base, splits, root)
    make_private(base, root)
    made.draw(made.folders["figures"])


def write_splits(root: Path, dataset: str, **sizes: int) -> dict[str, ImageSet]:
    """Write splits of so many shapes each, no image in two of them, below `root`/data."""
    for seed, (split, n) in enumerate(sizes.items()):
        write_split(root / "data" / split / f"{dataset}.zip", tiny.samples(n, seed=seed))
    return {split: load(root / "data" / split / f"{dataset}.zip") for split in sizes}


def train_and_attack(
    root: Path, params: dict[str, Any], base: Base, splits: dict[str, ImageSet], *, cache: Path
) -> None:
    """Train all runs of `params` below `root`/runs, and attack them below `root`/reconstructions."""
    for run, section in params["runs"].items():
        config = parse(TrainConfig, section, where=run)
        train(run, config, base, splits["private"], splits["heldout"], out=root / "runs" / run, cache=cache)
    for run, sections in params["attacks"].items():
        transcript = read_transcript(root / "runs" / run / "transcript.safetensors")
        for spec in (parse(AttackSpec, section, where=run) for section in sections):
            for seed in range(spec.seeds):
                out = root / "reconstructions" / run
                attack_and_save(transcript, spec, seed, base, splits["public"], out=out, cache=cache)


def make_updates(config: UpdateConfig, base: Base, data: dict[str, ImageSet], root: Path) -> pd.DataFrame:
    """Record, attack, evaluate and draw the updates of `config` below `root`; return the table."""
    recorded, inversions = root / "updates", root / "updates" / "inversions"
    record_updates(config, base, lambda _, split: data[split], out=recorded)
    attack_updates(config, base, lambda _, split: data["public"], recorded=recorded, out=inversions)
    folders = {"recorded": recorded, "inversions": inversions}
    found = evaluate_updates(config, base, lambda _, split: data[split], metrics=root / "metrics", **folders)
    table = found.view("gradient_attacks")
    draw_update_figures(config, table, out=root / "figures-updates", **folders)
    return table


CLASSES = ("red circle with blue background", "blue circle with red background")


def two_classes(n: int, seed: int) -> ImageSet:
    """Return n shapes, every other one called by either class's prompt."""
    data = tiny.small_set(n, seed=seed)
    return ImageSet(data.images, data.hints, CLASSES * (n // 2), data.sources, f"{data.digest}{seed}")


def private_survey() -> DPSurveyConfig:
    """Return a grid of private fine-tunings that takes seconds."""
    few = {"steps": 2, "batch_size": 8, "from_block": 0, "delta": 1e-3, "max_grad_norm": 1.0}
    cells = (DPCell("attention", (math.inf, 1.0)), DPCell("unet", (1.0,)), DPCell("lora", (1.0,), grids=("full",)))
    common = DPConfig(dataset="tiny", classes=CLASSES, published_key=0, **few)
    return DPSurveyConfig(common=common, cells=cells, seeds=2, n_samples=80, sample_steps=2, classifier_steps=5)


def make_private(base: Base, root: Path) -> pd.DataFrame:
    """Fine-tune, judge and draw `private_survey` below `root`; return the table."""
    splits = {"private": two_classes(80, 0), "private-test": two_classes(70, 1), "public": two_classes(40, 2)}
    table, pictures = dp_survey(private_survey(), base, lambda dataset, split: splits[split], cache=root / "cache")
    write_table(table, root / "metrics" / "dp.csv")
    draw_dp_curve(table, out=root / "figures-dp" / "curve.png")
    draw_dp_samples(pictures, out=root / "figures-dp" / "samples-tiny.png")
    return table


_GUARDED = {"timestep_floor": 200, "symsigmoid": True, "fixed_noise": 0.5, "half": True, "hide_prompts": True}
_SHORT = {"dataset": "shapes", "steps": 6, "batch_size": 6, "record_messages": 4, "eval_samples": 4, "published_key": 0}
_RUNS = {
    "plain": _SHORT | {"scheme": "split"},
    "guarded": _SHORT | {"scheme": "split", "n_clients": 2, "defences": _GUARDED, "record_messages": 2},
    "central": _SHORT | {"scheme": "central"},
}
_UPDATES = {
    "images": 2,
    "published_key": 0,
    "models": {"pixel": {"kind": "pixel", "size": 16, "channels": [32, 64]}},
    "cases": [
        {"model": "pixel", "dataset": "shapes", "attacks": [{"attack": "timesteps"}, {"attack": "unknown_noise"}]}
    ],
}
_ATTACKS = [
    {"attack": "mean_public", "seeds": 1},
    {"attack": "random_public", "seeds": 2},
    {"attack": "inverse_network", "ignore": ["noise"], "seeds": 1, "options": {"steps": 3, "width": 8}},
    {"attack": "closed_form", "seeds": 1},
]


def explored(root: Path, base_path: Path) -> Path:
    """Return, made in `root`, what the explorer's tests copy: two attacked runs, one that was not, and updates."""
    return once(root, lambda _: _make_explored(root, base_path))


def _make_explored(root: Path, base_path: Path) -> None:
    params = {
        "base": {"source": "models/base"},
        "datasets": {"shapes": {split: f"data/{split}/shapes.zip" for split in SPLITS}},
        "pretrain": {},
        "runs": _RUNS,
        "attacks": dict.fromkeys(("plain", "guarded"), _ATTACKS),
        "survey": {},
        "updates": _UPDATES,
        "dp": {},
        "evaluate": {"candidates": 10},
    }
    shutil.copytree(base_path, root / "models" / "base")
    base = load_base(root / "models" / "base")
    splits = write_splits(root, "shapes", private=12, public=24, heldout=4)
    train_and_attack(root, params, base, splits, cache=root / ".cache")
    for run in params["attacks"]:
        out, config = root / "scores" / f"{run}.safetensors", EvaluateConfig(candidates=10)
        evaluate_run(root / "runs" / run, root / "reconstructions" / run, base, splits["private"], config, out=out)
    updates, out = parse(UpdateConfig, _UPDATES, where="updates"), root / "updates"
    record_updates(updates, base, lambda _, split: splits[split], out=out)
    attack_updates(updates, base, lambda _, split: splits[split], recorded=out, out=out / "inversions")
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def opened(project: Path) -> Artefacts:
    """Open a copy of `explored` as the explorer does."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["base"]["source"] = str(project / "models/base")
    params["datasets"] = {"shapes": {split: str(project / "data" / split / "shapes.zip") for split in SPLITS}}
    folders = {name: project / name for name in ("runs", "reconstructions", "scores", "survey")}
    return Artefacts(params, cache=project / ".cache", **folders)
