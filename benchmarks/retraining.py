"""Membership by training again with what a private run publishes: `python benchmarks/retraining.py [--runs 240]`.

Who holds record.json, the weights, the base, all data but one sample, and both candidates for that one, trains with
either, as the record says and from every seed that it names, and compares weights: where the draws follow from what is
published, one of the two comes out bit for bit, unless the sample was in no batch. The runs are as large as they need
be for that.

What is done is kept in `.cache/retraining`, so an interrupted call goes on. Writes `reports/metrics/retraining.csv`: a
row for runs with a published key, for contrast, and one for secret ones.
"""

import argparse
import json
import math
from dataclasses import replace

import pandas as pd
import torch
from shadow_models import judged
from tqdm import tqdm

from splitlab import CACHE, ROOT, load, load_base
from splitlab.core.checkpoint import load as load_tensors
from splitlab.core.checkpoint import load_json, save_json
from splitlab.core.config import reseeded
from splitlab.core.seeds import PUBLISHED, SECRET, generator
from splitlab.core.tables import write_table
from splitlab.data.image_set import digest
from splitlab.dp.finetune import DPConfig, finetune

TABLE, FOLDER = ROOT / "reports/metrics/retraining.csv", CACHE / "retraining"
N, PAIRS = 60, 10
CONFIG = DPConfig(epsilon=10.0, delta=1e-3, batch_size=45, steps=4, physical_batch=60, max_grad_norm=0.05)
SEEDS = ("seed", "published_key")
"""What a record's configuration may name as a seed."""


def weights(folder):
    """All that a run published as weights, in one vector."""
    files = sorted(folder.rglob("*.safetensors"))
    return torch.cat([value.double().flatten() for path in files for value in load_tensors(path)[0].values()])


def trained(name, config, base, data, folder):
    """Fine-tune and return the weights; the folder holds the published files."""
    finetune(name, config, base, data, out=folder / name, cache=folder / "cache")
    return weights(folder / name)


def distances(base, folder, worlds):
    """Train again on either data set; return how far from the published weights each ends, a pair per attempt.

    Attempts are the run as its record says, whose secret draws are new ones, and with every seed as a published key.
    """
    config = json.loads((folder / "run/record.json").read_text())["config"]
    given = DPConfig(**{**config, "classes": tuple(config["classes"])})
    seeds = sorted({config[name] for name in SEEDS if config[name] is not None})
    attempts = dict.fromkeys([given, *(replace(given, seed=seed, published_key=seed) for seed in seeds)])
    released, pairs = weights(folder / "run"), {}
    for again in attempts:
        pairs[again] = [
            (trained(f"again-{number}", again, base, data, folder) - released).norm().item()
            for number, data in enumerate(worlds)
        ]
    return pairs


def attack(base, folder, worlds):
    """Score how much more like the first of two candidate data sets a published run looks; infinite: bit for bit."""
    score = 0.0
    for again, (first, second) in distances(base, folder, worlds).items():
        if (first == 0.0) != (second == 0.0):
            return math.inf if first == 0.0 else -math.inf
        score += 0.0 if again.published_key is None else second - first  # new secret draws tell nothing by distance
    return score


def candidates(pool, number):
    """Return the two data sets of a game: they differ in one sample."""
    order = torch.randperm(len(pool), generator=generator("retraining", number % PAIRS)).tolist()
    place = int(torch.randint(N, (), generator=generator("retraining place", number % PAIRS)))
    return [pool.subset([*order[:place], sample, *order[place : N - 1]]) for sample in order[N - 1 : N + 1]]


def game(base, pool, config, number, folder):
    """Train on one of two data sets that differ in a sample, by a coin; return the coin, and the attack's score."""
    worlds = candidates(pool, number)
    first = bool(torch.rand((), generator=generator("retraining coin", number)) < 0.5)
    trained("run", config, base, worlds[0 if first else 1], folder)
    return first, attack(base, folder, worlds)


def play(base, pool, config, runs, folder):
    """Play the game so many times; return the table's row."""
    scores = {True: [], False: []}
    for number in tqdm(range(runs), desc="runs", mininterval=5):
        run = config if config.published_key is None else reseeded(config, number)
        done = folder / f"game-{digest({'run': run, 'n': N, 'base': base.digest})[:12]}-{number}.json"
        if not done.exists():
            save_json(done, dict(zip(("first", "score"), game(base, pool, run, number, folder), strict=True)))
        first, score = load_json(done).values()
        scores[first].append(score)
    certain = sum(math.isinf(score) for found in scores.values() for score in found)
    found = judged(torch.tensor(scores[True]), torch.tensor(scores[False]))
    return {
        "randomness": SECRET if config.published_key is None else PUBLISHED,
        "epsilon": config.epsilon,
        "delta": config.delta,
        "n": N,
        "steps": config.steps,
        "runs": runs,
        "bit_for_bit": certain,
        "auc": found.auc,
        "auc_std": found.auc_std,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--published-runs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, digits = load_base(ROOT / "models/base"), load(ROOT / "data/private/digits.zip")
    config = replace(CONFIG, classes=tuple(sorted(set(digits.prompts))))
    rows = [
        play(base, digits, replace(config, published_key=0), args.published_runs, FOLDER),
        play(base, digits, config, args.runs, FOLDER),
    ]
    table = pd.DataFrame(rows).round(4)
    write_table(table, TABLE)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
