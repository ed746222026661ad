"""The report's part on federated learning: what a shared update gives away (S2), from saved artefacts only."""

from pathlib import Path

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.labels import counted, percent
from splitlab.federated.attacks import INVERSIONS, NO_INFORMATION, ON_IMAGES, finding, inversion_label
from splitlab.federated.defences import defence_label
from splitlab.report import layout
from splitlab.report.claims import Claim, judged
from splitlab.study.results import words

ALIKE = 0.9
"""SSIM from which a reconstruction is called near-identical."""

PAPER = [record for record in INVERSIONS.values() if record.family == "GIDM"]
GIVEN, JOINT = ([record.name for record in PAPER if ("noise" in record.needs) == told] for told in (True, False))
"""The paper's own attacks: those that are told the noise, and those that look for it together with the image."""

TOLD = ("noise", "timesteps")
"""What an attacker knows who does not start blind."""


def told(rows: pd.DataFrame, *facts: str) -> "pd.Series[bool]":
    """Say whose attackers were granted any of these facts."""
    return rows["granted"].map(lambda cell: bool(set(words(cell)) & set(facts))).astype(bool)


def alike(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Say which rows are near-identical: SSIM of `ALIKE`, or what the VAE's own decoding reaches if that is less."""
    return rows["ssim"] >= (0.99 * rows["ceiling_ssim"]).fillna(1.0).clip(upper=ALIKE)


class UpdateMaterial(layout.Part):
    """What this part is made of: `gradient_attacks.csv` and its pictures."""

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
    """Read what this part is made of; see `layout.read_part`."""
    return UpdateMaterial(*layout.read_part(metrics / "gradient_attacks.csv", figures))


def conclusion(material: UpdateMaterial) -> Markdown:
    """Say what was found, from the table."""
    plain = material.plain
    lines = []
    for fact, column in {"timesteps": "timestep_exact", "prompts": "prompt_exact"}.items():
        rows = plain[plain["attack"].isin(finding(fact))].dropna(subset=[column])
        if len(rows):
            worst = rows.sort_values(column, kind="stable").iloc[0]
            lines.append(
                f"**{fact.capitalize()}** are read off undefended updates exactly in "
                f"{percent(float(rows[column].mean()))} of "
                f"{counted(len(rows), 'cell')} on average; worst: {percent(float(worst[column]))} ({worst['cell']})"
                f"{_refusals(plain, fact)}."
            )
    undefended = material.images[material.images["defence"] == "none"]
    best = _best(undefended[~told(undefended, *TOLD)])
    if len(best):
        lines.append(
            f"**Images, noise unknown to the attacker**: near-identical (SSIM ≥ {ALIKE}, or as near as the VAE gets) "
            f"in {int(alike(best).sum())} of {counted(len(best), 'undefended cell')}."
        )
    return layout.bullets([*lines, *_contrast(undefended)])


def _refusals(plain: pd.DataFrame, fact: str) -> str:
    """Say on how many undefended cells the attack on a fact was refused, which no mean counts."""
    refused = plain[plain["attack"].isin(finding(fact)) & plain["refused"].notna()]
    return f"; in {counted(len(refused), 'further cell')} the attack was refused" if len(refused) else ""


def _contrast(images: pd.DataFrame) -> list[str]:
    """Set the strongest attack against GIDM's own optimiser, cell by cell."""
    rows = []
    for cell, gidm in images[images["attack"].isin(GIVEN)].set_index("cell").iterrows():
        others = images[(images["cell"] == cell) & ~images["attack"].isin([*GIVEN, *JOINT])]
        if len(others):
            rows.append((others.sort_values("ssim", kind="stable").iloc[-1], gidm))
    if not rows:
        return []
    ahead = sum(float(best["ssim"]) > float(gidm["ssim"]) for best, gidm in rows)
    cheaper = sum(float(best["cpu_s"]) < float(gidm["cpu_s"]) for best, gidm in rows)
    spent = f", with less CPU time in {cheaper}" if any(pd.notna(gidm["cpu_s"]) for _, gidm in rows) else ""
    means = [sum(float(pair[i]["ssim"]) for pair in rows) / len(rows) for i in (0, 1)]
    return [
        f"**Against GIDM's own optimiser**, which is told noise and timestep: the best of ours reaches a mean SSIM "
        f"of {means[0]:.2f} where GIDM's reaches {means[1]:.2f}; ahead in {ahead} of {counted(len(rows), 'cell')}"
        f"{spent}. GIDM's budget here is far below the paper's 5,000 evaluations."
    ]


def claims_table(material: UpdateMaterial) -> HTML:
    """Set S2's claims against the measurements."""
    undefended = material.tried[material.tried["defence"] == "none"]
    cells = undefended[told(undefended, "noise")]["cell"]
    known = undefended[undefended["cell"].isin(cells)]  # who is granted a fact may do without it
    blind = undefended[~told(undefended, *TOLD)]
    claims = [
        _images_claim(
            "Noise and timestep known, images come back nearly identical from a shared gradient.",
            known,
            f"Holds if in every cell the best attack reaches SSIM {ALIKE}, or 99 % of what the VAE's own decoding does "
            "where that is less; refuted if in none.",
        ),
        _images_claim(
            "Noise and timestep unknown, they do so too (GIDM+).",
            blind,
            f"The same rule, for attackers who start at random and are told neither. {_plus(undefended)}",
        ),
        _timestep_claim(material.plain),
    ]
    return layout.claims("S2", claims)


def _timestep_claim(plain: pd.DataFrame) -> Claim:
    times = plain[plain["attack"].isin(finding("timesteps"))].dropna(subset=["timestep_exact"])
    exact = float(times["timestep_exact"].mean()) if len(times) else float("nan")
    joint = plain[plain["attack"].isin(JOINT)]["timestep_exact"].mean()
    found = (
        f"The time embedding's gradient tells it in closed form, exactly in {percent(exact)} of undefended updates "
        f"({counted(len(times), 'cell')}{_refusals(plain, 'timesteps')}); GIDM+'s joint optimisation, from random "
        f"starts, in {percent(float(joint))}."
    )
    says, rule = "The timestep, too, comes back from a shared gradient.", "Holds if the closed form is exact in all."
    return judged(says, [found], rule, [exact == 1.0] if len(times) else [], partly=[exact > 0.0])


def _images_claim(says: str, rows: pd.DataFrame, rule: str) -> Claim:
    best = _best(rows)
    absent = sorted(set(rows["cell"]) - set(best["cell"]))
    measured = [
        f"{row['cell']}: {inversion_label(row['attack'])}, SSIM {row['ssim']:.2f}, "
        f"{_seconds(row['cpu_s'])}n = {row['n'] * row['n_seeds']}"
        for row in layout.records(best)
    ]
    measured += [f"{cell}: nothing was recovered or scored" for cell in absent]
    held = [*alike(best), *(False for _ in absent)] if len(best) else []
    return judged(says, measured, rule, held)


def _seconds(cpu_s: float) -> str:
    return "" if pd.isna(cpu_s) else f"{cpu_s:.1f} CPU s per image, "


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the row of the largest SSIM of every cell that has one."""
    rows = rows.dropna(subset=["ssim"])
    return rows.loc[rows.groupby("cell")["ssim"].idxmax()] if len(rows) else rows


def _plus(rows: pd.DataFrame) -> str:
    joint = rows[rows["attack"].isin(JOINT)].dropna(subset=["ssim"])
    if joint.empty:
        return ""
    return (
        f"GIDM+ itself, from random starts, reaches SSIM {joint['ssim'].mean():.2f}; the released code starts its "
        "unknown noise at the true noise."
    )


def pictures(material: UpdateMaterial) -> HTML:
    """Show what came back, and how it came about."""
    captions = {
        "images": "private images (first row) and what each attack makes of their updates; one column per cell",
        "strip": "one update, iteration by iteration; the last column is the private image",
    }
    return layout.together(
        layout.figure(path, f"{path.stem.partition('-')[2]}: {text}")
        for kind, text in captions.items()
        for path in sorted(material.figures.glob(f"{kind}-*.png"))
    )


def curve(material: UpdateMaterial) -> HTML:
    """Show what noise on the update destroys."""
    path = material.figures / "curve.png"
    if not path.exists():
        return layout.table([], notes=["No defence was measured at several levels."])
    return layout.figure(path, "Gaussian noise on the update: what still comes back. Grey: without any information.")


def table(material: UpdateMaterial) -> HTML:
    """Show every attack on every cell."""
    groups = {}
    for cell, rows in material.table.groupby("cell", sort=False):
        first = rows.iloc[0]
        notes = [] if first["defence"] == "none" else [defence_label(first["defence"], first["level"])]
        notes += [] if pd.isna(first["ceiling_ssim"]) else [f"SSIM of the VAE alone {first['ceiling_ssim']:.2f}"]
        title = layout.aside(cell, "; ".join(notes)) if notes else str(cell)
        groups[title] = [_row(row) for row in layout.records(rows)]
    chances = sorted(material.table["id_chance"].dropna().unique())
    among = ", ".join(f"{1 / chance:.0f} private images (chance {percent(chance)})" for chance in chances)
    return layout.table(groups, notes=[f"*Top-1*: identification among {among}."] if among else [])


def _row(row: pd.Series) -> dict[str, str]:
    label = inversion_label(row["attack"], words(row["granted"]))
    return {
        "attack": label if pd.isna(row["refused"]) else layout.aside(label, f"refused: {row['refused']}"),
        **layout.numbers(row, "ssim ssim_std", digits={"ssim": 3, "ssim_std": 3}),
        **layout.numbers(row, "psnr_db id_top1 timestep_exact prompt_exact"),
        "evaluations": layout.number(row["n_evals"] or None),
        **layout.numbers(row, "cpu_s"),
        "n": layout.Number(f"{row['n']}×{row['n_seeds']}"),
    }
