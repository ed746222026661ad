"""A dozen numbers that say where the three systems stand, for `dvc metrics show` and `diff` and for `dvc exp show`."""

import json
from pathlib import Path

import pandas as pd

from splitlab.core import storage
from splitlab.core.tables import read_table

S1 = "dataset == 'shapes' and setting == 's1'"
ONCE = "setting == 'turned-once'"
IMAGES = (
    "model == 'pixel16' and attack == 'unknown_noise' and t == 100 and objective == 'epsilon' and update == 'gradient'"
)
DIGITS = "dataset == 'digits' and trainable == 'attention'"

HEADLINES = {
    # S1 on shapes: what its strongest attacker reaches, and what control it leaves, beside the undefended client's.
    "psnr_s1": ("split_verdicts", "psnr_db", S1),
    "id_s1": ("split_verdicts", "id_worst", S1),
    "iou_s1": ("split_verdicts", "control_iou", S1),
    "iou_none": ("split_verdicts", "control_iou", "dataset == 'shapes' and setting == 'none'"),
    # The strongest client: who is identified by one of its messages, by all of a run, and the control it keeps.
    "id_once": ("matched_client", "id_worst", ONCE),
    "id_run": ("whole_run", "id_worst", f"{ONCE} and messages == 29"),
    "iou_once": ("matched_client", "control_iou_guided", ONCE),
    # Federated gradients, noise not granted: SSIM of the images without defence and under noise of the gradient's size.
    "ssim_fl": ("gradient_attacks", "ssim", f"{IMAGES} and defence == 'none'"),
    "ssim_noisy": ("gradient_attacks", "ssim", f"{IMAGES} and defence == 'noise' and level == 1"),
    # DP-LDM on digits: accuracy of classifiers trained on its samples; who is identified by a share at ε = 10.
    "acc_10": ("dp", "downstream_acc", f"{DIGITS} and 9.9 < epsilon <= 10"),
    "acc_inf": ("dp", "downstream_acc", f"{DIGITS} and epsilon > 1e9"),
    "id_share": ("dp_shares", "identified", "part == 'candidates' and noise == 'central' and epsilon == 10"),
}
"""Name -> (table, column, rows): the mean of the column over the rows."""


def write_headlines(metrics: Path, path: Path) -> dict[str, float]:
    """Write `HEADLINES`, from the tables below `metrics`, to a JSON file and return them.

    What was not run, or not scored in one of its rows, is left out.

    Raises:
        InputError: a table is missing, or lacks a column; the file cannot be written.
    """
    means = {
        name: read_table(metrics / f"{table}.csv", column, empty=True).query(rows)[column].mean(skipna=False)
        for name, (table, column, rows) in HEADLINES.items()
    }
    found = {name: round(float(mean), 4) for name, mean in means.items() if pd.notna(mean)}
    storage.write_text(path, json.dumps(found, indent=1) + "\n")
    return found
