"""HTML for the explorer: small self-contained pieces, every text escaped, nothing loaded from anywhere."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from splitlab.core.labels import UNMEASURED, UNSCORED

STYLE = """<style>
.sl { --fg: var(--jp-ui-font-color1, #212121); --dim: var(--jp-ui-font-color2, #616161);
  --line: var(--jp-border-color2, #e0e0e0); --hit: #c8402f; --bar: #9db4c8; --good: #2e7d4f;
  color: var(--fg); font: 13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif); overflow-x: auto; }
.sl .dim { color: var(--dim); }
.sl-groups { display: flex; gap: 24px; margin: 10px 0 6px; padding: 0 1px; }
.sl-group { border-top: 3px solid var(--bar); padding-top: 5px; }
.sl-groups figure { flex: 0 1 160px; min-width: 0; }
.sl-group.private { border-color: var(--good); } .sl-group.reconstructed { border-color: var(--hit); }
.sl-pictures { display: flex; gap: 8px; margin-top: 6px; }
.sl figure { margin: 0; }
.sl img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block; border-radius: 3px; margin: 0;
  outline: 1px solid var(--line); }
.sl figcaption { color: var(--dim); font-size: 12px; text-align: center; margin-top: 2px; }
.sl-nothing { aspect-ratio: 1; border: 1px dashed var(--line); border-radius: 3px; display: flex; align-items: center;
  justify-content: center; text-align: center; color: var(--dim); padding: 8px; box-sizing: border-box; }
.sl-chips { display: flex; flex-wrap: wrap; gap: 6px 26px; margin: 8px 0 4px; }
.sl-chips b { display: block; font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums; }
.sl-chips span { color: var(--dim); font-size: 12px; }
.sl table { border-collapse: collapse; font: inherit; margin: 6px 0; }
.sl th, .sl td { text-align: left; padding: 3px 14px 3px 0; border: 0; background: none; white-space: nowrap; }
.sl th { color: var(--dim); font-weight: 400; font-size: 12px; }
.sl td.number { text-align: right; font-variant-numeric: tabular-nums; }
.sl td.wrap { white-space: normal; }
.sl tr.chosen td { font-weight: 600; }
.sl td.plot { width: 300px; min-width: 150px; padding: 0; position: relative; height: 24px; }
.sl .bar { position: absolute; top: 6px; bottom: 6px; left: 0; background: var(--bar); border-radius: 0 2px 2px 0; }
.sl tr.chosen .bar { background: var(--hit); }
.sl .rule { position: absolute; top: 0; bottom: 0; width: 0; border-left: 2px solid var(--fg); }
.sl .rule.guess { border-left: 2px dotted var(--fg); }
.sl .key { display: inline-block; height: 12px; border-left: 2px solid var(--fg); margin: 0 5px -2px 0; }
.sl .key.guess { border-left-style: dotted; }
.sl-message { border-left: 4px solid #c99a2e; padding: 6px 12px; margin: 8px 0; max-width: 90ch; }
.sl-gallery { display: flex; flex-wrap: wrap; gap: 12px 16px; margin-top: 8px; }
.sl-gallery .sl-pictures { gap: 2px; margin: 0; } .sl-gallery figure { width: 164px; }
.sl-gallery .sl-pictures > * { width: 81px; }
.sl-alone .sl-pictures { display: block; } .sl-alone figcaption { text-align: left; }
.sl-alone img { width: auto; max-width: 100%; aspect-ratio: auto; }
.sl-gallery figcaption { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
</style>"""


def escape(text: object) -> str:
    """Make text safe to show: prompts, paths and errors are data."""
    return html.escape(str(text))


def image(content: bytes, alt: str) -> str:
    """Return a PNG as an element that carries its bytes."""
    source = base64.b64encode(content).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{escape(alt)}" draggable="false">'


def block(*parts: str) -> str:
    """Wrap parts so that the style sheet applies to them."""
    return f'<div class="sl">{"".join(parts)}</div>'


def message(text: object, *, hint: str = "") -> str:
    """Say what is missing or wrong; `hint` is trusted HTML."""
    return block(f'<div class="sl-message">{escape(text)}{" " + hint if hint else ""}</div>')


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


def groups(content: Sequence[tuple[str, str, Sequence[Any]]]) -> str:
    """Show groups of pictures (`explore.Picture`) side by side."""
    parts = []
    for title, subtitle, pictures in content:
        figures = "".join(
            "<figure>"
            + (image(p.png, f"{title}: {p.caption}") if p.png else f'<div class="sl-nothing">{escape(p.note)}</div>')
            + f"<figcaption>{escape(p.caption)}</figcaption></figure>"
            for p in pictures
        )
        size = len(pictures)
        kind = escape(title.lower().replace(" ", "-"))
        heading = f"<b>{escape(title)}</b> <span class='dim'>{escape(subtitle)}</span>"
        width = f"flex: {size} 1 0; max-width: {168 * size - 8}px"
        body = f'{heading}<div class="sl-pictures">{figures}</div>'
        parts.append(f'<div class="sl-group {kind}" style="{width}">{body}</div>')
    return block(f'<div class="sl-groups">{"".join(parts)}</div>')


def chips(values: Mapping[str, str]) -> str:
    """Show a few numbers, large, each with its name below."""
    parts = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values.items())
    return block(f'<div class="sl-chips">{"".join(parts)}</div>')


def rows(content: Sequence[tuple[str, str]]) -> str:
    """Show (what, value) rows."""
    lines = (f'<tr><td class="dim">{escape(k)}</td><td class="wrap">{escape(v)}</td></tr>' for k, v in content)
    return block(f"<table>{''.join(lines)}</table>")


def bars(content: Sequence[Mapping[str, Any]], *, chosen: str, guess: float, ceiling: float) -> str:
    """Compare attacks on one sample: a PSNR bar each (the seeds' mean), with the two reference lines through all.

    Args:
        content: rows of `label`, `uses`, `attack` and, by seed, `psnr_db`, `ssim`, `identified`; NaN: not scored.
        chosen: the attack to set off.
        guess: PSNR without information, dB.
        ceiling: PSNR of the VAE, dB.
    """
    shown = [guess, ceiling, *(value for row in content for value in row["psnr_db"])]
    most = 1.08 * max([1.0, *(value for value in shown if not math.isnan(value))])

    def rule(value: float, kind: str) -> str:
        return "" if math.isnan(value) else f'<div class="rule {kind}" style="left:{100 * value / most:.2f}%"></div>'

    lines = []
    for row in content:
        psnr, ssim = (sum(row[name]) / len(row[name]) for name in ("psnr_db", "ssim"))
        bar = "" if math.isnan(psnr) else f'<div class="bar" style="width:{100 * max(psnr, 0) / most:.2f}%"></div>'
        lines.append(
            f'<tr class="{"chosen" if row["attack"] == chosen else ""}"><td>{escape(row["label"])}</td>'
            f'<td class="dim">{escape(row["uses"])}</td>'
            f'<td class="plot">{bar}{rule(guess, "guess")}{rule(ceiling, "")}</td>'
            f'<td class="number">&nbsp;{number(psnr)}</td><td class="number">{number(ssim, 2)}</td>'
            f"<td>{verdict(row['identified'])}</td></tr>"
        )
    head = "<tr><th>attack</th><th>uses</th><th></th><th>PSNR, dB</th><th>SSIM</th><th>identified</th></tr>"
    legend = (
        f'<span class="dim"><span class="key guess"></span>no information {number(guess, unit=" dB")} &emsp; '
        f'<span class="key"></span>VAE ceiling {number(ceiling, unit=" dB")}</span>'
    )
    return block(f"<table>{head}{''.join(lines)}</table>{legend}")


def settings(content: Sequence[Mapping[str, Any]]) -> str:
    """Compare settings: a bar for the share identified, with a rule where an ideal attacker stands.

    Args:
        content: rows of `label`, `share` and `ideal` (0 to 1), `control`, and whether `chosen`; NaN: not measured.
    """

    def percent(value: float) -> str:
        return number(100 * value, 0, "%", missing=UNMEASURED)

    def mark(kind: str, side: str, value: float) -> str:
        return "" if math.isnan(value) else f'<div class="{kind}" style="{side}:{99 * value:.2f}%"></div>'

    lines = [
        f'<tr class="{"chosen" if row["chosen"] else ""}"><td class="wrap">{escape(row["label"])}</td>'
        f'<td class="plot">{mark("bar", "width", row["share"])}{mark("rule", "left", row["ideal"])}</td>'
        f'<td class="number">&nbsp;{percent(row["share"])}</td><td class="number">{percent(row["ideal"])}</td>'
        f'<td class="number">{number(row["control"], 2, missing=UNMEASURED)}</td></tr>'
        for row in content
    ]
    head = "<tr><th>setting</th><th></th><th>identified</th><th>ideal</th><th>control</th></tr>"
    legend = '<span class="dim"><span class="key"></span>ideal: somebody who holds the candidates, by Bayes</span>'
    return block(f"<table>{head}{''.join(lines)}</table>{legend}")


def picture(data: bytes, caption: str) -> str:
    """Show one picture with its caption."""
    shown = f'<div class="sl-pictures">{image(data, caption)}</div>'
    return block(f"<figure class='sl-alone'>{shown}<figcaption>{escape(caption)}</figcaption></figure>")


def gallery(triples: Sequence[tuple[bytes, bytes, str]]) -> str:
    """Show (hint, generated image, prompt) triples."""
    cards = (
        f'<figure title="{escape(prompt)}"><div class="sl-pictures"><div>{image(hint, "hint")}</div>'
        f"<div>{image(made, 'generated: ' + prompt)}</div></div><figcaption>{escape(prompt)}</figcaption></figure>"
        for hint, made, prompt in triples
    )
    return block(f'<div class="sl-gallery">{"".join(cards)}</div>')
