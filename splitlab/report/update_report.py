"""The report's part on federated learning: what a shared update gives away (S2), from saved artefacts only."""

import html
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.errors import InputError
from splitlab.core.labels import UNMEASURED, counted, percent
from splitlab.core.tables import read_timed
from splitlab.federated.attacks import NO_INFORMATION, ON_IMAGES, inversion_label
from splitlab.report.cells import DASH, figure, lay_out, number
from splitlab.report.claims import HOLDS, PARTLY, REFUTED

ALIKE = 0.9
"""SSIM from which a reconstruction is called near-identical."""

BLIND = ("the update", "text", "batch_size")
"""What an attacker knows who knows neither noise nor timestep."""


def alike(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Say which rows are near-identical: SSIM of `ALIKE`, or what the VAE's own decoding reaches if that is less."""
    return rows["ssim"] >= (0.99 * rows["ceiling_ssim"]).fillna(1.0).clip(upper=ALIKE)


@dataclass(frozen=True)
class UpdateMaterial:
    """What this part is made of.

    Attributes:
        table: `reports/metrics/gradient_attacks.csv`.
        figures: folder of its pictures.
    """

    table: pd.DataFrame
    figures: Path

    @property
    def images(self) -> pd.DataFrame:
        """Rows of attacks after images, on undefended epsilon gradients or not."""
        return self.table[self.table["ssim"].notna() & (self.table["attack"] != NO_INFORMATION)]

    @property
    def tried(self) -> pd.DataFrame:
        """Rows of attacks after images, those that were refused or not scored too: they have no SSIM."""
        return self.table[self.table["attack"].isin(ON_IMAGES)]

    @property
    def plain(self) -> pd.DataFrame:
        """Rows of undefended updates."""
        return self.table[self.table["defence"] == "none"]


def load_updates(metrics: Path, figures: Path) -> UpdateMaterial:
    """Read what this part is made of.

    Raises:
        InputError: the table or the pictures are missing; the message says what makes them.
    """
    table = read_timed(metrics / "gradient_attacks.csv")
    if not figures.exists():
        raise InputError(f"{figures}: missing; run `dvc repro` first, which draws the pictures")
    return UpdateMaterial(table, figures)


def conclusion(material: UpdateMaterial) -> Markdown:
    """Say what was found, from the table."""
    plain = material.plain
    times, prompts = (plain.dropna(subset=[f"{what}_exact"]) for what in ("timestep", "prompt"))
    lines = []
    for what, rows in (("Timesteps", times[times["attack"] == "timesteps"]), ("Prompts", prompts)):
        rows = rows[rows["attack"] != NO_INFORMATION]
        if len(rows):
            column = "timestep_exact" if what == "Timesteps" else "prompt_exact"
            worst = rows.sort_values(column, kind="stable").iloc[0]
            lines.append(
                f"- **{what}** are read off undefended updates exactly in {percent(float(rows[column].mean()))} of "
                f"{counted(len(rows), 'cell')} on average; worst: {percent(float(worst[column]))} ({worst['cell']})"
                f"{_refusals(plain, what.lower())}."
            )
    images = material.images
    blind = images[(images["defence"] == "none") & images["knowledge"].isin(BLIND)]
    best = _best(blind)
    if len(best):
        lines.append(
            f"- **Images, noise unknown to the attacker**: near-identical (SSIM ≥ {ALIKE}, or as near as the VAE gets) "
            f"in {int(alike(best).sum())} of {counted(len(best), 'undefended cell')}."
        )
    lines += _contrast(images[images["defence"] == "none"])
    return Markdown("\n".join(lines))


def _refusals(plain: pd.DataFrame, attack: str) -> str:
    """Say on how many undefended cells an attack was refused, which no mean counts."""
    refused = plain[plain["attack"].eq(attack) & plain["refused"].notna()]
    return f"; in {counted(len(refused), 'further cell')} the attack was refused" if len(refused) else ""


def _contrast(images: pd.DataFrame) -> list[str]:
    """Set the strongest attack against GIDM's own optimiser, cell by cell."""
    own = images[images["attack"] == "gidm"].set_index("cell")
    rows = []
    for cell, gidm in own.iterrows():
        others = images[(images["cell"] == cell) & ~images["attack"].isin(["gidm", "gidm_plus"])]
        if len(others):
            rows.append((others.sort_values("ssim", kind="stable").iloc[-1], gidm))
    if not rows:
        return []
    ahead = sum(float(best["ssim"]) > float(gidm["ssim"]) for best, gidm in rows)
    cheaper = sum(float(best["cpu_s"]) < float(gidm["cpu_s"]) for best, gidm in rows)
    spent = f", with less CPU time in {cheaper}" if any(pd.notna(gidm["cpu_s"]) for _, gidm in rows) else ""
    means = [sum(float(pair[i]["ssim"]) for pair in rows) / len(rows) for i in (0, 1)]
    return [
        f"- **Against GIDM's own optimiser**, which is told noise and timestep: the best of ours reaches a mean SSIM "
        f"of {means[0]:.2f} where GIDM's reaches {means[1]:.2f}; ahead in {ahead} of {counted(len(rows), 'cell')}"
        f"{spent}. GIDM's budget here is far below the paper's 5,000 evaluations."
    ]


def claims_table(material: UpdateMaterial) -> HTML:
    """Set S2's claims against the measurements."""
    tried, plain = material.tried, material.plain
    undefended = tried[tried["defence"] == "none"]
    granted = undefended[undefended["knowledge"].str.contains("noise")]["cell"]
    known = undefended[undefended["cell"].isin(granted)]  # who is granted a fact may do without it
    blind = undefended[undefended["knowledge"].isin(BLIND)]
    columns = {"S2 says": "says", "we measured": "", "verdict": ""}
    rows = [
        _claim(
            "Noise and timestep known, images come back nearly identical from a shared gradient.",
            known,
            f"Holds if in every cell the best attack reaches SSIM {ALIKE}, or 99 % of what the VAE's own decoding does "
            "where that is less; refuted if in none.",
        ),
        _claim(
            "Noise and timestep unknown, they do so too (GIDM+).",
            blind,
            f"The same rule, for attackers who start at random and are told neither. {_plus(undefended)}",
        ),
    ]
    times = plain[plain["attack"] == "timesteps"].dropna(subset=["timestep_exact"])
    exact = float(times["timestep_exact"].mean()) if len(times) else float("nan")
    joint = plain[plain["attack"] == "gidm_plus"]["timestep_exact"].mean()
    rows.append(
        (
            "The timestep, too, comes back from a shared gradient.",
            f"The time embedding's gradient tells it in closed form, exactly in {percent(exact)} of undefended updates "
            f"({counted(len(times), 'cell')}{_refusals(plain, 'timesteps')}); GIDM+'s joint optimisation, from random "
            f"starts, in {percent(float(joint))}.<small>Holds if the closed form is exact in all.</small>",
            _verdict(UNMEASURED if math.isnan(exact) else HOLDS if exact == 1.0 else PARTLY if exact else REFUTED),
        )
    )
    return lay_out(columns, {"": rows})


def _claim(says: str, rows: pd.DataFrame, rule: str) -> tuple[str, str, str]:
    best = _best(rows)
    n, absent = int(alike(best).sum()), sorted(set(rows["cell"]) - set(best["cell"]))
    verdict = UNMEASURED if best.empty else HOLDS if n == len(best) and not absent else PARTLY if n else REFUTED
    entries = "".join(
        f"<li>{html.escape(str(row['cell']))}: {inversion_label(str(row['attack']))}, SSIM {row['ssim']:.2f}, "
        f"{_seconds(row['cpu_s'])}n = {row['n'] * row['n_seeds']}</li>"
        for _, row in best.iterrows()
    )
    entries += "".join(f"<li>{html.escape(str(cell))}: nothing was recovered or scored</li>" for cell in absent)
    return html.escape(says), f"<ul>{entries}</ul><small>{rule}</small>", _verdict(verdict)


def _seconds(cpu_s: float) -> str:
    return "" if pd.isna(cpu_s) else f"{cpu_s:.1f} CPU s per image, "


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the row of the largest SSIM of every cell that has one."""
    rows = rows.dropna(subset=["ssim"])
    return rows.loc[rows.groupby("cell")["ssim"].idxmax()] if len(rows) else rows


def _plus(rows: pd.DataFrame) -> str:
    own = rows[rows["attack"] == "gidm_plus"].dropna(subset=["ssim"])
    if own.empty:
        return ""
    return (
        f"GIDM+ itself, from random starts, reaches SSIM {own['ssim'].mean():.2f}; the released code starts its "
        "unknown noise at the true noise."
    )


def _verdict(verdict: str) -> str:
    return f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'


def pictures(material: UpdateMaterial) -> HTML:
    """Show what came back, and how it came about."""
    captions = {
        "images": "private images (first row) and what each attack makes of their updates; one column per cell",
        "strip": "one update, iteration by iteration; the last column is the private image",
    }
    parts = [
        figure(path, f"{path.stem.partition('-')[2]}: {text}")
        for kind, text in captions.items()
        for path in sorted(material.figures.glob(f"{kind}-*.png"))
    ]
    return HTML("".join(parts))


def curve(material: UpdateMaterial) -> HTML:
    """Show what noise on the update destroys."""
    path = material.figures / "curve.png"
    if not path.exists():
        return HTML('<p class="note">No defence was measured at several levels.</p>')
    return HTML(figure(path, "Gaussian noise on the update: what still comes back. Grey: without any information."))


def table(material: UpdateMaterial) -> HTML:
    """Show every attack on every cell."""
    columns = {"attack": "name"} | dict.fromkeys(
        ("SSIM", "± images", "PSNR, dB", "top-1", "timesteps", "prompts", "evaluations", "CPU s", "n"), "number"
    )
    groups: dict[str, list[tuple[str, ...]]] = {}
    for cell, rows in material.table.groupby("cell", sort=False):
        ceiling = rows["ceiling_ssim"].iloc[0]
        note = "" if pd.isna(ceiling) else f" <small>SSIM of the VAE alone {ceiling:.2f}</small>"
        groups[html.escape(str(cell)) + note] = [_row(row) for _, row in rows.iterrows()]
    chances = sorted(material.table["id_chance"].dropna().unique())
    among = ", ".join(f"{1 / chance:.0f} private images (chance {percent(chance)})" for chance in chances)
    note = f'<p class="note"><i>Top-1</i>: identification among {among}.</p>' if among else ""
    return HTML(f"{lay_out(columns, groups).data}{note}")


def _row(row: pd.Series) -> tuple[str, ...]:
    knowledge = str(row["knowledge"])
    granted = () if knowledge in ("the update", "nothing") else tuple(knowledge.split(" + "))
    label = html.escape(inversion_label(str(row["attack"]), granted))
    if isinstance(row["refused"], str):
        label += f"<small>refused: {html.escape(row['refused'])}</small>"
    exact = (DASH if pd.isna(row[f"{w}_exact"]) else percent(float(row[f"{w}_exact"])) for w in ("timestep", "prompt"))
    top = DASH if pd.isna(row["id_top1"]) else percent(float(row["id_top1"]))
    return (
        label,
        number(row["ssim"], 3),
        number(row["ssim_std"], 3),
        number(row["psnr_db"], 1),
        top,
        *exact,
        number(row["n_evals"] or None),
        number(row["cpu_s"], 2),
        f"{row['n']}×{row['n_seeds']}",
    )
