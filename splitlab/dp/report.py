"""The report's part on private fine-tuning (S3), from saved artefacts only."""

import html
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.artefacts import read_table
from splitlab.claims import HOLDS, PARTLY, REFUTED, UNMEASURED, counted, percent
from splitlab.dp.survey import PUBLIC, REAL
from splitlab.errors import InputError
from splitlab.report import figure, lay_out, number

WORDS = {
    "attention": "attention only (DP-LDM)",
    "lora": "LoRA on attention (DP-LoRA)",
    "unet": "the full U-Net",
    "blocks": "transformer blocks (DP-LDM)",
    "transformers": "spatial transformers (DP-LDM)",
}


@dataclass(frozen=True)
class DPMaterial:
    """What this part is made of.

    Attributes:
        table: `reports/metrics/dp.csv`.
        figures: folder of its pictures.
    """

    table: pd.DataFrame
    figures: Path

    def mean(self, trainable: str, target: float, column: str = "downstream_acc") -> float:
        """Return a column's mean over seeds at the ε nearest `target`; NaN where there is none within 5 %."""
        own = self.table[self.table["trainable"] == trainable]
        if not math.isinf(target):
            own = own[(own["epsilon"] - target).abs() <= 0.05 * target]
        else:
            own = own[own["epsilon"] == math.inf]
        return float(own[column].mean()) if len(own) else math.nan

    @property
    def targets(self) -> list[float]:
        """The ε of the runs, rounded to two digits, ascending."""
        runs = self.table[~self.table["trainable"].isin([PUBLIC, REAL])]
        return sorted({e if math.isinf(e) else float(f"{e:.2g}") for e in runs["epsilon"]})


def load_dp(metrics: Path, figures: Path) -> DPMaterial:
    """Read what this part is made of.

    Raises:
        InputError: the table or the pictures are missing; the message says what makes them.
    """
    for path in (metrics / "dp.csv", figures):
        if not path.exists():
            raise InputError(f"{path}: missing; run notebooks/dp_survey.ipynb first, which makes it")
    return DPMaterial(read_table(metrics / "dp.csv"), figures)


def conclusion(material: DPMaterial) -> Markdown:
    """Say what was found, from the table."""
    own = ", ".join(f"{_epsilon(e)}: {percent(material.mean('attention', e))}" for e in material.targets[::-1])
    base = material.table[material.table["trainable"] == PUBLIC]["downstream_acc"].mean()
    real = material.table[material.table["trainable"] == REAL]["downstream_acc"].mean()
    lines = [
        f"- A classifier trained on generated digits is right on real ones in {own} (attention only; mean over "
        f"{counted(int(material.table['seed'].nunique()), 'seed')}); the public base alone gives "
        f"{percent(float(base))}, the private images themselves {percent(float(real))}."
    ]
    bounds = material.table.dropna(subset=["audit_epsilon_lb"])
    bounds = bounds[bounds["epsilon"].between(0, math.inf, inclusive="neither")]
    if len(bounds):
        worst = (bounds["audit_epsilon_lb"] / bounds["epsilon"]).max()
        lines.append(
            f"- Audited with canaries: the lower bound on ε never exceeds what is claimed (at most {worst:.0%} of it, "
            f"{counted(len(bounds), 'run')})."
        )
    return Markdown("\n".join(lines))


def claims_table(material: DPMaterial) -> HTML:
    """Set S3's claims against the measurements."""
    columns = {"S3 says": "says", "we measured": "", "verdict": ""}
    finite = [e for e in material.targets if not math.isinf(e)]
    rows = [_attention_claim(material, finite), _size_claim(material), _utility_claim(material, finite)]
    return lay_out(columns, {"": rows})


def _attention_claim(material: DPMaterial, finite: list[float]) -> tuple[str, str, str]:
    entries, wins = [], []
    for e in finite:
        one, other = (material.mean(name, e) for name in ("attention", "unet"))
        if not math.isnan(other):
            wins.append(one >= other)
            entries.append(f"<li>{_epsilon(e)}: attention {percent(one)}, full U-Net {percent(other)}</li>")
    verdict = UNMEASURED if not wins else HOLDS if all(wins) else PARTLY if any(wins) else REFUTED
    return (
        "Training only the attention modules is better than training everything, at the same ε.",
        f"<ul>{''.join(entries)}</ul><small>By accuracy downstream; holds if at every ε, refuted if at none.</small>",
        _badge(verdict),
    )


def _size_claim(material: DPMaterial) -> tuple[str, str, str]:
    counts = {n: material.table[material.table["trainable"] == n]["n_trainable"].max() for n in ("attention", "unet")}
    share = counts["attention"] / counts["unet"]
    verdict = UNMEASURED if pd.isna(share) else HOLDS if share <= 0.15 else REFUTED
    return (
        "About 90 % fewer parameters are trained.",
        f"{number(counts['attention'])} of {number(counts['unet'])}, embedder included."
        "<small>Holds if at most 15 % are.</small>",
        _badge(verdict),
    )


def _utility_claim(material: DPMaterial, finite: list[float]) -> tuple[str, str, str]:
    base = float(material.table[material.table["trainable"] == PUBLIC]["downstream_acc"].mean())
    gains = {e: material.mean("attention", e) - base for e in finite}
    above = [gain > 0 for gain in gains.values()]
    verdict = UNMEASURED if not above else HOLDS if all(above) else PARTLY if any(above) else REFUTED
    entries = "".join(f"<li>{_epsilon(e)}: {gain:+.1%}</li>".replace("%", "\u00a0points") for e, gain in gains.items())
    return (
        "Private fine-tuning is worth it: samples are better than the public model's.",
        f"Accuracy downstream, against the public base:<ul>{entries}</ul><small>Holds if higher at every ε.</small>",
        _badge(verdict),
    )


def _badge(verdict: str) -> str:
    return f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'


def _epsilon(value: float) -> str:
    return "ε = ∞" if math.isinf(value) else f"ε = {value:g}"


def pictures(material: DPMaterial) -> HTML:
    """Show what each ε costs, and what the models draw."""
    captions = {
        "curve": "what each ε costs; bars from the lowest to the highest seed",
        "samples": "images of the real and the generated kind, one column per class",
    }
    return HTML("".join(figure(material.figures / f"{name}.png", text) for name, text in captions.items()))


def table(material: DPMaterial) -> HTML:
    """Show every setting, means over seeds."""
    columns = {"trained": "name"} | dict.fromkeys(
        ("weights", "ε", "σ", "accuracy", "± seeds", "Fréchet", "membership AUC", "audited ε ≥", "s per step", "seeds"),
        "number",
    )
    rows = []
    every = material.table.assign(target=material.table["epsilon"].map(lambda e: e if math.isinf(e) else round(e, 1)))
    for (trainable, target), own in every.groupby(["trainable", "target"], sort=False):
        mean = own.mean(numeric_only=True)
        generated = trainable not in (PUBLIC, REAL)
        rows.append(
            (
                html.escape(WORDS.get(str(trainable), str(trainable))),
                number(mean["n_trainable"]),
                ("∞" if math.isinf(float(str(target))) else f"{target:g}") if trainable != REAL else "–",
                number(mean["noise_multiplier"] if generated else None, 2),
                percent(float(mean["downstream_acc"])),
                number(own["downstream_acc"].std(), 3),
                number(mean["frechet"], 2),
                number(mean["mia_auc"], 3),
                number(mean["audit_epsilon_lb"], 2),
                number(mean["step_s"], 2),
                str(len(own)),
            )
        )
    return lay_out(columns, {"": rows})
