"""No attack sees the truth: what it opens, what it leaves where there is none, and what its modules name."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import closure
import pytest
import yaml
from world import names
from world.project import write_splits
from world.watch import watched

from splitlab.core.config import parse
from splitlab.core.paths import ROOT
from splitlab.data.datasets import SPLITS
from splitlab.diffusion.base import load_base
from splitlab.federated.attacks import INVERSIONS
from splitlab.params import SECTIONS
from splitlab.split.attacks import ATTACKS
from splitlab.split.config import TrainConfig
from splitlab.split.train import train
from splitlab.study.survey import SurveyConfig, record_survey
from splitlab.study.update_grid import UpdateConfig
from splitlab.study.update_survey import record_updates

FEW = {"dataset": "tiny", "steps": 2, "batch_size": 6, "record_messages": 2, "eval_samples": 2}
NETWORK = {"steps": 2, "width": 8, "n_blocks": 1, "pool": 12}
SHAPES = {"borrowed_colours": True, "hint_layout_noise": 0.2, "feature_noise": 1.0, "matched": True}
GRANTED = ["timesteps", "noise"]
PARAMS = {
    "runs": {
        "plain": FEW | {"scheme": "split"},
        "gradients": FEW | {"scheme": "split_gradients", "steps": 4, "record_from": 2},
        "hijack": FEW | {"scheme": "split_gradients", "server": "hijack"},
    },
    "attacks": {
        "plain": [
            {"attack": "mean_public", "seeds": 1},
            {"attack": "random_public", "seeds": 1},
            {"attack": "one_step", "seeds": 1},
            {"attack": "posterior", "seeds": 1},
            {"attack": "accumulation", "seeds": 1},
            {"attack": "nearest_public", "seeds": 1},
            {"attack": "closed_form", "seeds": 1},
            {"attack": "likelihood", "seeds": 1, "options": {"steps": 1}},
            {"attack": "inverse_network", "seeds": 1, "options": NETWORK},
            {"attack": "adaptive_network", "seeds": 1, "options": NETWORK},
            {"attack": "prompt_inversion", "seeds": 1},
            {"attack": "prompt_guess", "seeds": 1, "options": {"steps": 2, "batch": 4, "shortlist": 2, "draws": 1}},
        ],
        "gradients": [
            {"attack": "mean_public", "seeds": 1},
            {"attack": "unsplit", "seeds": 1, "options": {"epochs": 1, "restarts": 1}},
        ],
        "hijack": [{"attack": "mean_public", "seeds": 1}, {"attack": "hijacking", "seeds": 1}],
    },
    "survey": {
        "default": {"tiny": ["mixing", "patches", "disguised"]},
        "datasets": ["tiny"],
        "settings": {"mixing": {"key_mixing": 3}, "patches": {"patch_shuffle": 2}, "disguised": SHAPES},
        "attacks": [
            {"attack": "unmixing", "seeds": 1, "when": "key_mixing", "options": {"rounds": 1}},
            {
                "attack": "jigsaw",
                "seeds": 1,
                "when": "patch_shuffle",
                "options": {"steps": 2, "width": 8, "n_layers": 1},
            },
            {"attack": "surrogate_posterior", "seeds": 1, "when": "borrowed_colours"},
        ],
        "messages": 2,
        "batch_size": 6,
    },
    "updates": {
        "images": 1,
        "models": {"pixel": {"kind": "pixel", "size": 16, "channels": [32, 64]}, "latent": {"kind": "latent"}},
        "cases": [
            {
                "model": "pixel",
                "dataset": "tiny",
                "attacks": [
                    {"attack": "timesteps"},
                    {"attack": "unknown_noise", "options": {"n_starts": 1, "n_iterations": 2}},
                    {"attack": "known_noise", "grant": GRANTED, "options": {"n_evals": 2}},
                    {"attack": "dlg", "grant": GRANTED, "options": {"n_evals": 2}},
                    {"attack": "inverting_gradients", "grant": GRANTED, "options": {"n_evals": 2}},
                    {"attack": "gidm", "grant": GRANTED, "options": {"latent_evals": 0, "pixel_evals": 2}},
                    {"attack": "gidm_plus", "options": {"n_evals": 2}},
                ],
            },
            {"model": "latent", "dataset": "tiny", "attacks": [{"attack": "prompts"}]},
        ],
    },
}
STAGES = {
    "attack_split": {"out": "reconstructions", "survey": "survey/reconstructions"},
    "attack_federated": {"out": "updates/inversions"},
}
"""Notebook -> the parameters that name what its stage leaves."""

ATTACK = """
import os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])  # one process, so that the hook sees all
sys.addaudithook(lambda event, args: print("OPENED", args[0]) if event == "open" else None)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, base_path: Path) -> Path:
    """A checkout of its own in which everything was recorded and nothing attacked; truth and private data are there."""
    root = tmp_path_factory.mktemp("honesty") / "project"
    own = {"tiny": {split: f"data/{split}/tiny.zip" for split in SPLITS}}
    params = {name: {} for name in SECTIONS} | PARAMS | {"base": {"source": "models/base"}, "datasets": own}
    for folder in ("splitlab", "notebooks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(base_path, root / "models/base")
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    base, data = load_base(root / "models/base"), write_splits(root, "tiny", private=12, public=24, heldout=4)
    for run, values in PARAMS["runs"].items():
        config = parse(TrainConfig, values, where=run)
        more = {"public": data["public"]} if config.server == "hijack" else {}
        train(run, config, base, data["private"], data["heldout"], out=root / "runs" / run, cache=root / "made", **more)
    survey = parse(SurveyConfig, PARAMS["survey"], where="survey")
    places = {"seen": root / "survey/transcripts", "hidden": root / "survey/truth"}
    record_survey(survey, base, lambda _, split: data[split], **places)
    updates = parse(UpdateConfig, PARAMS["updates"], where="updates")
    record_updates(updates, base, lambda _, split: data[split], out=root / "updates")
    shutil.rmtree(root / "made")
    return root


def secret(project: Path) -> list[Path]:
    """Return every folder and file that no attacker may see."""
    found = [project / "data/private", project / "data/heldout", project / "survey/truth", project / "updates/truth"]
    for run in PARAMS["runs"]:
        known = ("transcript.safetensors", "server.safetensors")
        found += [path for path in (project / "runs" / run).iterdir() if path.name not in known]
    assert all(path.exists() for path in found)
    return found


def attacked(project: Path, *, before: str = "", notebooks: Sequence[str] = tuple(STAGES)) -> str:
    """Run attack stages as their notebooks do, with `before` in front; return what Python opened."""
    source = ATTACK + before
    for notebook in notebooks:
        first, _, rest = closure.code(project / f"notebooks/{notebook}.ipynb").partition("\nfrom ")
        given = "\n".join(f"{name} = {value!r}" for name, value in STAGES[notebook].items())
        source += f"{first}\n{given}\nfrom {rest}\n"
    env = {
        "SPLITLAB_ROOT": str(project),
        "PYTHONPATH": str(project),
        "MPLBACKEND": "Agg",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    out = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | env, cwd=project, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return "\n".join(line.removeprefix("OPENED ") for line in out.stdout.splitlines() if line.startswith("OPENED "))


def left(project: Path) -> dict[str, bytes]:
    """Return what the attacks left, without their timings, and take it away."""
    found = {}
    places = [project / folder for told in STAGES.values() for folder in told.values()]
    for folder in filter(Path.exists, places):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.endswith((".timing.json", ".seconds.json")):
                found[path.relative_to(project).as_posix()] = path.read_bytes()
        shutil.rmtree(folder)
    shutil.rmtree(project / ".cache")
    return found


def test_no_attack_opens_a_private_file_and_without_one_it_leaves_the_same_bytes(project: Path) -> None:
    hidden = secret(project)
    (project / "scratch").mkdir()
    with watched(project / "data", project / "runs", project / "survey", project / "updates") as opened:
        by_python = attacked(project).splitlines()
    with_truth = left(project)
    attempts = {Path(path).name.split("-")[0] for path in with_truth if path.endswith(".safetensors")}
    assert attempts == {*ATTACKS, *INVERSIONS, "no_information"}
    assert project / "runs/plain/transcript.safetensors" in opened, "what is opened is seen"
    assert project / "data/public/tiny.zip" in opened
    inside = [Path(path) for path in by_python if path.startswith(str(project))]
    assert project / "params.yaml" in inside, "what Python opens is seen"
    for path in (*opened, *inside):
        assert not any(path == place or place in path.parents for place in hidden), path
    for place in hidden:
        shutil.move(place, project.parent / f"hidden-{hidden.index(place)}")
    attacked(project)
    without = left(project)
    assert with_truth == without
    for place in hidden:
        shutil.move(project.parent / f"hidden-{hidden.index(place)}", place)


PEEKS = {
    "open": "open(path, 'rb').read()",
    "os.open": "os.read(os.open(path, os.O_RDONLY), 9)",
    "mmap": "import mmap; mmap.mmap(os.open(path, os.O_RDONLY), 0, prot=mmap.PROT_READ)[:9]",
    "safetensors": "import safetensors; safetensors.safe_open(path, 'pt')",
    "numpy": "import numpy; numpy.fromfile(path, 'u1')",
    "another process": "import subprocess; subprocess.run(['cat', path], stdout=subprocess.DEVNULL, check=True)",
    "C": "import ctypes; ctypes.CDLL(None).open(path.encode(), os.O_RDONLY)",
    "nothing": "os.path.exists(path)",
}


@pytest.mark.parametrize("way", PEEKS)
def test_the_watch_sees_every_way_of_opening(project: Path, way: str) -> None:
    truth = project / "runs/plain/truth.safetensors"
    with watched(project / "runs") as opened:
        subprocess.run([sys.executable, "-c", f"import os; path = {str(truth)!r}; {PEEKS[way]}"], check=True)
    assert opened == (set() if way == "nothing" else {truth})


@pytest.mark.slow
def test_an_attack_that_uses_the_truth_where_it_is_there_is_caught_both_ways(project: Path) -> None:
    """Plant one: the closed form answers with the true noise, read below Python's own functions, if there is any."""
    planted = """
from dataclasses import replace

from safetensors.torch import load_file
from splitlab.core.paths import ROOT
from splitlab.split.attacks import ATTACKS
from splitlab.split.messages import Reconstruction

def cheating(observations, knowledge, honest=ATTACKS["closed_form"].function, **options):
    path = ROOT / "runs/plain/truth.safetensors"
    found = honest(observations, knowledge, **options)
    if not path.exists():
        return found
    noise = next(part for part in load_file(path).values() if part.is_floating_point())
    return Reconstruction(found.images + noise.mean(), found.hints)

ATTACKS["closed_form"] = replace(ATTACKS["closed_form"], function=cheating)
"""
    truth = project / "runs/plain/truth.safetensors"
    with watched(project / "runs") as opened:
        attacked(project, before=planted, notebooks=["attack_split"])
    with_truth = left(project)
    assert truth in opened
    truth.rename(project.parent / "truth")
    attacked(project, before=planted, notebooks=["attack_split"])
    without = left(project)
    (project.parent / "truth").rename(truth)
    differ = {Path(path).name for path in with_truth if with_truth[path] != without[path]}
    assert differ == {"closed_form-0.safetensors"}


ATTACKERS = sorted((ROOT / "splitlab").glob("*/attacks/*.py"))
TRUTH = ("Truth", "UpdateTruth", "RunTruth", "read_truth", "read_update_truth", "run_truth")
DATA = (
    "splitlab.load",
    "splitlab.load_split",
    "splitlab.data.image_set.load",
    "splitlab.data.image_set.locate",
    "splitlab.params",
)
EVALUATION = tuple(f"splitlab.{room}" for room in ("study", "report", "explorer", "data.datasets", "split.train"))


def seen(source: str, package: str = "splitlab.split.attacks") -> set[str]:
    """Return what a module of attacks names that belongs to the evaluator's or the client's side."""
    return {
        name
        for name, _ in names.reached(source, package)
        if name.rpartition(".")[2] in (*TRUTH, "load_split", "*")
        or any(name == place or name.startswith(f"{place}.") for place in (*DATA, *EVALUATION))
    }


@pytest.mark.parametrize("path", ATTACKERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_attack_modules_name_neither_truth_nor_evaluation(path: Path) -> None:
    assert seen(path.read_text(), names.package_of(path, ROOT)) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from splitlab.split.wire import read_truth",
        "from splitlab.split.wire import read_truth as read",
        "from splitlab import read_truth",
        "import splitlab\nsplitlab.read_truth(path)",
        "import splitlab.split.wire\nsplitlab.split.wire.read_truth(path)",
        "import splitlab.split.wire as w\nw.read_truth(path)",
        "from splitlab.split import wire\nread = wire.read_truth",
        "from .. import wire\nwire.read_truth(path)",
        "from ..wire import read_truth",
        "from ..messages import Truth",
        "from splitlab.split.messages import *",
        "def f():\n    from splitlab.federated.update import read_update_truth",
        "import splitlab.study.evaluate",
        "import splitlab.study.evaluate as e",
        "from splitlab.study import evaluate",
        "from splitlab.study.evaluate import score_samples",
        "from .. import train",
        "import importlib\nimportlib.import_module('splitlab.study.evaluate')",
        "import importlib\nimportlib.import_module('splitlab.split.wire').read_truth(path)",
        "from importlib import import_module as bring\nbring('splitlab.study.evaluate')",
        "__import__('splitlab.study.evaluate')",
        "from splitlab.split import wire\ngetattr(wire, 'read_truth')(path)",
        "from splitlab.data.image_set import load",
        "from splitlab.data import image_set\nimage_set.load(path)",
        "from splitlab.params import load_split",
        "from splitlab.federated.update import UpdateTruth",
    ],
)
def test_the_search_for_truth_sees_every_form(source: str) -> None:
    assert seen(source)


@pytest.mark.parametrize(
    "source",
    [
        "from splitlab.split.messages import Knowledge, Observation",
        "from splitlab.core import checkpoint\ncheckpoint.load(path)",
        "from splitlab.split.wire import read_transcript",
        "truth = 1",
    ],
)
def test_the_search_for_truth_takes_nothing_harmless_for_it(source: str) -> None:
    assert not seen(source)


def test_the_truth_is_read_on_the_evaluators_side_only() -> None:
    readers: dict[str, set[str]] = {name: set() for name in ("read_truth", "read_update_truth")}
    for path in (ROOT / "splitlab").rglob("*.py"):
        for name, _ in names.reached(path.read_text(), names.package_of(path, ROOT)):
            if (last := name.rpartition(".")[2]) in readers:
                readers[last].add(path.name)
    assert readers["read_truth"] - {"__init__.py"} == {"explore.py", "run_figures.py", "scoring.py"}
    updates = {"update_explore.py", "update_figures.py", "update_scores.py"}
    assert readers["read_update_truth"] - {"__init__.py"} == updates


def test_the_attack_notebooks_name_nothing_private() -> None:
    for notebook in STAGES:
        source = closure.code(ROOT / f"notebooks/{notebook}.ipynb")
        assert "load_split" in source
        assert seen(source.replace("load_split", "load_public")) == set()
        assert not re.search(r"truth|\"private\"|\"heldout\"|record\.json|evaluate", source)
        assert 'load_split(dataset, "public", params)' in source
