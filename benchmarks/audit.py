"""Print what the audits find: DP-SGD's engine and planted mistakes, and split clients' messages, against their claims.

`python benchmarks/audit.py`; exits 1 if a correct variant is above its claim, or a mistake at ε = 1 goes unnoticed.
"""

import sys
import time

import torch
from message_audit import audit_message

from splitlab import ROOT, load_base, load_params, load_split
from splitlab.diffusion.base import Encoded
from splitlab.privacy.accounting import composed_mu, noise_multiplier_for
from splitlab.privacy.audit import audit
from splitlab.split.config import Defences
from splitlab.split.privacy import matched_message_event, message_events

sys.path.insert(0, str(ROOT / "tests"))
from world.planted import VARIANTS

DELTA, RATE, STEPS, DRAWS, SEEDS = 1e-5, 0.1, 50, 4, 5

SETTINGS = {
    "σ1 0.3, floor 0": {"feature_noise": 0.3, "hint_noise": 0.3},
    "σ1 1, floor 0": {"feature_noise": 1.0, "hint_noise": 1.0},
    "σ1 1, floor 800": {"feature_noise": 1.0, "hint_noise": 4.0, "timestep_floor": 800},
    "σ1 3, floor 600": {"feature_noise": 3.0, "hint_noise": 8.0, "timestep_floor": 600},
    "σ1 8, once": {"feature_noise": 8.0, "hint_noise": 8.0, "per_image_noise": True},
}


def engines() -> bool:
    """Audit DP-SGD and every planted mistake at two claims."""
    good = True
    print(f"DP-SGD: q {RATE}, {STEPS} steps, K {DRAWS}, δ {DELTA:g}, 1000 canaries, 95 %, {SEEDS} seeds")
    print(f"{'variant':<18}{'claimed ε':>10}{'σ':>8}{'ε ≥ (mean)':>12}{'min':>7}{'max':>7}{'above':>8}{'s':>7}")
    for claim in (1.0, 8.0):
        sigma = noise_multiplier_for(claim, delta=DELTA, sample_rate=RATE, steps=STEPS)
        for name, how in VARIANTS.items():
            began = time.perf_counter()
            setting = {"sample_rate": RATE, "steps": STEPS, "delta": DELTA, "multiplicity": DRAWS}
            found = [audit(sigma, **setting, seed=seed, **how).lower_bound for seed in range(SEEDS)]
            seconds = (time.perf_counter() - began) / SEEDS
            above = sum(one > claim for one in found)
            good &= above == 0 if name == "correct" else claim > 1 or above == SEEDS
            print(
                f"{name:<18}{claim:>10g}{sigma:>8.3f}{sum(found) / SEEDS:>12.2f}{min(found):>7.2f}{max(found):>7.2f}"
                f"{f'{above}/{SEEDS}':>8}{seconds:>7.2f}"
            )
    return good


def neighbours(data: Encoded, norm: float, share: float, *, same_hint: bool) -> Encoded:
    """Return a real image and hint and their opposites, at that share of the distance that the norm allows."""
    image, hint = (x / x.norm() * norm * share for x in (data.latents[:1], data.hint_latents[:1]))
    hints = torch.cat([hint, hint if same_hint else -hint])
    return Encoded(torch.cat([image, -image]), hints, data.text[:1].repeat(2, 1, 1))


def clients() -> bool:
    """Audit messages of the matched client on the shipped base, latents clipped to the median norm of public ones.

    Where the claim is so large that messages are never confused, the audit takes neighbours nearer to each other: μ is
    proportional to their distance, and the bound is scaled back.
    """
    params = load_params()
    base = load_base(params["base"]["source"])
    public = load_split("shapes", "public", params).subset(range(64))
    data = Encoded(base.encode(public.images), base.encode(public.hints), base.encode_prompts(public.prompts))
    norm = float(data.latents.flatten(1).norm(dim=1).median())
    good = True
    print(f"\nmatched client, shapes, latents clipped to the median norm {norm:.1f}; 4000 messages of each neighbour")
    print(f"{'setting':<18}{'σ hint':>7}{'μ image':>10}{'audited ≥':>11}{'μ both':>9}{'audited ≥':>11}")
    for name, setting in SETTINGS.items():
        defences = Defences(latent_norm=norm, matched=True, hide_prompts=True, **setting)
        image, row = matched_message_event(defences, base.alphas_cumprod, norm=norm), []
        for events in ((image,), message_events(defences, base.alphas_cumprod)):
            claimed = composed_mu(events)
            share = min(1.0, 3.0 / claimed)
            pair = neighbours(data, norm, share, same_hint=len(events) == 1)
            row += [claimed, audit_message(base, defences, pair) / share]
            good &= row[-1] <= claimed
        print(
            f"{name:<18}{defences.hint_noise:>7g}{row[0]:>10.2f}{row[1]:>11.2f}{row[2]:>9.2f}{row[3]:>11.2f}",
            flush=True,
        )
    return good


def main() -> None:
    torch.set_num_threads(1)
    results = [engines(), clients()]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
