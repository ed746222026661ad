"""Measure what image inversion reaches, at what cost, from honest starts: `python benchmarks/gradient_images.py`.

Photographs of the private share, as in the pipeline. Every row: mean SSIM and its standard deviation over images and
seeds (a seed draws the weights, the noise and the attack's start), evaluations per update, CPU seconds per image.
One thread. Rows are paired: all attacks of a table see the same updates.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from splitlab.core.seeds import generator
from splitlab.data.image_set import load
from splitlab.diffusion.base import load_base
from splitlab.diffusion.denoisers import plain_attention
from splitlab.diffusion.metrics import mse, ssim
from splitlab.federated.attacks.baselines import dlg, inverting_gradients
from splitlab.federated.attacks.gidm import gidm
from splitlab.federated.attacks.gradient_matching import known_noise
from splitlab.federated.attacks.matching import Matcher
from splitlab.federated.attacks.noisy_inputs import _Search
from splitlab.federated.attacks.patches import choose_layers, find_layers
from splitlab.federated.attacks.problem import Problem
from splitlab.federated.attacks.unknown_noise import unknown_noise
from splitlab.federated.client import InversionKnowledge, pixel_unet, share, share_each, training_loss
from splitlab.federated.update import Update, UpdateTruth
from splitlab.study.update_scores import matched

ALPHAS = DDPMScheduler().alphas_cumprod


def photos(root: Path, split: str, n: int, size: int) -> torch.Tensor:
    images = load(root / split / "photos.zip", limit=n).images
    return F.interpolate(images, size=(size, size), mode="area") if images.shape[-1] != size else images


def case(
    root: Path, *, seed: int, n: int, size: int, t: int, channels: tuple[int, ...], batch: int = 1, rel: float = 0.0
) -> tuple[list[Update], InversionKnowledge, UpdateTruth]:
    """Return n updates of a randomly initialised pixel model, what the server knows, and the truth."""
    model = pixel_unet(size, seed=seed, channels=channels)
    clean = photos(root, "private", n * batch, size)
    noise = torch.randn(clean.shape, generator=generator("noise", seed))
    truth = UpdateTruth(clean, torch.full((len(clean),), t), noise)
    parts = [truth[i * batch : (i + 1) * batch] for i in range(n)]
    updates = [share(model, part, alphas_cumprod=ALPHAS) for part in parts]
    if rel:
        draw = generator("defence", seed)
        updates = [
            u.map(lambda v: v + rel * v.square().mean().sqrt() * torch.randn(v.shape, generator=draw)) for u in updates
        ]
    known = InversionKnowledge(model, ALPHAS, batch_size=batch, timesteps=truth.timesteps, noise=noise)
    return updates, known, truth


def base_case(
    root: Path, models: Path, *, seed: int, n: int, t: int
) -> tuple[list[Update], InversionKnowledge, UpdateTruth]:
    """The same of the trained base model's latents, with the empty prompt."""
    base = load_base(models)
    images = photos(root, "private", n, 32)
    clean = base.encode(images)
    noise = torch.randn(clean.shape, generator=generator("noise", seed))
    text = base.encode_prompts([""] * n)
    truth = UpdateTruth(clean, torch.full((n,), t), noise, text, images=base.decode(clean))
    model = plain_attention(base.unet)
    updates = share_each(model, truth, alphas_cumprod=base.alphas_cumprod)
    known = InversionKnowledge(
        model, base.alphas_cumprod, base, batch_size=1, timesteps=truth.timesteps, noise=noise, text=text
    )
    return updates, known, truth


def measure(
    name: str, attack: Callable[..., Any], cases: Callable[[int], Any], seeds: int, **options: Any
) -> dict[str, Any]:
    """Run an attack on every seed's updates and print a row."""
    similar, errors, evals, cpu = [], [], [], 0.0
    for seed in range(seeds):
        updates, known, truth = cases(seed)
        result = attack(updates, known, generator=generator("attack", seed), **options)
        wanted = truth.clean if truth.images is None else truth.images
        images = matched(result.images, wanted, len(wanted) // len(updates))
        similar.append(ssim(images, wanted))
        errors.append(mse(images, wanted))
        evals.append(result.n_evals)
        cpu += result.cpu_s / len(wanted)
    values = torch.cat(similar)
    row = {
        "attack": name,
        "n": len(values) // seeds,
        "n_seeds": seeds,
        "ssim": round(float(values.mean()), 4),
        "ssim_std": round(float(values.std()), 4),
        "ssim_min": round(float(values.min()), 4),
        "mse": float(f"{float(torch.cat(errors).mean()):.2g}"),
        "n_evals": round(sum(evals) / seeds),
        "cpu_s_per_image": round(cpu / seeds, 2),
    }
    print(json.dumps(row), flush=True)
    return row


def no_information(root: Path, size: int, n: int) -> dict[str, Any]:
    """The guess without any update: the mean public image."""
    guess = photos(root, "public", 200, size).mean(0, keepdim=True).expand(n, -1, -1, -1)
    values = ssim(guess, photos(root, "private", n, size))
    row = {"attack": "mean_public", "n": n, "ssim": round(float(values.mean()), 4)}
    print(json.dumps(row), flush=True)
    return row


def _best_time(call: Callable[[], object], repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def speed(root: Path, *, size: int, channels: tuple[int, ...], n: int) -> dict[str, Any]:
    """CPU seconds per target and evaluation: a plain loop, ours in one batch, and the patch test."""
    updates, known, truth = case(root, seed=0, n=n, size=size, t=250, channels=channels)
    problem = Problem(updates, known)
    z = torch.randn(n, problem.unknowns, generator=generator("speed"))
    matching = Matcher(problem).from_clean(truth.noise)

    def plain() -> None:
        parameters = [p.requires_grad_(True) for p in problem.model.parameters()]
        for i, update in enumerate(updates):
            clean = z[i].reshape(1, *problem.shape).requires_grad_(True)
            own = slice(i, i + 1)
            loss = training_loss(problem.model, clean, truth.timesteps[own], truth.noise[own], alphas_cumprod=ALPHAS)
            found = torch.autograd.grad(loss, parameters, create_graph=True)
            pairs = zip(found, update.gradients.values(), strict=True)
            torch.stack([(g - wanted).square().sum() for g, wanted in pairs]).sum().backward()
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)

    row = {"size": size, "n": n, "plain_s": _best_time(plain) / n, "matching_s": _best_time(lambda: matching(z)) / n}
    index = torch.zeros(1, dtype=torch.int64)
    layers = find_layers(
        problem.model,
        list(problem.gradients[0]),
        lambda x: problem.predict(x, truth.timesteps[:1], index),
        torch.zeros(1, *problem.shape),
    )
    chosen = choose_layers(layers, batch=1, unknowns=problem.unknowns, margin=10.0)
    if chosen:
        patch_test = _Search(problem, chosen, goal=0.0, recorder=None).objective(torch.arange(n))
        row["patches_s"] = _best_time(lambda: patch_test(z)) / n
        row["ratio_patches"] = row["plain_s"] / row["patches_s"]
    row["ratio_matching"] = row["plain_s"] / row["matching_s"]
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--base", type=Path, default=Path("models/base"))
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only",
        nargs="*",
        default=[
            "unknown16",
            "unknown32",
            "pair",
            "base",
            "base-known",
            "noise",
            "known32",
            "contrast",
            "contrast32",
            "speed",
        ],
    )
    parser.add_argument("--budget", type=float, default=None, help="CPU s per image of the contrast; default: ours'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, n, seeds = options.data, options.images, options.seeds

    def sixteen(seed: int, rel: float = 0.0) -> Any:
        return case(root, seed=seed, n=n, size=16, t=100, channels=(32, 64), rel=rel)

    def thirtytwo(seed: int) -> Any:
        return case(root, seed=seed, n=n, size=32, t=250, channels=(32, 64, 64))

    def trained(name: str, attack: Callable[..., Any], t: int, **arguments: Any) -> dict[str, Any]:
        made = partial(base_case, root, options.base, n=n, t=t)
        return measure(f"{name}, trained base, t={t}", attack, lambda s: made(seed=s), seeds, **arguments)

    tables: dict[str, Callable[[], object]] = {
        "unknown16": lambda: (
            no_information(root, 16, n),
            measure("unknown, 16, t=100", unknown_noise, sixteen, seeds),
        ),
        "unknown32": lambda: measure("unknown, 32, t=250", unknown_noise, thirtytwo, seeds),
        "pair": lambda: measure(
            "unknown, 16, t=250, 2 images per update",
            unknown_noise,
            lambda s: case(root, seed=s, n=n, size=16, t=250, channels=(32, 128), batch=2),
            seeds,
        ),
        "base": lambda: [trained("unknown", unknown_noise, t) for t in (20, 250, 900)],
        "base-known": lambda: [
            trained("known", known_noise, 250, start="patches", n_evals=20),
            trained("known, random start", known_noise, 250, n_evals=400, n_starts=3),
        ],
        "noise": lambda: [
            measure(f"unknown, 16, rel={rel}", unknown_noise, lambda s, r=rel: sixteen(s, r), seeds, fit_evals=40)
            for rel in (1e-4, 1e-3, 1e-2, 1e-1)
        ],
        "known32": lambda: [
            measure(f"known, 32, t=250, {name}", known_noise, thirtytwo, seeds, **arguments)
            for name, arguments in {
                "from patches": {"start": "patches", "n_evals": 20},
                "random start": {"n_evals": 200},
            }.items()
        ],
        "contrast": lambda: contrast(sixteen, seeds, n, options.budget),
        "contrast32": lambda: contrast(thirtytwo, seeds, n, options.budget),
        "speed": lambda: [
            speed(root, size=16, channels=(32, 64), n=8),
            speed(root, size=32, channels=(32, 64, 64), n=4),
        ],
    }
    for name in options.only:
        print(f"# {name}", flush=True)
        tables[name]()


def contrast(cases: Callable[[int], Any], seeds: int, n: int, budget: float | None) -> None:
    """All attacks at the CPU time of the one that does not know the noise; all others know it."""
    ours = measure("unknown_noise", unknown_noise, cases, seeds)
    measure("known_noise, from patches", known_noise, cases, seeds, start="patches", n_evals=5)
    total = n * (budget or ours["cpu_s_per_image"])
    measure("dlg", dlg, cases, seeds, n_evals=10**6, cpu_s=total)
    measure("inverting_gradients", inverting_gradients, cases, seeds, n_evals=10**6, cpu_s=total)
    measure("gidm, pixels only", gidm, cases, seeds, latent_evals=0, pixel_evals=10**6, cpu_s=total)


if __name__ == "__main__":
    main()
