"""What a share of DP-LDM gives away: `python benchmarks/dp_shares.py [--targets 100] [--only candidates run images]`.

A client trains the base's attention on one digit and sends its gradient clipped and noised, at settings whose ε is
stated; who sent it, among 100 (chance 1 %)? *candidates*: whoever holds the 100, told timestep and noise, by
likelihood: the ceiling for every attack on one share. *run*: the same from all the shares of one client over a run.
*images*: the attacks of the catalogue, which hold no candidates; the image nearest to their reconstruction. A batch of
one is the worst case: whoever knows the other images of a larger one subtracts them.

Writes `reports/metrics/dp_shares.csv`, those parts anew; single attacks are kept in `.cache/dp_shares`, so an
interrupted call goes on.
"""

import argparse
import math
import time
from functools import lru_cache

import pandas as pd
import torch
from scipy.stats import binomtest

from splitlab import CACHE, ROOT, load_base, load_params, load_split
from splitlab.core.checkpoint import load_json, save_json
from splitlab.core.errors import InputError
from splitlab.core.seeds import PUBLISHED, generator
from splitlab.core.tables import read_timed, write_table
from splitlab.data.image_set import digest
from splitlab.diffusion.base import encoded
from splitlab.diffusion.metrics import draw_galleries, identified, ssim
from splitlab.federated.attacks import INVERSIONS
from splitlab.federated.attacks.candidates import candidate_shares, flattened, likeliest, log_likelihoods
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.private_client import private_update
from splitlab.federated.update import UpdateTruth
from splitlab.privacy.accounting import PrivacyEvent, epsilon, noise_multiplier_for
from splitlab.privacy.mechanisms import add_noise

CANDIDATES, DRAWS, DELTA = 100, 20, 1e-5
BATCH, STEPS, BOUND, FROM = 400, 60, 0.05, 3
"""A run's batch, steps, clip norm C and first trained transformer."""
FOLDER = CACHE / "dp_shares"
TABLE = ROOT / "reports/metrics/dp_shares.csv"
RUN_TARGETS = 5
"""Targets of a whole run, each of which takes as many sets of candidates' gradients as there are rounds."""
CHUNK = 20
"""Updates that are inverted side by side."""

KNOWN = ("timesteps", "noise", "text")
ATTACKS = (
    ("attention", "timesteps", (), {}),
    ("attention", "known_noise", KNOWN, {"n_evals": 40}),
    ("attention", "gidm", KNOWN, {"latent_evals": 0, "pixel_evals": 10}),
    ("unet", "timesteps", (), {}),
    ("unet", "unknown_noise", ("timesteps", "text"), {"n_starts": 1, "n_evals": 150}),
)
"""Trained set, attack, what it is granted, its options. The whole U-Net is there because attention alone gives
the catalogue little even without noise."""
BARE = 20
"""Targets of the rows without noise, which are there for contrast."""


def spent(sigma, rate, steps):
    """ε of so many releases."""
    if not sigma:
        return math.inf
    return epsilon([PrivacyEvent("gaussian", sigma, rate, steps, "add_remove_one")], DELTA)


@lru_cache
def settings(n):
    """Return (trust, ε of the run, σ, sampling rate, rounds) of every setting.

    Central: the server or secure aggregation noises a Poisson batch's sum and hides who took part, so that sampling
    amplifies. Local: the server sees whose share it is, so each of a client's rounds counts in full.
    """
    rate, rounds = BATCH / n, math.ceil(BATCH / n * STEPS)
    found = [("none", math.inf, 0.0, rate, STEPS)]
    for target in (1000.0, 100.0, 10.0, 1.0):
        sigma = noise_multiplier_for(target, delta=DELTA, sample_rate=rate, steps=STEPS)
        found.append(("central", target, sigma, rate, STEPS))
    for target in (100.0, 10.0):
        sigma = noise_multiplier_for(target, delta=DELTA, sample_rate=1.0, steps=rounds)
        found.append(("local", target, sigma, 1.0, rounds))
    found.append(("local, one round", 10.0, noise_multiplier_for(10.0, delta=DELTA, sample_rate=1.0, steps=1), 1.0, 1))
    return found


def drawn(base, latents, index, round_):
    """Return the timestep and the noise that a client draws."""
    draw = generator("dp shares", index, round_)
    return int(torch.randint(base.n_timesteps, (), generator=draw)), torch.randn(latents.shape[1:], generator=draw)


def sent(base, latents, text, index, round_, *, sigma=0.0, trainable="attention"):
    """Be the client: its share of one image, and what it drew."""
    timestep, noise = drawn(base, latents, index, round_)
    truth = UpdateTruth(latents[index][None], torch.tensor([timestep]), noise[None], text[index][None])
    share = private_update(
        base.unet,
        truth,
        alphas_cumprod=base.alphas_cumprod,
        max_grad_norm=BOUND,
        noise_multiplier=sigma,
        generator=generator("dp share", index, round_, sigma, trainable),
        trainable=trainable,
        from_block=0 if trainable == "unet" else FROM,
    )
    return share, truth


def named(base, latents, text, gallery_indices, index, rounds):
    """Attack one client's shares of `rounds` rounds by likelihood; hits per setting, over draws of the noise."""
    scores = {}
    for round_ in range(rounds):
        share, truth = sent(base, latents, text, index, round_)
        rows = candidate_shares(
            base.unet,
            latents[gallery_indices],
            text[gallery_indices],
            timestep=int(truth.timesteps),
            noise=truth.noise[0],
            alphas_cumprod=base.alphas_cumprod,
            max_grad_norm=BOUND,
            trainable="attention",
            from_block=FROM,
        )
        bare = flattened(share).expand(DRAWS, -1)
        for number, (_, _, sigma, _, _) in enumerate(settings(len(latents))):
            draw = generator("dp share's noise", index, round_, number)
            noisy = add_noise({"share": bare}, std=sigma * BOUND, generator=draw)["share"]
            scores[number] = scores.get(number, 0.0) + log_likelihoods(noisy, rows, std=sigma * BOUND)
    return [int((likeliest(values) == 0).sum()) for values in scores.values()]  # the own image is the first


def candidates(base, latents, text, gallery_indices, indices, *, rounds, name):
    """Yield rows of the ideal attacker: one share per client, or all of a run."""
    hits, key = [], digest({"facts": (settings(len(latents)), DRAWS, BOUND, FROM, base.digest)})[:12]
    for line, index in zip(gallery_indices, indices, strict=True):
        path = FOLDER / f"{name}-{index}-{key}.json"
        if not path.exists():
            began = time.process_time()
            found = named(base, latents, text, line, index, rounds)
            save_json(path, {"hits": found, "cpu_s": time.process_time() - began})
            print(f"{name} {len(hits) + 1}/{len(indices)}: {found}", flush=True)
        hits.append(load_json(path))
    for number, setting in enumerate(settings(len(latents))):
        if rounds > 1 and setting[4] == 1:
            continue  # a guarantee for one round says nothing about so many
        count = sum(one["hits"][number] for one in hits)
        yield row(
            setting,
            "holds the candidates",
            "timesteps + noise + candidates",
            "attention",
            shares=rounds,
            n=len(indices),
            draws=DRAWS,
            hits=count,
            cpu_s=sum(one["cpu_s"] for one in hits) / len(indices),
        )


def row(setting, attack, knowledge, trainable, **found):
    """Return one row of the table; without hits, the attack has no images or was refused."""
    trust, target, sigma, rate, steps = setting
    result = {"attack": attack, "knowledge": knowledge, "trainable": trainable, "noise": trust, "epsilon": target}
    result |= {"randomness": PUBLISHED}
    result |= {"delta": DELTA, "epsilon_share": round(spent(sigma, 1.0, 1), 3), "noise_multiplier": round(sigma, 4)}
    result |= {"sample_rate": round(rate, 4), "steps": steps, "max_grad_norm": BOUND}
    result |= {key: found[key] for key in ("shares", "n", "draws")}
    result |= {"identified": None, "low": None, "high": None, "chance": 1 / CANDIDATES}
    if found["hits"] is not None:
        trials = found["n"] * found["draws"]
        interval = binomtest(found["hits"], trials).proportion_ci(method="wilson")
        result |= {"identified": found["hits"] / trials, "low": round(interval.low, 4), "high": round(interval.high, 4)}
    return result | {
        "ssim": found.get("similarity"),
        "timestep_exact": found.get("exact"),
        "cpu_s": round(found["cpu_s"], 2),
        "refused": found.get("refused"),
    }


def images(base, data, latents, text, gallery_indices, indices):
    """Yield rows of the catalogue's attacks, with the trained set of DP-LDM and with the whole U-Net."""
    chosen = {(s[0], s[1]): s for s in settings(len(latents))}
    for trainable, attack, grant, options in ATTACKS:
        for setting in (chosen["none", math.inf], chosen["central", 10.0]):
            few = indices if setting[2] and attack != "gidm" else indices[:BARE]
            key = digest({"facts": (attack, grant, options, trainable, setting, few, base.digest)})[:12]
            path = FOLDER / f"{attack}-{trainable}-{key}.json"
            if not path.exists():
                shares = [sent(base, latents, text, i, 0, sigma=setting[2], trainable=trainable) for i in few]
                found = inverted(base, data, shares, gallery_indices[: len(few)], attack, grant, options)
                save_json(path, found)
                print(trainable, setting[:2], attack, found, flush=True)
            yield row(setting, attack, " + ".join(grant) or "the share", trainable, **load_json(path))


def inverted(base, data, shares, gallery_indices, attack, grant, options):
    """Run one attack of the catalogue on all shares, some side by side; what it found, as `row` takes it."""
    result = {"shares": 1, "n": len(shares), "draws": 1, "hits": None}
    pictures, exact, began = [], 0, time.process_time()
    for first in range(0, len(shares), CHUNK):
        part = shares[first : first + CHUNK]
        facts = {name: torch.cat([getattr(truth, name) for _, truth in part]) for name in grant}
        known = InversionKnowledge(base.unet, base.alphas_cumprod, base, batch_size=1, **facts)
        draw, updates = generator("dp shares attack", attack, first), [update for update, _ in part]
        try:
            if attack == "timesteps":
                found = [
                    INVERSIONS[attack].function(update, known, generator=draw, **options).timesteps
                    for update in updates
                ]
                exact += sum(torch.equal(one, truth.timesteps) for one, (_, truth) in zip(found, part, strict=True))
            else:
                pictures.append(INVERSIONS[attack].function(updates, known, generator=draw, **options).images)
        except InputError as error:
            return result | {"cpu_s": 0.0, "refused": str(error)}
    result |= {"cpu_s": (time.process_time() - began) / len(shares)}
    if attack == "timesteps":
        return result | {"exact": exact / len(shares)}
    reached, own = torch.cat(pictures), data.images[gallery_indices[:, 0]]
    hits = int(identified(reached, data.images, gallery_indices).sum())
    return result | {"hits": hits, "similarity": round(float(ssim(reached, own).mean()), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=["candidates", "run", "images"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    params = load_params()
    base, data = load_base(params["base"]["source"]), load_split("digits", "private", params)
    latents, text = encoded(base, data, cache=CACHE).latents, base.encode_prompts(data.prompts)
    indices = list(range(given.targets))
    gallery_indices = draw_galleries(len(data), torch.tensor(indices), CANDIDATES, generator("dp shares line-up"))
    rounds, few = settings(len(data))[-2][4], indices[:RUN_TARGETS]
    parts = {
        "candidates": lambda: candidates(base, latents, text, gallery_indices, indices, rounds=1, name="one"),
        "run": lambda: candidates(base, latents, text, gallery_indices[: len(few)], few, rounds=rounds, name="run"),
        "images": lambda: images(base, data, latents, text, gallery_indices, indices),
    }
    done = given.only or list(parts)
    table = pd.DataFrame([{"part": name} | found for name in done for found in parts[name]()])
    print(table.to_string(index=False))
    if TABLE.exists():  # the other parts stay as they were
        before = read_timed(TABLE).dropna(axis="columns", how="all")
        table = pd.concat([before[~before["part"].isin(done)], table]).sort_values("part", kind="stable")
    write_table(table, TABLE)


if __name__ == "__main__":
    main()
