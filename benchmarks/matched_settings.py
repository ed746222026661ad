"""The clients that `matched_client.py` and `whole_run.py` measure, by name."""

from dataclasses import replace

from splitlab import ROOT, Defences, load

MATCHED = Defences(feature_noise=1.0, matched=True, hide_prompts=True)
HIGH = replace(MATCHED, timestep_floor=800)
COARSE = replace(HIGH, coarse_hints=3)
DISGUISED = Defences(feature_noise=1.0, matched=True, timestep_floor=800, borrowed_colours=True, hint_layout_noise=0.2)
TURNED = replace(DISGUISED, timestep_floor=700, hint_layout_noise=0.12, random_symmetry=True)
TURNED_ONCE = replace(
    TURNED, per_image_noise=True, feature_noise=6.0, timestep_floor=500, hint_layout_noise=0.1, latent_norm=36.0
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
        replace(COARSE, hint_noise=1.8, feature_noise=7.0, per_image_noise=True, timestep_floor=600, latent_norm=36.0),
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


def read(dataset, split):
    return load(ROOT / f"data/{split}/{dataset}.zip")
