"""Measure the shipped base model against its bars: VAE PSNR on data it never saw, colours that follow the prompt.

`python benchmarks/base_quality.py` prints one JSON object.
"""

import json

import numpy as np
import torch

from splitlab import load_base, load_params, load_split
from splitlab.core.seeds import generator
from splitlab.data.colours import COLOURS, rgb, split_prompt
from splitlab.diffusion import metrics

N_PROMPTS = 200


def vae_psnr(base, images):
    """PSNR, dB, of the VAE's reconstructions: (mean, standard deviation over images)."""
    values = metrics.psnr_db(base.decode(base.encode(images)), images)
    return round(values.mean().item(), 2), round(values.std().item(), 2)


def colours_followed(base, prompts):
    """Shares of generated images whose disc / ground mean colour is nearer to the prompted than to another colour."""
    images = base.pipeline(
        prompts,
        height=32,
        width=32,
        num_inference_steps=25,
        guidance_scale=2.0,
        output_type="pt",
        generator=generator(0),
    ).images
    other = list(np.random.default_rng(0).permutation(len(prompts)))
    hits = {"disc": [], "ground": [], "both": []}
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        mask = metrics.disc_mask(torch.as_tensor(image) * 2 - 1)
        pixels = torch.as_tensor(image)
        found = [pixels[:, part].mean(1).numpy() if part.any() else np.full(3, np.nan) for part in (mask, ~mask)]
        near = []
        for colour, wanted, unwanted in zip(found, split_prompt(prompt), split_prompt(prompts[other[i]]), strict=True):
            near.append(np.linalg.norm(colour - rgb(wanted)) < np.linalg.norm(colour - rgb(unwanted)))
            near[-1] |= wanted == unwanted
        for name, hit in zip(hits, (*near, all(near)), strict=True):
            hits[name].append(hit)
    return {name: round(float(np.mean(values)), 3) for name, values in hits.items()}


def main():
    params = load_params()
    base = load_base(params["base"]["source"])
    rng = np.random.default_rng(1)
    prompts = []
    while len(prompts) < N_PROMPTS:
        disc, ground = rng.choice(list(COLOURS), 2)
        if np.linalg.norm(np.subtract(rgb(disc), rgb(ground))) >= 0.25 * np.sqrt(3):
            prompts.append(f"{disc} circle with {ground} background")
    result = {"colours_followed": colours_followed(base, prompts), "n_prompts": N_PROMPTS}
    for name in ("shapes", "photos", "digits"):
        heldout = load_split(name, "heldout", params)
        result[f"vae_{name}_db"] = vae_psnr(base, heldout.images)
        result[f"vae_{name}_hints_db"] = vae_psnr(base, heldout.hints)
    result["vae_photos_private_hints_db"] = vae_psnr(base, load_split("photos", "private", params).hints)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
