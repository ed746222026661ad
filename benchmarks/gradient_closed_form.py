"""Timesteps and prompts read off federated updates of private images: how many exactly, and what noise does to that.

`python benchmarks/gradient_closed_form.py [single|sets|prompts|noise ...] [--trials N]` prints one CSV row per cell:
exact is the share of trials whose whole set is right, found the share of single timesteps or prompts among those named.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from splitlab import load_base
from splitlab.core.paths import ROOT
from splitlab.core.seeds import generator
from splitlab.data.image_set import load
from splitlab.diffusion.base import Base
from splitlab.federated.attacks.prompts import prompts
from splitlab.federated.attacks.timesteps import timesteps
from splitlab.federated.client import InversionKnowledge, pixel_unet, share
from splitlab.federated.defences import protect
from splitlab.federated.defences.clip import Clip
from splitlab.federated.defences.noise import GaussianNoise
from splitlab.federated.update import Update, UpdateTruth

COLUMNS = ("what", "model", "layers", "variant", "batch", "n", "exact", "found", "attack_cpu_s")
LEVELS = (0.0, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
HALVES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def first_layer(name: str) -> bool:
    return name.startswith("time_embedding.linear_1")


def timed(name: str) -> bool:
    return name.startswith("time_embedding") or "time_emb_proj" in name


def cross_attention(name: str) -> bool:
    return "attn2.to_k" in name or "attn2.to_v" in name


class World:
    """The shipped base, an untrained pixel model, and private images to train them on."""

    def __init__(self):
        self.base: Base = load_base(ROOT / "models/base")
        self.pixel = pixel_unet(16, seed=0)
        shapes, photos = (load(ROOT / f"data/private/{name}.zip", limit=300) for name in ("shapes", "photos"))
        self.images = torch.cat([shapes.images, photos.images])
        self.texts = (*shapes.prompts, *photos.prompts)
        self.latents = self.base.encode(self.images)

    def model(self, name: str) -> nn.Module:
        """Return the model that clients train."""
        return self.pixel if name == "pixel" else self.base.unet

    def truth(self, name: str, batch: int, *purpose: object, shapes_only: bool = False) -> UpdateTruth:
        """Draw a client's batch: distinct images, distinct timesteps."""
        draw = generator("closed form", name, batch, *purpose)
        chosen = torch.randperm(300 if shapes_only else len(self.images), generator=draw)[:batch]
        clean = self.latents[chosen]
        if name == "pixel":
            clean = nn.functional.avg_pool2d(self.images[chosen], 2)
        steps = torch.randperm(1000, generator=draw)[:batch]
        texts = tuple(self.texts[index] for index in chosen)
        text = None if name == "pixel" else self.base.encode_prompts(texts)
        noise = torch.randn(clean.shape, generator=draw)
        return UpdateTruth(clean, steps, noise, text, prompts=texts)

    def share(self, name: str, truth: UpdateTruth, **arguments) -> Update:
        """Return what the client sends."""
        return share(self.model(name), truth, alphas_cumprod=self.base.alphas_cumprod, **arguments)

    def knows(self, name: str) -> InversionKnowledge:
        """Return what the server knows."""
        base = None if name == "pixel" else self.base
        return InversionKnowledge(self.model(name), self.base.alphas_cumprod, base)


def row(what: str, model: str, layers: str, variant: str, batch: int, trials: Iterator[tuple[set, set, float]]) -> dict:
    """Score trials of (named, true, seconds)."""
    scores = list(trials)
    named = sum(len(found) for found, _, _ in scores)
    return {
        "what": what,
        "model": model,
        "layers": layers,
        "variant": variant,
        "batch": batch,
        "n": len(scores),
        "exact": round(sum(found == true for found, true, _ in scores) / len(scores), 4),
        "found": round(sum(len(found & true) for found, true, _ in scores) / max(named, 1), 4),
        "attack_cpu_s": round(sum(seconds for _, _, seconds in scores) / len(scores), 4),
    }


def steps_of(world: World, model: str, update: Update, truth: UpdateTruth, **options) -> tuple[set, set, float]:
    began = time.process_time()
    found = timesteps(update, world.knows(model), generator=generator(0), **options)
    seconds = time.process_time() - began
    return set(found.timesteps.tolist()), set(truth.timesteps.flatten().tolist()), seconds


def prompts_of(world: World, update: Update, truth: UpdateTruth, **options) -> tuple[set, set, float]:
    began = time.process_time()
    found = prompts(update, world.knows("base"), generator=generator(0), **options)
    return set(found.prompts), set(truth.prompts), time.process_time() - began


def single(world: World, n: int) -> Iterator[dict]:
    """Every timestep by itself: B = 1."""
    del n
    variants: dict[str, Callable[[Update], Update]] = {
        name: lambda update, dtype=dtype: update.map(lambda value: value.to(dtype)) for name, dtype in HALVES.items()
    }
    variants["clipped to 1e-4"] = lambda update: protect(update, Clip(1e-4), generator=generator(0))
    for model in ("pixel", "base"):
        results: dict[str, list] = {name: [] for name in (*variants, "4 local steps")}
        for step in range(1000):
            truth = replace(world.truth(model, 1, "single", step), timesteps=torch.tensor([step]))
            update = world.share(model, truth, trainable=first_layer)
            for name, change in variants.items():
                results[name].append(steps_of(world, model, change(update), truth))
            update = world.share(model, truth, trainable=timed, kind="fedavg", local_steps=4, lr=0.1)
            results["4 local steps"].append(steps_of(world, model, update, truth))
        for name, trials in results.items():
            yield row("timestep", model, "embedding", name, 1, iter(trials))


def sets(world: World, n: int) -> Iterator[dict]:
    """Sets of distinct timesteps, their number unknown."""
    for model in ("pixel", "base"):
        for batch in (2, 4, 8):
            results: dict[str, list] = {name: [] for name in HALVES}
            for trial in range(n):
                truth = world.truth(model, batch, "sets", trial)
                update = world.share(model, truth, trainable=first_layer)
                for name, dtype in HALVES.items():
                    half = update.map(lambda value, dtype=dtype: value.to(dtype))
                    results[name].append(steps_of(world, model, half, truth))
            for name, trials in results.items():
                yield row("timesteps", model, "embedding", name, batch, iter(trials))


def texts(world: World, n: int) -> Iterator[dict]:
    """Prompts, their number unknown, whole vocabulary, no template."""
    for name in ("float32", "float16"):
        for batch in (1, 2, 4):
            trials = []
            for trial in range(n):
                truth = world.truth("base", batch, "prompts", trial, shapes_only=True)
                update = world.share("base", truth, trainable=cross_attention, dtype=HALVES[name])
                trials.append(prompts_of(world, update, truth))
            yield row("prompts", "base", "attn2.to_k, to_v", name, batch, iter(trials))


def noise(world: World, n: int) -> Iterator[dict]:
    """Gaussian noise on the update, by its level."""
    for rel in LEVELS:
        defence = GaussianNoise(rel)
        for batch in (1, 4):
            results: dict[str, list] = {"embedding": [], "all": []}
            for trial in range(n):
                truth = world.truth("base", batch, "noise", trial)
                update = world.share("base", truth, trainable=timed)
                noisy = protect(update, defence, generator=generator("noise", trial))
                for layers, trials in results.items():
                    trials.append(steps_of(world, "base", noisy, truth, layers=layers))
            for layers, trials in results.items():
                yield row("timesteps", "base", layers, f"noise {rel:g}", batch, iter(trials))
        trials = []
        for trial in range(max(n // 2, 1)):
            truth = world.truth("base", 1, "noise", trial, shapes_only=True)
            update = world.share("base", truth, trainable=cross_attention)
            noisy = protect(update, defence, generator=generator("noise", trial))
            trials.append(prompts_of(world, noisy, truth, rounds=0))
        yield row("prompts", "base", "attn2.to_k, to_v", f"noise {rel:g}", 1, iter(trials))


PARTS = {"single": (single, 1), "sets": (sets, 100), "prompts": (texts, 40), "noise": (noise, 20)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--trials", type=int, help="per cell")
    arguments = parser.parse_args()
    world = World()
    table = csv.DictWriter(sys.stdout, COLUMNS)
    table.writeheader()
    for part in arguments.parts or PARTS:
        run, usual = PARTS[part]
        for cell in run(world, arguments.trials or usual):
            table.writerow(cell)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
