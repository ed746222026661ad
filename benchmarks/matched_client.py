"""What hint protection costs and stops: control after training, identification by image, hint and both.

`python benchmarks/matched_client.py [--dataset shapes] [--steps 900] [--seeds 3] [--only NAME ...] [--attacks-only]`
trains every setting of the data set (`SETTINGS`) with S1's split, once per seed, and attacks one message for each of
100 private images with the strongest attacks of the catalogue. Everything is cached below `.cache/matched_client`, so
that it can be interrupted and repeated; the table goes to `reports/metrics/matched_client.csv`, that of photographs to
`matched_client_photos.csv`.

`id_*`: share identified among the 100, by image, hint and both (`splitlab.identification`), n = 100 x `KEYS` draws of
all noise. `id_*_ideal`: the same by whoever holds the 100 candidates and weighs them by Bayes, a ceiling for every
attack. `control_iou` is at control scale 1, `control_iou_amplified` at `AMPLIFIED`; no control is 0.26 or less, the VAE
0.97. Disguised clients (`splitlab.disguise`) are asked with layouts: `control_iou` under control guidance 1,
`control_iou_guided` under the one (`splitlab.guided`) that is best for 64 public hints, both against the
whole hint; `colour_error*` is the mean absolute error of the ground's colour against the prompt, range 2. `*_seeds`:
seed by seed, for pairing settings.

Photographs: `control_edges*`, agreement of edges with the hint above that with the hint turned
(`splitlab.metrics.edge_control`), always at guidance 1 and at the best for 64 public hints, beside the rows of no
control and of the VAE; `eval_loss`, the denoising loss on held-out photographs.
"""

import argparse
from dataclasses import replace
from functools import cache

import pandas as pd
import torch
from tqdm import tqdm

from splitlab import CACHE, ROOT, Defences, TrainConfig, load, load_base, n_workers
from splitlab.abreast import abreast
from splitlab.artefacts import read_table
from splitlab.attacks import run_attack
from splitlab.attacks.channel import averaged, labelled, latent_view
from splitlab.attacks.closed_form import hint_latents, public_hints
from splitlab.base import encoded
from splitlab.checkpoint import load_json, save_json
from splitlab.controlnet import LatentHintControlNet, control_pipeline
from splitlab.data import digest
from splitlab.disguise import (
    asked_layout,
    colours_of,
    disguised,
    disguises,
    every_turn,
    in_colours,
    layout,
    sent_layout,
)
from splitlab.evaluate import without_control
from splitlab.guided import generate_guided
from splitlab.identification import identified_as_sent, identified_by_likelihood
from splitlab.metrics import disc_iou, edge_control, psnr_db
from splitlab.recolour import VARIANTS, recolour, recoloured
from splitlab.seeds import Key, generator
from splitlab.split import client_send
from splitlab.tables import write_table
from splitlab.train import make_clients, train
from splitlab.types import Knowledge
from splitlab.wire import from_bytes

MATCHED = Defences(feature_noise=1.0, matched=True, hide_prompts=True)
HIGH = replace(MATCHED, timestep_floor=800)
COARSE = replace(HIGH, coarse_hints=3)
DISGUISED = Defences(feature_noise=1.0, matched=True, timestep_floor=800, borrowed_colours=True, layout_noise=0.2)
TURNED = replace(DISGUISED, timestep_floor=700, layout_noise=0.12, turned=True)
TURNED_ONCE = replace(
    TURNED, noise_once=True, feature_noise=6.0, timestep_floor=500, layout_noise=0.1, latent_norm=36.0
)

# name -> the client's defences, and whether it recolours its images in secret first
SETTINGS = {
    "none": (Defences(), False),
    "matched-0.3": (Defences(feature_noise=0.3, matched=True), False),
    "matched-1": (Defences(feature_noise=1.0, matched=True), False),
    "naive-0.3": (Defences(feature_noise=0.3), False),
    "floor-800": (HIGH, False),
    "hint-4": (replace(HIGH, hint_noise=4.0), False),
    "coarse": (COARSE, False),
    "coarse-1.2": (replace(COARSE, hint_noise=1.2), False),
    "coarse-1.8": (replace(COARSE, hint_noise=1.8), False),
    "coarse-2.5": (replace(COARSE, hint_noise=2.5), False),
    "coarse-1.8-once": (
        replace(COARSE, hint_noise=1.8, feature_noise=7.0, noise_once=True, timestep_floor=600, latent_norm=36.0),
        False,
    ),
    "strict": (replace(COARSE, hint_noise=2.5, feature_noise=2.0), False),
    "recoloured-two-1.2": (replace(HIGH, coarse_hints=2, hint_noise=1.2), True),
    "recoloured-1.8": (replace(COARSE, hint_noise=1.8), True),
    "recoloured-2.5": (replace(COARSE, hint_noise=2.5), True),
    "recoloured-700-2.5": (replace(COARSE, hint_noise=2.5, timestep_floor=700), True),
    "disguised": (DISGUISED, False),
    "turned": (TURNED, False),
    "turned-once": (TURNED_ONCE, False),
}
STEPS = {"turned-once": 600}
"""Other numbers of steps than `--steps`: noise that was drawn once is learned by heart after more."""
PHOTOS = {name: SETTINGS[name] for name in ("none", "matched-0.3", "matched-1", "naive-0.3", "coarse-2.5")} | {
    "floor-400": (replace(MATCHED, timestep_floor=400), False),
    "floor-600": (replace(MATCHED, timestep_floor=600), False),
    "hint-0.5": (replace(MATCHED, hint_noise=0.5), False),
    "hint-1": (replace(MATCHED, hint_noise=1.0), False),
}
DATASETS = {
    "shapes": (SETTINGS, "control_iou", (1.0, 2.0, 4.0, 8.0, 16.0)),
    "photos": (PHOTOS, "control_edges", (1.0, 2.0, 4.0)),
}
"""Data set -> its settings, how control is measured, and the guidances along the control that are tried."""
PUBLIC_ONLY = "(public data only)"
"""Name of the row of a ControlNet that was trained without defence on public data: what private data must add to."""
ATTACKS = {"closed_form": {}, "posterior": {}, "nearest_public": {}, "adaptive_network": {}}
AGAINST_DISGUISES = {"undisguise": {}}
TOGETHER = {"accumulation": {}}
N, KEYS = 100, 3
AMPLIFIED = 3.0
FOLDER = CACHE / "matched_client"


def table_path(dataset):
    return ROOT / f"reports/metrics/matched_client{'' if dataset == 'shapes' else '_' + dataset}.csv"


def read(dataset, split):
    return load(ROOT / f"data/{split}/{dataset}.zip")


def training_set(name, dataset, hidden):
    data = read(dataset, "public" if name == PUBLIC_ONLY else "private")
    return recoloured(data, key=Key.published("private")) if hidden else data


def trained(name, dataset, steps, seed, base):
    """Train one cell, or read what was trained before: how well it is controlled, by the way it is asked for."""
    defences, hidden = DATASETS[dataset][0].get(name, (Defences(), False))
    config = TrainConfig(
        dataset=dataset, defences=defences, steps=steps, seed=seed, published_key=seed, record_messages=1
    )
    out = FOLDER / f"{name}-{digest({'config': config, 'base': base.digest, 'hidden': hidden})[:12]}"
    heldout = read(dataset, "heldout")
    if not (out / "record.json").exists():
        train(name, config, base, training_set(name, dataset, hidden), heldout, out=out, cache=CACHE)
    if dataset != "shapes":
        return guided(out, config, base) | {"eval_loss": load_json(out / "record.json")["eval_loss"]}
    if disguises(defences):
        return guided(out, config, base)
    if not (out / "amplified.json").exists():
        model = LatentHintControlNet.from_pretrained(out / "controlnet").eval()
        asked = heldout.subset(range(config.eval_samples))
        with torch.no_grad():
            pictures = control_pipeline(base, model)(
                prompt=list(asked.prompts),
                image=(asked.hints + 1) / 2,
                height=asked.size,
                width=asked.size,
                num_inference_steps=25,
                guidance_scale=2.0,
                generator=generator(seed, "generate"),
                controlnet_conditioning_scale=AMPLIFIED,
                output_type="pt",
            ).images
        save_json(out / "amplified.json", {"control_iou": disc_iou(pictures * 2 - 1, asked.hints).mean().item()})
    amplified = load_json(out / "amplified.json")["control_iou"]
    return {"control_iou": load_json(out / "record.json")["control_iou"], "control_iou_amplified": amplified}


def guided(out, config, base):
    """Ask for public hints at every guidance and for held-out ones at the best of these, and at 1."""
    _, measure, guidances = DATASETS[config.dataset]
    if not (out / "guided.json").exists():
        public, heldout = (read(config.dataset, split) for split in ("public", "heldout"))
        model = LatentHintControlNet.from_pretrained(out / "controlnet").eval()
        tried = {g: follows(model, public.subset(range(config.eval_samples)), g, config, base) for g in guidances}
        best = max(tried, key=lambda g: tried[g][measure])
        asked = heldout.subset(range(config.eval_samples))
        scores = {"guidance": best, "public": {f"{g:g}": found[measure] for g, found in tried.items()}}
        save_json(out / "guided.json", scores | {str(g): follows(model, asked, g, config, base) for g in {1.0, best}})
    scores = load_json(out / "guided.json")
    plain, best = scores["1.0"], scores[str(scores["guidance"])]
    return plain | {f"{key}_guided": value for key, value in best.items()} | {"guidance": scores["guidance"]}


def follows(model, asked, control, config, base):
    """Generate for hints under guidance: how well the whole hints are followed, and the colours that prompts name."""
    hints = asked_layout(asked.hints, config.defences.layout_noise, control=control)
    draw = generator(config.seed, "generate")
    pictures = generate_guided(base, model, asked.prompts, hints, control=control, generator=draw)
    return score(pictures, asked, config.dataset)


def score(pictures, asked, dataset):
    if dataset != "shapes":
        return {"control_edges": edge_control(pictures, asked.hints).mean().item()}
    return {
        "control_iou": disc_iou(pictures, asked.hints).mean().item(),
        "colour_error": colour_error(pictures, asked),
    }


def colour_error(pictures, asked):
    """Mean absolute error of the border's median colour against the ground that the prompt names, of a range of 2."""
    border = torch.cat([pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0], pictures[:, :, :, -1]], 2)
    _, ground = colours_of(asked.prompts)
    return (border.median(2).values - ground[..., 0, 0]).abs().mean().item()


def attacked(name, dataset, base, messages=1):
    """Attack so many messages per private image; rows of attacks, strongest first, with the ideal attacker's shares.

    Of several messages, only the attack that puts them together is run: the others do no better than on one.
    """
    defences, hidden = DATASETS[dataset][0][name]
    adapted = AGAINST_DISGUISES if disguises(defences) else {}
    attacks = ATTACKS | adapted if messages == 1 else adapted or TOGETHER
    facts = {"defences": defences, "hidden": hidden, "base": base.digest, "attacks": ATTACKS, "n": N, "keys": KEYS}
    facts |= {"dataset": dataset} if dataset != "shapes" else {}
    facts |= {"attacks": attacks, "messages": messages} if messages > 1 else {}
    path = FOLDER / f"attacks-{name}-{digest(facts)[:12]}.json"
    if path.exists():
        return load_json(path)["rows"]
    private = candidates(dataset)
    sent, owners, prompts = sent_by_clients(private, dataset, defences, hidden, base, messages)
    public = read(dataset, "public")
    public = recoloured(public, key=Key.published("public")) if hidden else public
    knowledge = Knowledge(base, "split", defences, private.size, public, cache=CACHE)
    if disguises(defences):
        ideal = ideal_shares_disguised(sent, knowledge, private, prompts, owners)
    else:
        ideal = ideal_shares(sent, knowledge, private, hidden, owners)
    rows, named = [], tuple(prompts[owner] for owner in owners)
    for attack, options in attacks.items():
        found = run_attack(attack, sent, knowledge, generator=generator("attack", attack), options=options)
        known = identified_as_sent(found.images, found.hints, private, named, line_ups()[owners], defences)
        row = {f"id_{way}": share.float().mean().item() for way, share in known.items()}
        psnr = psnr_db(found.images, private.images[owners % N]).mean().item()
        rows.append({"attack": attack, **row, "id_worst": max(row.values()), "psnr_db": psnr, **ideal, "n": KEYS * N})
    rows.sort(key=lambda row: -row["id_worst"])
    save_json(path, {"rows": rows})
    return rows


def candidates(dataset):
    """The private samples whose messages are attacked: shapes stand in random order, photographs by original."""
    private = read(dataset, "private")
    chosen = range(N)
    if dataset != "shapes":
        chosen = torch.randperm(len(private), generator=generator("candidates", dataset))[:N].tolist()
    return private.subset(chosen)


def sent_by_clients(private, dataset, defences, hidden, base, messages):
    """Be `KEYS` clients with other secrets and the same images.

    Returns what they send, in as many messages per image; whose each sample is, owners `[n]` in [0, KEYS x N); and the
    prompt of every owner.
    """
    sent, owners, prompts = [], [], []
    for key in range(KEYS):
        config = TrainConfig(dataset=dataset, defences=defences, batch_size=N // 2, seed=key, published_key=key)
        own = recoloured(private, key=Key.published(("private", key))) if hidden else private
        (client,) = make_clients(base, own, config, cache=CACHE)
        for step in range(2 * messages):
            message, truth = client_send(client, step, N // 2)
            sent.append(replace(from_bytes(message), client=key))
            owners.append(truth.indices + key * N)
        prompts += disguised(own, defences, key=Key.published(key)).prompts
    return sent, torch.cat(owners), prompts


def line_ups():
    """The candidates for every owner, the own image first."""
    order = [torch.cat([torch.tensor([i]), torch.tensor([j for j in range(N) if j != i])]) for i in range(N)]
    return torch.stack(order * KEYS)


def ideal_shares(sent, knowledge, private, hidden, owners):
    """Identification by who holds the candidates and knows which messages show one image: by image, hint and both."""
    seen, base, once = labelled(sent, knowledge), knowledge.base, knowledge.defences.noise_once
    view, std = latent_view(seen, knowledge)
    data = encoded(base, private, cache=CACHE)
    variants = range(len(VARIANTS)) if hidden else (0,)
    gallery = torch.stack([base.encode(recolour(private.images, one)) for one in variants], 1)
    hints = hint_latents(seen, sent, knowledge)
    view, std = averaged(view, std.clamp_min(0.01), owners, once=once)
    noise = torch.full((len(hints), 1, 1, 1), max(knowledge.defences.hint_noise, 0.01))
    hints, noise = averaged(hints, noise, owners, once=once)
    image = (view, std.flatten(), gallery)
    hint = (hints, noise.flatten(), public_hints(data.hint_latents, knowledge)[:, None])
    ways = {"image": [image], "hint": [hint], "both": [image, hint]}
    return {f"id_{k}_ideal": identified_by_likelihood(v, line_ups()).float().mean().item() for k, v in ways.items()}


def ideal_shares_disguised(sent, knowledge, private, prompts, owners):
    """The same where clients disguise themselves: every candidate in the colours that the messages' prompt names."""
    seen, base, noise = labelled(sent, knowledge), knowledge.base, knowledge.defences.layout_noise
    view, std = latent_view(seen, knowledge)
    hints, _ = averaged(hint_latents(seen, sent, knowledge), torch.ones_like(std), owners, once=True)
    view, std = averaged(view, std, owners, once=knowledge.defences.noise_once)
    turned, line_up = knowledge.defences.turned, line_ups()
    layouts = layout(in_turns(private.hints, turned).flatten(0, 1)).double().unflatten(0, (-1, N))
    gallery = in_disguise(base, private, tuple(prompts), turned)
    errors = torch.stack([(one - could).square().sum((2, 3, 4)) for one, could in zip(view, gallery, strict=True)])
    image = -errors.double() / (2 * std.double().square().flatten(1)[..., None])
    image = image.transpose(1, 2)[torch.arange(len(image))[:, None], line_up]
    shown = sent_layout(base.decode(hints), noise).double()
    hint = -(shown[:, None, None] - layouts.transpose(0, 1)[line_up]).square().sum(3) / (2 * noise**2)
    ways = {way: v.logsumexp(2) for way, v in {"image": image, "hint": hint, "both": image + hint}.items()}
    return {f"id_{k}_ideal": (v[:, 0] > v[:, 1:].max(1).values).float().mean().item() for k, v in ways.items()}


def in_turns(pictures, turned):
    """Pictures as they are, or in all symmetries of the square: `[r, m, c, h, w]`."""
    return every_turn(pictures) if turned else pictures[None]


@cache
def galleries():
    """What `in_disguise` has encoded so far."""
    return {}


def in_disguise(base, private, prompts, turned):
    """The latents of all candidates, in all turns, in the colours that each prompt names: `[n, r, m, c, h, w]`."""
    if (prompts, turned) not in galleries():
        pictures = in_turns(private.images, turned)
        asked = list(private.prompts) * len(pictures)
        every = tqdm(prompts, desc="candidates in disguise", leave=False)
        encoded = [base.encode(in_colours(pictures.flatten(0, 1), asked, [prompt] * len(asked))) for prompt in every]
        galleries()[prompts, turned] = torch.stack(encoded).unflatten(1, pictures.shape[:2])
    return galleries()[prompts, turned]


def row_of(name, dataset, base, args):
    settings, _, _ = DATASETS[dataset]
    defences, hidden = settings[name]
    row = {"setting": name, "defences": str(defences) + (" recoloured" if hidden else "")}
    return row | utility_of(name, dataset, base, args) | {"id_chance": 1 / N} | attacked(name, dataset, base)[0]


def steps_of(name, args):
    return STEPS.get(name, args.steps)


def utility_of(name, dataset, base, args):
    """Mean, spread and single values of the control over training seeds."""
    steps, seeds = steps_of(name, args), range(0 if args.attacks_only else args.seeds)
    ious = [trained(name, dataset, steps, seed, base) for seed in seeds]
    row = {"steps": steps}
    for column in ious[0] if ious else (DATASETS[dataset][1],):
        values = pd.Series([one[column] for one in ious], dtype=float)
        row |= {column: values.mean(), f"{column}_std": values.std(ddof=0)}
        row |= {f"{column}_seeds": " ".join(f"{value:.4f}" for value in values)} if "control" in column else {}
    return row | {"n_seeds": len(ious)}


def yardsticks(dataset, base):
    """Rows without any private data: no control at all, and the VAE's own reconstruction."""
    asked = read(dataset, "heldout").subset(range(TrainConfig().eval_samples))
    return [
        {"setting": f"({name})", **score(pictures, asked, dataset)}
        for name, pictures in without_control(base, asked).items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="shapes")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--attacks-only", action="store_true")
    args = parser.parse_args()
    settings, path = DATASETS[args.dataset][0], table_path(args.dataset)
    if unknown := sorted(set(args.only or ()) - set(settings)):
        parser.error(f"no setting is called {', '.join(unknown)}; there: {', '.join(settings)}")
    base = load_base(ROOT / "models/base")
    known = read_table(path).to_dict("records") if path.exists() else []
    rows = {row["setting"]: row for row in known}
    names = args.only or list(settings)
    if not args.attacks_only:
        every = [*names, PUBLIC_ONLY]
        cells = [(name, args.dataset, steps_of(name, args), seed, base) for name in every for seed in range(args.seeds)]
        for _ in abreast(trained, cells, desc="cells trained", workers=n_workers()):
            pass
        rows[PUBLIC_ONLY] = {"setting": PUBLIC_ONLY} | utility_of(PUBLIC_ONLY, args.dataset, base, args)
    rows |= {row["setting"]: row for row in yardsticks(args.dataset, base)}
    order = [*settings, PUBLIC_ONLY, "(no control)", "(VAE ceiling)"]
    for name in names:
        new = row_of(name, args.dataset, base, args)
        if args.attacks_only and name in rows:
            new |= {key: value for key, value in rows[name].items() if key.startswith("control") or key == "n_seeds"}
        rows[name] = new
        table = pd.DataFrame([rows[key] for key in order if key in rows]).round(4)
        write_table(table, path)
        print(pd.Series(new).to_string(), flush=True)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
