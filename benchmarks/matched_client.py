"""What hint protection costs and stops: control after training, identification by image, hint and both.

`python benchmarks/matched_client.py [--dataset shapes] [--steps 900] [--seeds 3] [--only NAME ...]
[--attacks-only | --control-only]` trains every setting of the data set (`matched_settings.py`) with S1's split, once
per seed, and attacks one message for each of 100 private images with the strongest attacks of the catalogue
(`matched_attacks.py`). Everything is cached below `.cache/matched_client`, so that it can be interrupted and repeated;
the table goes to `reports/metrics/matched_client.csv`, that of photographs to `matched_client_photos.csv`; what was not
asked for stays in it as it is.

`id_*`: share identified among the 100, by image, hint and both (`splitlab.split.identification`), n = 100 x `KEYS`
draws of all noise. `id_*_ideal`: the same by whoever holds the 100 candidates and weighs them by Bayes, a ceiling for
every attack.

`control_iou_guided` is what settings are compared by: all are asked alike, at the guidance along the control
(`benchmarks/guided.py`) that is best for 64 public hints, for 64 held-out ones, both against the whole hint;
`guidance` is the one chosen. `control_iou` is as learned: at guidance 1 where clients disguise themselves
(`split.defences.disguised`; they are asked with layouts), at control scale 1 of diffusers' pipeline elsewhere, and
`control_iou_amplified` at `AMPLIFIED`. No control and the VAE's own reconstruction are rows of the table.
`colour_error*` is the mean absolute error of the ground's colour
against the prompt, range 2. `*_seeds`: seed by seed, for pairing settings.

Beside the settings: the same training on public data alone, and without defence for as few steps as a setting that has
fewer than the others (`(none, 600 steps)`).

Photographs: `control_edges*`, agreement of edges with the hint above that with the hint turned
(`splitlab.diffusion.metrics.edge_control`), always at guidance 1 and at the best for 64 public hints, beside the rows
of no control and of the VAE; `eval_loss`, the denoising loss on held-out photographs.

`--defences WORDS` measures clients that are in no table, written as the tables' column `defences` is, and prints what
it finds, at every guidance; the table stays as it is.
"""

import argparse

import pandas as pd
import torch
from guided import generate_guided
from matched_attacks import FOLDER, N, attacked
from matched_parts import asked_layout, recoloured
from matched_settings import DATASETS, STEPS, read

from splitlab import CACHE, ROOT, Defences, TrainConfig, load_base, n_workers
from splitlab.core.checkpoint import load_json, save_json
from splitlab.core.parallel import parallel
from splitlab.core.seeds import Key, generator
from splitlab.core.tables import read_table, write_table
from splitlab.data.image_set import digest
from splitlab.diffusion.base_files import load_model
from splitlab.diffusion.controlnet import LatentHintControlNet, control_pipeline
from splitlab.diffusion.metrics import disc_iou, edge_control
from splitlab.split.config import read_defences
from splitlab.split.defences import disguises
from splitlab.split.defences.borrowed_colours import colours_of
from splitlab.split.train import train
from splitlab.study.evaluate import without_control

PUBLIC_ONLY = "(public data only)"
"""Name of the row of a ControlNet that was trained without defence on public data: what private data must add to."""
FEWER = {f"(none, {steps} steps)": steps for steps in STEPS.values()}
"""Rows of the undefended client after as few steps as a setting that has fewer: what to compare that setting with."""
AMPLIFIED = 3.0
UNDEFENDED = (Defences(), False)


def table_path(dataset):
    return ROOT / f"reports/metrics/matched_client{'' if dataset == 'shapes' else '_' + dataset}.csv"


def training_set(name, dataset, hidden):
    data = read(dataset, "public" if name == PUBLIC_ONLY else "private")
    return recoloured(data, key=Key.published("private")) if hidden else data


def trained(name, client, dataset, steps, seed, base):
    """Train one cell, or read what was trained before: how well it is controlled, by each way of asking for it."""
    defences, hidden = client
    config = TrainConfig(
        dataset=dataset, defences=defences, steps=steps, seed=seed, published_key=seed, record_messages=1
    )
    out = FOLDER / f"{name}-{digest({'config': config, 'base': base.digest, 'hidden': hidden})[:12]}"
    heldout = read(dataset, "heldout")
    if not (out / "record.json").exists():
        train(name, config, base, training_set(name, dataset, hidden), heldout, out=out, cache=CACHE)
    record, asked = load_json(out / "record.json"), guided(out, config, base)
    if dataset != "shapes":
        return asked | {"eval_loss": record["eval_loss"]}
    if disguises(defences):
        return asked
    learned = {"control_iou": record["control_iou"], "control_iou_amplified": amplified(out, config, base)}
    return learned | {name: value for name, value in asked.items() if name.endswith("_guided") or name == "guidance"}


def amplified(out, config, base):
    """Ask for held-out hints at control scale `AMPLIFIED`."""
    if not (out / "amplified.json").exists():
        model = load_model(LatentHintControlNet, out / "controlnet")
        asked = read(config.dataset, "heldout").subset(range(config.eval_samples))
        with torch.no_grad():
            pictures = control_pipeline(base, model)(
                prompt=list(asked.prompts),
                image=(asked.hints + 1) / 2,
                height=asked.size,
                width=asked.size,
                num_inference_steps=25,
                guidance_scale=2.0,
                generator=generator(config.seed, "generate"),
                controlnet_conditioning_scale=AMPLIFIED,
                output_type="pt",
            ).images
        save_json(out / "amplified.json", {"control_iou": disc_iou(pictures * 2 - 1, asked.hints).mean().item()})
    return load_json(out / "amplified.json")["control_iou"]


def guided(out, config, base):
    """Ask for public hints at every guidance and for held-out ones at the best of these, and at 1."""
    _, measure, guidances = DATASETS[config.dataset]
    if not (out / "guided.json").exists():
        public, heldout = (read(config.dataset, split) for split in ("public", "heldout"))
        model = load_model(LatentHintControlNet, out / "controlnet")
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
    hints = asked_layout(asked.hints, config.defences.hint_layout_noise, control=control)
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


def row_of(name, client, base, args):
    defences, hidden = client
    row = {"setting": name, "defences": str(defences) + (" recoloured" if hidden else "")}
    row |= utility_of(name, client, base, args)
    return row | ({} if args.control_only else {"id_chance": 1 / N} | attacked(name, client, args.dataset, base)[0])


def steps_of(name, args):
    return STEPS.get(name, FEWER.get(name, args.steps))


def utility_of(name, client, base, args):
    """Mean, spread and single values of the control over training seeds."""
    steps, seeds = steps_of(name, args), range(0 if args.attacks_only else args.seeds)
    ious = [trained(name, client, args.dataset, steps, seed, base) for seed in seeds]
    row = {"steps": steps}
    for column in ious[0] if ious else (DATASETS[args.dataset][1],):
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


def tabled(rows, columns, order):
    """Lay rows out in `order`, known columns first and as they stood, so that only what is new changes the table."""
    table = pd.DataFrame([rows[key] for key in order if key in rows]).round(4)
    return table[[*(name for name in columns if name in table), *(name for name in table if name not in columns)]]


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="shapes")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--defences")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--attacks-only", action="store_true")
    what.add_argument("--control-only", action="store_true")
    args = parser.parse_args()
    settings = DATASETS[args.dataset][0]
    if unknown := sorted(set(args.only or ()) - set(settings)):
        parser.error(f"no setting is called {', '.join(unknown)}; there: {', '.join(settings)}")
    return args


def main():
    args = read_arguments()
    settings, path = DATASETS[args.dataset][0], table_path(args.dataset)
    base = load_base(ROOT / "models/base")
    if args.defences:
        row = row_of(args.defences, (read_defences(args.defences), False), base, args)
        for folder in sorted(FOLDER.glob(f"{args.defences}-*/guided.json")):
            row[f"public hints, {folder.parent.name[-12:]}"] = load_json(folder)["public"]
        print(pd.Series(row).to_string())
        return
    known = read_table(path) if path.exists() else pd.DataFrame()
    rows = {row["setting"]: row for row in known.to_dict("records")}
    names = args.only or list(settings)
    if not args.attacks_only:
        fewer = FEWER if set(settings) & set(STEPS) and set(names) & {"none", *STEPS} else {}
        beside = [PUBLIC_ONLY, *fewer]
        clients = {name: settings[name] for name in names} | dict.fromkeys(beside, UNDEFENDED)
        cells = [
            (name, client, args.dataset, steps_of(name, args), seed, base)
            for name, client in clients.items()
            for seed in range(args.seeds)
        ]
        for _ in parallel(trained, cells, desc="cells trained", workers=n_workers()):
            pass
        rows |= {name: {"setting": name} | utility_of(name, UNDEFENDED, base, args) for name in beside}
    rows |= {row["setting"]: row for row in yardsticks(args.dataset, base)}
    order = [*settings, *FEWER, PUBLIC_ONLY, "(no control)", "(VAE ceiling)"]
    for name in names:
        new = row_of(name, settings[name], base, args)
        if args.attacks_only and name in rows:
            new = {key: value for key, value in new.items() if not key.startswith("control") and key != "n_seeds"}
        rows[name] = rows.get(name, {}) | new
        write_table(tabled(rows, list(known), order), path)
        print(pd.Series(new).to_string(), flush=True)


if __name__ == "__main__":
    main()
