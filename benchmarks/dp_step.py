"""Time a DP-SGD step against what it is compared with, paired: the variants take turns, and ratios are per turn.

`python benchmarks/dp_step.py [--batch 64] [--turns 15]`; exits 1 if a bar is missed: an attention-only private step
takes at most 1.5 times a non-private attention-only step of the same batch, and 0.8 times a private full U-Net step.
"""

import argparse
import statistics
import sys
import time
import warnings

import torch
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping

from splitlab import ROOT, load_base
from splitlab.core.seeds import generator
from splitlab.diffusion.trainable import count_trainable, mark_trainable
from splitlab.dp.conditioning import denoiser, make_conditioning
from splitlab.dp.finetune import DPConfig
from splitlab.privacy import mechanisms as engine

CLASSES = [f"the digit {word}" for word in "0123456789"]
BOUND = 0.1


def build(base, trainable, from_block):
    """A denoiser of the base with one trainable set and the class embedder, and its optimiser."""
    model = denoiser(base, make_conditioning(base, "class", CLASSES, classes=CLASSES))
    mark_trainable(model.unet, trainable, from_block=from_block)
    return model, torch.optim.Adam(engine.trainable_parameters(model).values(), lr=1e-5)


def draw_inputs(base, batch):
    """Latents, labels, timesteps and noise."""
    draw, shape = generator("benchmark", batch), (batch, *base.latent_shape(32))
    labels = torch.randint(len(CLASSES), (batch,), generator=draw)
    timesteps = torch.randint(1000, (batch,), generator=draw)
    return torch.randn(shape, generator=draw), labels, timesteps, torch.randn(shape, generator=draw)


def private(model, optimizer, inputs):
    """One step of DP-SGD by hooks."""
    gradient = engine.private_gradient(
        model,
        inputs,
        max_grad_norm=BOUND,
        noise_multiplier=1.0,
        expected_batch=float(len(inputs[0])),
        generator=generator("benchmark"),
        physical_batch=len(inputs[0]),
    )
    engine.step(optimizer, model, gradient)


def plain(model, optimizer, inputs):
    """One step without privacy: one backward pass of the batch's loss."""
    model(*inputs).mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def ghost(model, optimizer, inputs):
    """One step of DP-SGD by ghost clipping: a backward pass for the norms, another for the clipped sum."""
    model.train()
    hooks = GradSampleHooksFastGradientClipping(model, loss_reduction="sum", max_grad_norm=BOUND)
    losses = model(*inputs)
    losses.sum().backward(retain_graph=True)
    factors = hooks.get_clipping_coef().detach()
    optimizer.zero_grad(set_to_none=True)
    hooks.disable_hooks()
    (factors * losses).sum().backward()
    total = {name: p.grad for name, p in engine.trainable_parameters(model).items()}
    hooks.cleanup()
    batch = float(len(losses))
    engine.step(
        optimizer, model, engine.release(total, BOUND, 1.0, expected_batch=batch, generator=generator("benchmark"))
    )


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--turns", type=int, default=15)
    arguments.add_argument("--from-block", type=int, default=DPConfig().from_block)
    given = arguments.parse_args()
    torch.set_num_threads(1)  # CPU seconds of one thread: other processes on the machine do not count
    warnings.filterwarnings("ignore", "Full backward hook")
    base = load_base(ROOT / "models/base")
    inputs = draw_inputs(base, given.batch)
    steps = {
        ("attention", "hooks"): private,
        ("attention", "ghost"): ghost,
        ("attention", "not private"): plain,
        ("lora", "hooks"): private,
        ("unet", "hooks"): private,
        ("unet", "not private"): plain,
    }
    built = {key: build(base, key[0], 0 if key[0] == "unet" else given.from_block) for key in steps}
    seconds = {key: [] for key in steps}
    for turn in range(given.turns + 1):
        for key, take in steps.items():
            start = time.process_time()
            take(*built[key], inputs)
            if turn:  # the first turn warms up
                seconds[key].append(time.process_time() - start)

    width = sum(p.numel() for p in base.unet.parameters())
    print(f"batch {given.batch}, transformers from {given.from_block} on, {given.turns} turns")
    print("CPU seconds: median (min to max)")
    for key, taken in seconds.items():
        count = count_trainable(built[key][0])
        print(
            f"{key[0]:10} {key[1]:12} {count:8,} weights ({count / width:4.0%})  "
            f"{statistics.median(taken):.3f} ({min(taken):.3f} to {max(taken):.3f})"
        )
    missed = False
    ours = seconds["attention", "hooks"]
    for other, bar in ((("attention", "not private"), 1.5), (("unet", "hooks"), 0.8), (("attention", "ghost"), None)):
        ratios = [a / b for a, b in zip(ours, seconds[other], strict=True)]
        middle = statistics.median(ratios)
        missed |= bar is not None and middle > bar
        verdict = "" if bar is None else f"  bar {bar}: {'missed' if middle > bar else 'met'}"
        print(
            f"attention hooks / {other[0]} {other[1]}: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}){verdict}"
        )
    sys.exit(missed)


if __name__ == "__main__":
    main()
