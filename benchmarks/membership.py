"""Print how well membership is inferred, and whether a duplicated canary is extracted, with and without a guarantee.

`python benchmarks/membership.py [models]` (default 4 per guarantee; more narrow the spread). What is done is kept in
`.cache/membership`, so an interrupted call goes on.
"""

import math
import sys
from dataclasses import replace

import torch
from canaries import extract, insert
from shadow_models import attacks, shadow_losses

from splitlab import CACHE, load_base, load_params, load_split
from splitlab.core.seeds import generator
from splitlab.dp.attacks.membership import log_losses
from splitlab.dp.finetune import DPConfig, finetune
from splitlab.dp.sample import load_tuned, untuned

POOL, COPIES, CANARY = 100, (0, 16), "a photograph of a face"
FOLDER = CACHE / "membership"

RUN = DPConfig(
    trainable="unet",
    embedder=True,
    sample_rate=0.5,
    steps=150,
    lr=3e-3,
    max_grad_norm=0.05,
    ema_decay=0.0,
    delta=1e-3,
    physical_batch=64,
    checkpoint_every=50,
    published_key=0,
)
"""Full fine-tuning on few images for many steps: what forgets privacy the most. δ is below 1 / n for n = 50."""


def membership(base, pool, run, models):
    """Print one guarantee's attacks."""
    losses, member = shadow_losses(run, base, pool, folder=FOLDER, models=models)
    start = log_losses(base, untuned(base, run.conditioning, classes=run.classes), pool)
    for name, found in attacks(losses, member, start, epsilon=run.epsilon, delta=run.delta).items():
        print(
            f"{run.epsilon:>6g}  {name:<27}{found.auc:>6.3f} ± {found.auc_std:.3f}{found.auc_bound:>9.3f}"
            f"{found.tpr:>9.3f} ± {found.tpr_std:.3f}{found.tpr_bound:>9.3f}{found.n_targets:>8}",
            flush=True,
        )


def extraction(base, pool, canary, run):
    """Print what one guarantee makes of a canary that was inserted more or less often."""
    for copies in COPIES:
        data = insert(pool.subset(range(POOL // 2)), canary, copies)
        folder = FOLDER / f"canary-{run.epsilon:g}-{copies}"
        if not folder.exists():
            finetune(folder.name, run, base, data, out=folder, cache=FOLDER)
        found = extract(base, load_tuned(folder), canary, pool.images, generator=generator("canary"), n=32)
        print(f"{run.epsilon:>6g}{copies:>8}{found.ratio:>16.2f}{found.extracted:>12.2f}{found.n:>9}", flush=True)


def main():
    torch.set_num_threads(1)
    models = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    params = load_params()
    base = load_base(params["base"]["source"])
    digits = load_split("digits", "private", params)
    pool = digits.subset(range(POOL))
    faces = load_split("photos", "private", params)
    canary = faces.subset([faces.prompts.index(CANARY)])
    run = replace(RUN, classes=(*sorted(set(digits.prompts)), CANARY))
    runs = [replace(run, epsilon=epsilon) for epsilon in (math.inf, 10.0)]

    print("the key is published, so that the runs repeat: every ε below is simulated")
    print(f"membership: digits, {POOL // 2} members and as many others per model, spread over {models} models")
    print(f"{'ε':>6}  {'attack':<27}{'AUC':>14}{'at most':>9}{'TPR at 1 % FPR':>17}{'at most':>9}{'models':>8}")
    for one in runs:
        membership(base, pool, one, models)
    print(f"\ncanary among {POOL // 2} digits; a ratio below 1 is a copy")
    print(f"{'ε':>6}{'copies':>8}{'smallest ratio':>16}{'extracted':>12}{'samples':>9}")
    for one in runs:
        extraction(base, pool, canary, one)


if __name__ == "__main__":
    main()
