"""How the explorer looks: numbers in words, and pieces of HTML from `templates/parts.html` that load nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from splitlab.core.labels import UNMEASURED, UNSCORED
from splitlab.core.templates import macros

_PARTS = macros("splitlab.explorer")

STYLE: Markup = _PARTS.style()

image, note, caption, groups, chips, rows, picture, gallery = (
    getattr(_PARTS, name) for name in ("image", "note", "caption", "groups", "chips", "rows", "picture", "gallery")
)
"""Pieces that are the macros of `templates/parts.html` themselves: from PNG bytes, numbers and texts to markup."""


def message(text: object, *, hint: str = "") -> Markup:
    """Say what is missing or wrong; `hint` may be HTML, as `Markup`."""
    return _PARTS.message(str(text), hint)


def number(value: float, digits: int = 1, unit: str = "", *, missing: str = UNSCORED) -> str:
    """Write a number; `missing` where there is none (NaN)."""
    return missing if math.isnan(value) else f"{value:.{digits}f}{unit}"


def verdict(values: Sequence[float]) -> str:
    """Say whether a sample was recognised: of one seed yes or no, of several in how many; NaN was not scored."""
    scored = [value for value in values if not math.isnan(value)]
    if not scored:
        return UNSCORED
    if len(values) == 1:
        return "yes" if scored[0] > 0.5 else "no"
    absent = f", {len(values) - len(scored)} {UNSCORED}" if len(scored) < len(values) else ""
    return f"{sum(value > 0.5 for value in scored)} of {len(scored)}{absent}"


def bars(content: Sequence[Mapping[str, Any]], *, chosen: str, guess: float, ceiling: float) -> Markup:
    """Compare attacks on one sample: a PSNR bar each (the seeds' mean), with the two reference lines through all.

    Args:
        content: rows of `label`, `uses`, `attack` and, by seed, `psnr_db`, `ssim`, `identified`; NaN: not scored.
        chosen: the attack to set off.
        guess: PSNR without information, dB.
        ceiling: PSNR of the VAE, dB.
    """
    shown = [guess, ceiling, *(value for row in content for value in row["psnr_db"])]
    most = 1.08 * max([1.0, *(value for value in shown if not math.isnan(value))])
    lines = []
    for row in content:
        psnr, ssim = (sum(row[name]) / len(row[name]) for name in ("psnr_db", "ssim"))
        lines.append(
            {
                "chosen": row["attack"] == chosen,
                "words": [row["label"], row["uses"]],
                "bar": _percent(max(psnr, 0.0) / most),
                "rules": {"guess": _percent(guess / most), "": _percent(ceiling / most)},
                "numbers": [number(psnr), number(ssim, 2)],
                "verdicts": [verdict(row["identified"])],
            }
        )
    titles = ("attack", "uses", "", "PSNR, dB", "SSIM", "identified")
    keys = {
        "guess": f"no information {number(guess, unit=' dB')}",
        "": f"VAE ceiling {number(ceiling, unit=' dB')}",
    }
    return _PARTS.bars(lines, titles, keys)


def _percent(share: float) -> float | None:
    """Return where on its axis a share is; None: nowhere."""
    return None if math.isnan(share) else 100.0 * share


def settings(content: Sequence[Mapping[str, Any]]) -> Markup:
    """Compare settings: a bar for the share identified, with a rule where an ideal attacker stands.

    Args:
        content: rows of `label`, `share` and `ideal` (0 to 1), `control`, and whether `chosen`; NaN: not measured.
    """
    lines = [
        {
            "chosen": row["chosen"],
            "words": [row["label"]],
            "bar": _percent(0.99 * row["share"]),
            "rules": {"": _percent(0.99 * row["ideal"])},
            "numbers": [
                number(100 * row["share"], 0, "%", missing=UNMEASURED),
                number(100 * row["ideal"], 0, "%", missing=UNMEASURED),
                number(row["control"], 2, missing=UNMEASURED),
            ],
        }
        for row in content
    ]
    titles = ("setting", "", "identified", "ideal", "control")
    return _PARTS.bars(lines, titles, {"": "ideal: somebody who holds the candidates, by Bayes"})
