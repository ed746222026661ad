"""Hints recovered from conventional split learning, over seeds, and what that costs: hijacking, and UnSplit.

`python benchmarks/hijacking.py [--steps 600] [--batch 16] [--lr 1e-3] [--seeds 3] [--dataset shapes]` hijacks a run per
seed; no U-Net is needed, as a hijacking server computes no diffusion loss. `--unsplit` instead attacks 512 messages of
the hint encoder that the honest run shapes-split-gradients ended with. Prints JSON lines; seconds are CPU seconds.
"""

import argparse
import json
import time

import torch
from diffusers import ControlNetModel

from splitlab import ROOT, Defences, TrainConfig, load, load_base
from splitlab.core.seeds import generator
from splitlab.data.colours import are_shapes
from splitlab.diffusion.base_files import load_model
from splitlab.diffusion.metrics import draw_galleries, identified, iou, outline_mask, psnr_db
from splitlab.split.attacks import NO_INFORMATION
from splitlab.split.attacks.unsplit import calibrated
from splitlab.split.messages import Knowledge, Observation
from splitlab.split.schemes import make_scheme
from splitlab.split.server import run_attack
from splitlab.split.train import learning_rate, make_clients
from splitlab.split.wire import from_bytes

SAMPLES = 512


def scores(hints, indices, private):
    wanted = private.hints[indices]
    gallery_indices = draw_galleries(len(private), indices, 100, generator("line-up", 0))
    found = {
        "hint_id_top1": identified(hints, private.hints, gallery_indices).float().mean().item(),
        "hint_psnr_db": psnr_db(hints, wanted).mean().item(),
    }
    if are_shapes(private.prompts):
        masks = (torch.stack([outline_mask(hint) for hint in group]) for group in (hints, wanted))
        found["hint_iou"] = iou(*masks).mean().item()
    return {name: round(value, 4) for name, value in found.items()}


def hijacked(base, config, private, public):
    """Run the training; return the late messages, their indices and the server's networks."""
    scheme = make_scheme(base, config, make_clients(base, private, config), private.hints, public=public)
    steps = [scheme.step(number, learning_rate(number, config)) for number in range(config.steps)]
    late = steps[-(SAMPLES // config.batch_size) :]
    indices = torch.cat([step.truth.indices for step in late])
    return [from_bytes(step.message) for step in late], indices, scheme.modules["hijacker"].state_dict()


def honest(private):
    """Return what the honest run's last encoder sends for `SAMPLES` private hints, and their indices."""
    controlnet = load_model(ControlNetModel, ROOT / "runs/shapes-split-gradients/controlnet")
    indices = torch.randperm(len(private), generator=generator("unsplit"))[:SAMPLES]
    with torch.no_grad():
        smashed = controlnet.controlnet_cond_embedding((private.hints[indices] + 1.0) / 2.0)
    return [Observation(0, 0, smashed=smashed)], indices, {}


def main():
    parser = argparse.ArgumentParser()
    for name, default in {"steps": 600, "batch": 16, "lr": 1e-3, "seeds": 3, "first": 0, "dataset": "shapes"}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--unsplit", action="store_true")
    asked = parser.parse_args()
    base = load_base(ROOT / "models/base")
    private, public = (load(ROOT / f"data/{split}/{asked.dataset}.zip") for split in ("private", "public"))
    for seed in range(asked.first, asked.first + asked.seeds):
        config = TrainConfig(
            dataset=asked.dataset, scheme="split_gradients", server="hijack", steps=asked.steps,
            batch_size=asked.batch, lr=asked.lr, seed=seed, published_key=seed,
        )  # fmt: skip
        began = time.process_time()
        sent, indices, server = honest(private) if asked.unsplit else hijacked(base, config, private, public)
        training_s = time.process_time() - began
        knowledge = Knowledge(base, "split_gradients", Defences(), private.size, public, server=server)
        for attack in ("unsplit" if asked.unsplit else "hijacking", *(NO_INFORMATION if seed == asked.first else ())):
            began = time.process_time()
            options = {"calibrate": False} if attack == "unsplit" else {}
            draw = generator("attack", attack, seed)
            result = run_attack(attack, sent, knowledge, generator=draw, options=options)
            row = {"attack": attack, "seed": seed, "n": len(indices), **scores(result.hints, indices, private)}
            if attack == "hijacking":
                row |= {"steps": asked.steps, "batch": asked.batch, "lr": asked.lr, "training_s": round(training_s, 1)}
            if attack == "unsplit":
                row |= {"attack_s": round(time.process_time() - began, 1)}
                row |= {"calibrated": scores(calibrated(result.hints, public.hints), indices, private)}
            print(json.dumps(row | {"objective": [round(x, 4) for x in result.objective[-1:]]}), flush=True)


if __name__ == "__main__":
    main()
