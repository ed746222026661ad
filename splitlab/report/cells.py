"""What the report's tables and pictures are laid out with."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML

from splitlab.core.labels import UNSCORED, percent

DASH = "–"


def lay_out(columns: Mapping[str, str], groups: Mapping[str, Iterable[Sequence[str]]]) -> HTML:
    """Lay out cells that are HTML already; `columns` maps titles to CSS classes, `groups` headings (or "") to rows."""
    body = []
    for title, rows in groups.items():
        if title:
            body.append(f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">{title}</th></tr>')
        for row in rows:
            cells = (f'<td class="{kind}">{cell}</td>' for kind, cell in zip(columns.values(), row, strict=True))
            body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th class="{kind}" scope="col">{title}</th>' for title, kind in columns.items())
    return HTML(f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>')


def number(value: Any, digits: int = 0, *, scale: float = 1.0) -> str:
    """Write a number for a table cell; a dash where there is none."""
    return DASH if value is None or pd.isna(value) else f"{float(value) * scale:,.{digits}f}"


def mean_of(values: pd.Series, applies: bool, digits: int | None = None, *, missing: str = UNSCORED) -> str:
    """Write the mean of a column, as a percentage without `digits`; a dash where there is no such number.

    `missing` where a part of the values is missing: the mean of the others would be one over fewer than is said.
    """
    if not applies:
        return DASH
    mean = float(values.mean(skipna=False))
    return missing if math.isnan(mean) else percent(mean) if digits is None else number(mean, digits)


def in_words(defences: str) -> str:
    """Say a table's defences cell in words."""
    words = {"symsigmoid": "symsigmoid", "half": "16 bits", "hide_prompts": "hidden prompts"}
    parts = [words.get(part, part.replace("_", " ").replace("=", " ")) for part in defences.split()]
    return ", ".join(parts) if parts else "none"


def figure(path: Path, caption: str) -> str:
    """Return a picture as HTML, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    label = html.escape(caption, quote=True)
    return f'<figure><img alt="{label}" src="data:image/png;base64,{data}"><figcaption>{label}</figcaption></figure>'
