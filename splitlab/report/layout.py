"""What the report's tables and pictures are laid out with; their HTML is in `templates/parts.html`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from IPython.display import HTML, Markdown
from markupsafe import Markup

from splitlab.core.errors import InputError
from splitlab.core.labels import SCHEME_WORDS, UNSCORED, percent
from splitlab.core.tables import read_timed
from splitlab.core.templates import macros
from splitlab.report.claims import Claim

DASH = "–"

PERCENT = -1
"""In place of a number of digits: a share, written as a percentage."""

COLUMNS = {
    "n_clients": ("clients", 0),
    "up_bytes_per_sample": ("up, bytes per sample", 0),
    "down_bytes_per_sample": ("down, bytes per sample", 0),
    "psnr_db": ("PSNR, dB", 1),
    "psnr_db_std": ("± images", 1),
    "psnr_db_seed_std": ("± seeds", 1),
    "ssim": ("SSIM", 2),
    "ssim_std": ("± images", 2),
    "share": ("way", PERCENT),
    "id_top1": ("top-1", PERCENT),
    "id_worst": ("worst bucket", PERCENT),
    "hint_id_top1": ("hint top-1", PERCENT),
    "both_id_top1": ("both", PERCENT),
    "hint_psnr_db": ("hint, dB", 1),
    "hint_iou": ("hint IoU", 2),
    "timestep_exact": ("timesteps", PERCENT),
    "prompt_exact": ("prompts", PERCENT),
    "n_evals": ("evaluations", 0),
    "cpu_s": ("CPU s", 2),
    "n_seeds": ("seeds", 0),
    "control_iou": ("control IoU", 2),
    "downstream_acc": ("accuracy", PERCENT),
    "frechet": ("Fréchet", 2),
    "mia_auc": ("membership AUC", 3),
    "audit_epsilon_lb": ("audited ε ≥", 2),
    "step_s": ("s per step", 2),
    "leak": ("leak", 2),
    "utility": ("utility", 2),
    "ceiling": ("at most", 2),
    "floor": ("no private data", 2),
    "reference": ("no defence", 2),
    "kept": ("kept", 2),
}
"""Column of a result table -> how it is called in the report, and to how many digits it is written.

What is not listed is a count, called by its name.
"""

_PARTS = macros("splitlab.report")

aside: Callable[..., Markup] = _PARTS.aside
"""A text with other texts in small type behind it, or below it in a cell: `aside(text, *small)`."""

badge: Callable[..., Markup] = _PARTS.badge
"""A verdict in its colour, said in other `words` if there are any: `badge(verdict, words="")`."""

code: Callable[[str], Markup] = _PARTS.code


@dataclass(frozen=True)
class Part:
    """What a part of the report is made of: a result table, and the folder of the pictures drawn from it."""

    table: pd.DataFrame
    figures: Path


def read_part(table: Path, figures: Path) -> tuple[pd.DataFrame, Path]:
    """Read what a `Part` is made of.

    Raises:
        InputError: the table or the pictures are missing; the message says what makes them.
    """
    if not figures.exists():
        raise InputError(f"{figures}: missing; run `dvc repro` first, which draws the pictures")
    return read_timed(table), figures


class Number(str):
    """A cell that is aligned as a number."""

    kind = "number"


Row = Mapping[str, str]
"""A table's row: title of a column -> cell. All rows of a table have the same titles."""

Record = Mapping[str, Any] | pd.Series
"""A row of a result table."""


def table(rows: Sequence[Row] | Mapping[Any, Sequence[Row]], *, first: str = "name", notes: Iterable[str] = ()) -> HTML:
    """Lay out a table; of no rows, only the notes.

    Args:
        rows: the rows, or heading -> the rows below it.
        first: the style of the first column: a "name", a "setting", or what a paper "says".
        notes: paragraphs below the table, *words* between asterisks emphasised; empty ones are left out.
    """
    groups = rows if isinstance(rows, Mapping) else {"": rows}
    columns = next((row for group in groups.values() for row in group), {})
    return HTML(_PARTS.table(columns, groups, first, list(notes)))


def claims(who: str, judged: Iterable[Claim]) -> HTML:
    """Set a paper's claims against the measurements, each with its verdict and the rule behind it."""
    rows = [
        {
            f"{who} says": claim.says,
            "we measured": _PARTS.evidence(claim.measured, claim.rule),
            "verdict": badge(claim.verdict),
        }
        for claim in judged
    ]
    return table(rows, first="says")


def figure(path: Path, caption: str) -> HTML:
    """Lay out a picture, embedded."""
    return HTML(_PARTS.figure(path.read_bytes(), caption))


def section(title: str, *parts: HTML, anchor: str = "", says: str = "") -> HTML:
    """Lay out a paragraph and parts below a heading of the third level."""
    return HTML(_PARTS.section(title, anchor, says, *parts))


def together(parts: Iterable[HTML]) -> HTML:
    """Lay out parts one after the other."""
    return HTML("".join(part.data for part in parts))


def bullets(sentences: Iterable[str]) -> Markdown:
    """Show sentences, which may have Markdown in them, as a list."""
    return Markdown("\n".join(f"- {sentence}" for sentence in sentences))


def records(frame: pd.DataFrame) -> list[pd.Series]:
    """Return a result table's rows."""
    return [row for _, row in frame.iterrows()]


def by_dataset(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Divide a result table by its data sets, in its order."""
    return [(str(data), own) for data, own in frame.groupby("dataset", sort=False)]


def number(value: Any, digits: int = 0, *, scale: float = 1.0, missing: str = DASH) -> Number:
    """Write a number, or with `digits` of `PERCENT` a share as a percentage; `missing` where there is none."""
    if value is None or pd.isna(value):
        return Number(missing)
    return Number(percent(float(value)) if digits == PERCENT else f"{float(value) * scale:,.{digits}f}")


def numbers(
    row: Record, columns: str, *, missing: str = DASH, digits: Mapping[str, int] = MappingProxyType({})
) -> dict[str, str]:
    """Write columns of a result table, their names separated by spaces, as cells; `digits`: other than in `COLUMNS`."""
    cells: dict[str, str] = {}
    for name in columns.split():
        title, usual = COLUMNS.get(name, (name, 0))
        cells[title] = number(row[name], digits.get(name, usual), missing=missing)
    return cells


def means(rows: pd.DataFrame, columns: str, applies: bool | None = None, *, missing: str = UNSCORED) -> dict[str, str]:
    """Write the means of columns as `numbers` does; a dash where there is none.

    Args:
        rows: a result table.
        columns: names, separated by spaces.
        applies: whether there are such numbers at all; None: where a column has any.
        missing: what stands where a part of a column is missing: the mean of the others would be one over fewer than
            is said.
    """
    cells: dict[str, str] = {}
    for name in columns.split():
        there = rows[name].notna().any() if applies is None else applies
        mean = {name: float(rows[name].mean(skipna=False)) if there else None}
        cells |= numbers(mean, name, missing=missing if there else DASH)
    return cells


def bracketed(names: Iterable[object]) -> str:
    """Write names in brackets behind what they are counted by; nothing for none."""
    listed = ", ".join(map(str, names))
    return f" ({listed})" if listed else ""


def scheme_words(scheme: str) -> str:
    """Say which scheme a run has."""
    return SCHEME_WORDS.get(scheme, scheme)


def in_words(defences: str) -> str:
    """Say a table's defences cell in words."""
    words = {"symsigmoid": "symsigmoid", "half": "16 bits", "hide_prompts": "hidden prompts"}
    parts = [words.get(part, part.replace("_", " ").replace("=", " ")) for part in defences.split()]
    return ", ".join(parts) if parts else "none"
