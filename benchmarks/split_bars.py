"""Print what the attack catalogue reaches on the default grid, bar by bar, from the pipeline's tables and transcripts.

`python benchmarks/split_bars.py` after `dvc repro`; exits 1 if a bar is missed. The bar on pure noise in place of the
observation is a test (`tests/split/attacks/test_attacks.py` and the attacks' own).
"""

import sys

import torch

from splitlab import ROOT, load_base, load_params, load_split, read_transcript
from splitlab.core.tables import read_table
from splitlab.split.attacks.latent_view import labelled
from splitlab.split.config import Adversary
from splitlab.split.server import make_knowledge
from splitlab.split.wire import read_truth
from splitlab.study.results import by_adversary
from splitlab.study.verdicts import pooled

TABLE = read_table(ROOT / "reports/metrics/split_attacks.csv")


def buckets(run, attack, column="psnr_db", denied=()):
    """Bucket's lower end -> value."""
    rows = by_adversary(TABLE[TABLE["run"] == run])[Adversary(attack, denied)]
    return rows.set_index("t_low")[column]


def whole(run, attack):
    """An attack's numbers over all timesteps."""
    return next(pool for pool in pooled(TABLE[TABLE["run"] == run]) if pool["adversary"] == Adversary(attack))


def noise_error(run="shapes-u-shaped"):
    """Relative error of the noise solved for from the returned gradients of a U-shaped run."""
    params = load_params()
    base = load_base(params["base"]["source"])
    transcript = read_transcript(ROOT / "runs" / run / "transcript.safetensors")
    knowledge = make_knowledge(transcript, base, load_split(transcript.header.dataset, "public", params))
    truth = read_truth(ROOT / "runs" / run / "truth.safetensors").noise
    found = labelled(transcript.observations, knowledge).need("noise")
    return float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth))


def bars():
    """Yield (bar, measured, met)."""
    gap = (buckets("shapes-split", "likelihood", "ceiling_psnr_db") - buckets("shapes-split", "likelihood")).max()
    yield "rMLE with the noise within 1 dB of the ceiling in every bucket", f"worst gap {gap:.2f} dB", gap <= 1
    blind = buckets("shapes-split", "likelihood", denied=("noise",))[0]
    step = buckets("shapes-split", "one_step")[0]
    yield "rMLE without the noise above one step at t < 200", f"{blind:.2f} against {step:.2f} dB", blind > step
    error = noise_error()
    yield "U-shaped: relative error of the noise <= 1e-4", f"{error:.1e}", error <= 1e-4
    own = buckets("shapes-u-shaped", "closed_form")
    gap = (buckets("shapes-u-shaped", "closed_form", "ceiling_psnr_db") - own).max()
    yield "U-shaped: image within 0.5 dB of the ceiling", f"worst gap {gap:.2f} dB", gap <= 0.5
    for run, attack in (("survey-shapes-mixing", "unmixing"), ("survey-shapes-patches", "jigsaw")):
        found, raw = whole(run, attack), whole(run, "closed_form")
        says = (
            f"{found['psnr_db']:.1f} dB, top-1 {found['id_top1']:.2f}; raw {raw['psnr_db']:.1f}, {raw['id_top1']:.2f}"
        )
        yield f"{attack} does better than the raw closed form (second)", says, found["id_top1"] > raw["id_top1"]
    run = "survey-shapes-noise-0.3"
    gain = buckets(run, "posterior")[400] - buckets(run, "closed_form")[400]
    yield "one-step posterior over raw inversion, sigma 0.3, t in [400, 600): >= 5 dB", f"{gain:+.1f} dB", gain >= 5
    run = "epochs-shapes-noise-0.3"
    gain = whole(run, "accumulation")["psnr_db"] - whole(run, "posterior")["psnr_db"]
    yield "accumulation over 10 epochs, sigma 0.3: >= 3 dB", f"{gain:+.1f} dB", gain >= 3
    exact = whole("shapes-split", "prompt_inversion")["prompt_exact"]
    yield "prompts from sent text embeddings exact in >= 99 %", f"{exact:.1%}", exact >= 0.99
    hints = whole("shapes-hijack", "hijacking")["hint_id_top1"]
    yield "FSHA identifies >= 50 % by the hint (chance 1 %)", f"{hints:.1%}", hints >= 0.5


def main():
    met = True
    for bar, measured, reached in bars():
        met &= bool(reached)
        print(f"{'met   ' if reached else 'MISSED'}  {bar}: {measured}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
