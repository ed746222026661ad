"""A whole project in a folder, made in seconds: tiny data and base model, two attacked runs, one that was not."""

import shutil
from pathlib import Path

import yaml

from splitlab.core.config import parse
from splitlab.data import generate
from splitlab.data.datasets import SPLITS
from splitlab.data.image_set import load
from splitlab.diffusion.base import load_base
from splitlab.split.config import AttackSpec, TrainConfig
from splitlab.split.server import attack_and_save
from splitlab.split.train import train
from splitlab.split.wire import read_transcript
from splitlab.study.config import EvaluateConfig
from splitlab.study.evaluate import evaluate_run
from splitlab.study.update_grid import UpdateConfig
from splitlab.study.update_survey import attack_updates, record_updates
from world import tiny

S1 = {"timestep_floor": 200, "symsigmoid": True, "fixed_noise": 0.5, "half": True, "hide_prompts": True}
FEW = {"dataset": "shapes", "steps": 6, "batch_size": 6, "record_messages": 4, "eval_samples": 4, "published_key": 0}
RUNS = {
    "plain": FEW | {"scheme": "split"},
    "guarded": FEW | {"scheme": "split", "n_clients": 2, "defences": S1, "record_messages": 2},
    "central": FEW | {"scheme": "central"},
}
UPDATES = {
    "images": 2,
    "published_key": 0,
    "models": {"pixel": {"kind": "pixel", "size": 16, "channels": [32, 64]}},
    "cases": [
        {"model": "pixel", "dataset": "shapes", "attacks": [{"attack": "timesteps"}, {"attack": "unknown_noise"}]}
    ],
}
ATTACKS = [
    {"attack": "mean_public", "seeds": 1},
    {"attack": "random_public", "seeds": 2},
    {"attack": "inverse_network", "ignore": ["noise"], "seeds": 1, "options": {"steps": 3, "width": 8}},
    {"attack": "closed_form", "seeds": 1},
]


def project(root: Path, base_path: Path) -> Path:
    """Fabricate a project below `root`, in the places that params.yaml and the notebooks name."""
    params = {
        "base": {"source": "models/base"},
        "datasets": {"shapes": {split: f"data/{split}/shapes.zip" for split in SPLITS}},
        "pretrain": {},
        "runs": RUNS,
        "attacks": dict.fromkeys(("plain", "guarded"), ATTACKS),
        "survey": {},
        "updates": UPDATES,
        "dp": {},
        "evaluate": {"candidates": 10},
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.copytree(base_path, root / "models" / "base")
    base = load_base(root / "models" / "base")
    data = {}
    for seed, (split, n) in enumerate({"private": 12, "public": 24, "heldout": 4}.items()):
        path = root / "data" / split / "shapes.zip"
        generate.write_split(path, tiny.samples(n, seed=seed))
        data[split] = load(path)
    cache = root / ".cache"
    for run, values in RUNS.items():
        config = parse(TrainConfig, values, where=run)
        train(run, config, base, data["private"], data["heldout"], out=root / "runs" / run, cache=cache)
    for run in params["attacks"]:
        transcript = read_transcript(root / "runs" / run / "transcript.safetensors")
        out = root / "reconstructions" / run
        for values in ATTACKS:
            spec = parse(AttackSpec, values, where=run)
            for seed in range(spec.seeds):
                attack_and_save(transcript, spec, seed, base, data["public"], out=out, cache=cache)
        scores = root / "scores" / f"{run}.safetensors"
        config = EvaluateConfig(candidates=10)
        evaluate_run(root / "runs" / run, out, base, data["private"], config, out=scores)
    updates, out = parse(UpdateConfig, UPDATES, where="updates"), root / "updates"
    record_updates(updates, base, lambda _, split: data[split], out=out)
    attack_updates(updates, base, lambda _, split: data[split], recorded=out, out=out / "inversions")
    return root
