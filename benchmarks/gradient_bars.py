"""Print what gradient inversion reaches in the pipeline's table, bar by bar: `python benchmarks/gradient_bars.py`.

Run it after `dvc repro`; it exits 1 if a bar is missed. Timesteps and prompts over many trials, more images and seeds,
and the cost of an evaluation are measured by `gradient_closed_form.py` and `gradient_images.py`; that random gradients
give nothing is a test.
"""

import argparse
import sys
from math import isnan
from pathlib import Path

from splitlab import ROOT
from splitlab.core.tables import read_timed


def rows(table, **wanted):
    """Rows whose columns have these values; defence "none" unless it is named."""
    chosen = table
    for column, value in ({"defence": "none", "trainable": "all", "objective": "epsilon"} | wanted).items():
        chosen = chosen[chosen[column] == value]
    return chosen


def best(table, **wanted):
    """The attack of the largest SSIM."""
    found = rows(table, **wanted).dropna(subset=["ssim"]).query("attack != 'no_information'")
    return found.loc[found["ssim"].idxmax()]


def says(row):
    """A row's numbers in words."""
    return f"SSIM {row.ssim:.3f} +- {row.ssim_std:.3f}, {row.cpu_s:.1f} CPU s per image, n = {row.n} x {row.n_seeds}"


def images(table):
    """Yield (bar, measured, met) of reconstructions."""
    known = {"granted": "timesteps noise", "attack": "known_noise"}
    row = best(table, model="pixel32", t=250, **known)
    yield "noise known, 32x32, t = 250: SSIM >= 0.90 in <= 60 s", says(row), row.ssim >= 0.9 and row.cpu_s <= 60
    row = best(table, model="latent", dataset="photos", t=250, attack="unknown_noise")
    bar = "trained base, noise unknown even: SSIM >= 0.80 in <= 180 s"
    yield bar, f"{says(row)} (VAE: {row.ceiling_ssim:.3f})", row.ssim >= 0.8 and row.cpu_s <= 180
    unknown = {"attack": "unknown_noise", "granted": "", "update": "gradient"}
    row = best(table, model="pixel16", t=100, **unknown)
    yield "noise unknown, 16x16, t = 100: SSIM >= 0.85 in <= 600 s", says(row), row.ssim >= 0.85 and row.cpu_s <= 600
    for name, cell in {"32x32": {"model": "pixel32"}, "two images": {"model": "pixel16-wide", "batch": 2}}.items():
        row = best(table, **cell, **unknown)
        yield f"noise unknown, {name}: a first success", says(row), row.ssim >= 0.85


def contrast(table):
    """Yield (bar, measured, met): GIDM's optimiser had at least the CPU time of ours, and lost everywhere."""
    for _, other in table[table["attack"] == "gidm"].iterrows():
        cell = table[table["cell"] == other.cell]
        ours = cell[cell["attack"].isin(["unknown_noise", "known_noise"])]
        for _, own in ours.dropna(subset=["ssim"]).iterrows():
            ratio = f"{own.ssim / other.ssim:.1f}" if other.ssim > 0 else "-"
            words = f"{own.ssim:.3f} in {own.cpu_s:.1f} s against {other.ssim:.3f} in {other.cpu_s:.1f} s"
            met = own.ssim > other.ssim and own.cpu_s <= other.cpu_s
            yield f"{own.attack} ahead of GIDM in no more CPU time, {other.cell}", f"{words}, ratio {ratio}", met


def curve(table):
    """Yield (bar, measured, met) of Gaussian noise by level, timesteps and prompts beside it."""
    for level in sorted(table.loc[table["defence"] == "noise", "level"].unique()):
        cell = {"defence": "noise", "level": level}
        row = best(table, model="pixel16", **cell)
        steps = rows(table, model="pixel16", attack="timesteps", **cell)["timestep_exact"].mean()
        texts = rows(table, model="latent", attack="prompts", **cell)["prompt_exact"].mean()
        found = f"{row.attack} {says(row)}; timestep {steps:.0%}, prompt " + (
            "not tried" if isnan(texts) else f"{texts:.0%}"
        )
        wanted = "SSIM >= 0.9" if level <= 0.3 else "SSIM < 0.1" if level >= 10 else "stated"
        met = row.ssim >= 0.9 if level <= 0.3 else row.ssim < 0.1 or level < 10
        yield f"noise of {level:g} of the gradient's RMS: {wanted}", found, met


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, default=ROOT / "reports/metrics/gradient_attacks.csv")
    path = parser.parse_args().table
    table = read_timed(path).fillna({"granted": ""})
    if table["cpu_s"].isna().all():
        sys.exit(f"{path}: nothing was timed on this machine; `dvc repro` times what it runs")
    met = True
    for part in (images, contrast, curve):
        for bar, measured, reached in part(table):
            met &= bool(reached)
            print(f"{'met   ' if reached else 'MISSED'}  {bar}: {measured}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
