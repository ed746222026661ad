"""What mixing by secret keys and shuffling by secret permutations hide: one key for all messages, or a fresh one each.

`python benchmarks/secret_keys.py [--dataset shapes photos] [--messages 16]` records 16 messages of 32 samples of every
setting (n = 512, chance 1 % among 100), attacks them with the attack that is made for it and all public data, and
writes `reports/metrics/secret_keys.csv`, where rows of another data set stay. The closed form is the raw view, without
undoing anything; `mean_public` has no information. Mixed samples are matched to private ones within their group by best
assignment, for every attack alike. One attacker seed; hidden prompts. What was attacked stays in `.cache/secret_keys`.
"""

import argparse

import pandas as pd

from splitlab import CACHE, ROOT, Defences, TrainConfig, load_base, load_params, load_split, read_transcript
from splitlab.core.checkpoint import save_json
from splitlab.core.tables import read_table, write_table
from splitlab.data.image_set import digest
from splitlab.split.artefacts import load_reconstruction
from splitlab.split.config import AttackSpec
from splitlab.split.server import attack_and_save
from splitlab.split.train import record
from splitlab.study.config import EvaluateConfig
from splitlab.study.scoring import run_truth, score_samples

SETTINGS = {
    "16 mixed, one key": (Defences(key_mixing=16, hide_prompts=True), "unmixing"),
    "16 mixed, fresh keys": (Defences(key_mixing=16, fresh_keys=True, hide_prompts=True), "unmixing"),
    "2x2 patches, one permutation": (Defences(patch_shuffle=2, hide_prompts=True), "jigsaw"),
    "2x2 patches, fresh permutations": (Defences(patch_shuffle=2, fresh_keys=True, hide_prompts=True), "jigsaw"),
}
TABLE = ROOT / "reports/metrics/secret_keys.csv"


def rows_of(name, dataset, messages, base, params):
    """Yield one row per attack on one setting."""
    defences, attack = SETTINGS[name]
    config = TrainConfig(dataset=dataset, defences=defences, record_messages=messages, published_key=0)
    folder = CACHE / "secret_keys" / digest({"config": config, "base": base.digest})[:16]
    private, public = (load_split(dataset, split, params) for split in ("private", "public"))
    files = {what: folder / f"{what}.safetensors" for what in ("transcript", "truth")}
    if not (folder / "record.json").exists():
        record(name, config, base, private, cache=CACHE, **files)
        save_json(folder / "record.json", {"run": name, "config": vars(config) | {"defences": vars(defences)}})
    transcript, known = read_transcript(files["transcript"]), run_truth(folder, base, private)
    for one in ("closed_form", attack, "mean_public"):
        if not (folder / f"{one}-0.safetensors").exists():
            attack_and_save(transcript, AttackSpec(one), 0, base, public, out=folder, cache=CACHE)
        saved = load_reconstruction(folder / f"{one}-0.safetensors")
        scores = score_samples(saved, known, EvaluateConfig(), localise=False)
        yield {
            "dataset": dataset, "setting": name, "defences": str(defences), "attack": one,
            "psnr_db": scores["psnr_db"].mean().item(), "id_top1": scores["identified"].mean().item(),
            "id_chance": 1 / EvaluateConfig().candidates, "n": len(known.truth.indices),
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="*", default=["shapes", "photos"])
    parser.add_argument("--messages", type=int, default=16)
    args = parser.parse_args()
    params = load_params()
    base = load_base(params["base"]["source"])
    kept = read_table(TABLE).to_dict("records") if TABLE.exists() else []
    rows = [row for row in kept if row["dataset"] not in args.dataset]
    for dataset in args.dataset:
        for name in SETTINGS:
            for row in rows_of(name, dataset, args.messages, base, params):
                rows.append(row)
                print(pd.Series(row).to_string(), flush=True)
            write_table(pd.DataFrame(rows).round(4), TABLE)


if __name__ == "__main__":
    main()
