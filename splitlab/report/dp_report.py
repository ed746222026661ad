"""The report's part on private fine-tuning (S3), from saved artefacts only."""

import math
from itertools import pairwise
from pathlib import Path

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.labels import UNMEASURED, counted, percent
from splitlab.core.seeds import SECRET
from splitlab.privacy.accounting import SIMULATED_NOTE, epsilon_words, randomness_of
from splitlab.report import layout
from splitlab.report.claims import Claim, judged
from splitlab.study.dp_survey import CONTRASTS, PUBLIC, REAL, START
from splitlab.study.tradeoff import nominal

WORDS = {
    "attention": "attention only (DP-LDM)",
    "lora": "LoRA on attention (DP-LoRA)",
    "unet": "the full U-Net",
    "blocks": "transformer blocks (DP-LDM)",
    "transformers": "spatial transformers (DP-LDM)",
}

CHANCE = {"digits": 0.1}
"""Data set -> accuracy of guessing among its classes, which are equally many."""


class DPMaterial(layout.Part):
    """What this part is made of: `dp.csv` and its pictures."""

    @property
    def judged(self) -> pd.DataFrame:
        """The rows of the first data set whose samples a classifier can learn from; S3's claims are judged on these."""
        first = self.table.dropna(subset=["downstream_acc"])["dataset"].head(1)
        return self.table[self.table["dataset"].isin(first)]

    @property
    def runs(self) -> pd.DataFrame:
        """The judged fine-tunings, without the rows that they are contrasted with."""
        return self.judged[~self.judged["trainable"].isin(CONTRASTS)]

    @property
    def targets(self) -> list[float]:
        """The ε of the judged runs, as asked for, ascending."""
        return sorted({nominal(e) for e in self.runs["epsilon"]})

    @property
    def finite(self) -> list[float]:
        """Those of them that promise anything."""
        return [e for e in self.targets if not math.isinf(e)]

    def words(self, target: float) -> str:
        """Say an ε of the judged runs, and whether it is a simulation's."""
        return epsilon_words(target, randomness_of(self.runs), digits="g")

    def values(self, trainable: str, target: float, column: str = "downstream_acc") -> pd.Series:
        """Return a column's values over seeds where ε was asked to be `target`.

        None where there is no such run, or where one seed was not measured: the others would be fewer than is said.
        """
        own = self.runs[self.runs["trainable"] == trainable]
        values = own[own["epsilon"].map(nominal) == target][column]
        return values.iloc[:0] if values.isna().any() else values

    def measured(self, trainable: str, targets: list[float], column: str = "downstream_acc") -> dict[float, pd.Series]:
        """Return target -> `values`, where there are any."""
        values = {target: self.values(trainable, target, column) for target in targets}
        return {target: own for target, own in values.items() if len(own)}

    def contrast(self, name: str) -> float:
        """Return the mean accuracy of a contrast row; NaN where it was not made, or not measured for every seed."""
        return float(self.judged[self.judged["trainable"] == name]["downstream_acc"].mean(skipna=False))

    @property
    def floor(self) -> tuple[str, float]:
        """What is to be had without private data, and its accuracy: what fine-tuning starts from."""
        name = START if (self.judged["trainable"] == START).any() else PUBLIC
        return name, self.contrast(name)


def load_dp(metrics: Path, figures: Path) -> DPMaterial:
    """Read what this part is made of; see `layout.read_part`."""
    return DPMaterial(*layout.read_part(metrics / "dp.csv", figures))


def conclusion(material: DPMaterial) -> Markdown:
    """Say what was found, from the table."""
    shares = {e: percent(float(material.values("attention", e).mean())) for e in material.targets[::-1]}
    own = ", ".join(f"{share} ({material.words(e)})" for e, share in shares.items())
    models = [name for name in (PUBLIC, START) if (material.judged["trainable"] == name).any()]
    public = ", ".join(f"the {name} {percent(material.contrast(name))}" for name in models)
    lines = [
        f"A classifier trained on generated images is right on real ones in {own} (attention only; mean over "
        f"{counted(int(material.runs['seed'].nunique()), 'seed')}). Without private data: {public}; the private images "
        f"themselves: {percent(material.contrast(REAL))}{_guessing(material.judged)}."
    ]
    bounds = _audited(material)
    if len(bounds):
        worst = (bounds["audit_epsilon_lb"] / bounds["epsilon"]).max()
        lines.append(
            f"Audited with canaries: the lower bound on ε reaches at most {percent(float(worst))} of what is claimed "
            f"({counted(len(bounds), 'run')})."
        )
    return layout.bullets(lines)


def claims_table(material: DPMaterial) -> HTML:
    """Set S3's claims against the measurements."""
    judges = (_attention_claim, _size_claim, _utility_claim, _cost_claim, _members_claim, _audit_claim)
    return layout.claims("S3", (judge(material) for judge in judges))


def _attention_claim(material: DPMaterial) -> Claim:
    ours, theirs = (material.measured(name, material.finite) for name in ("attention", "unet"))
    both = [e for e in ours if e in theirs]
    return judged(
        "Training only the attention modules is better than training everything, at the same ε.",
        [f"{material.words(e)}: attention {_spread(ours[e])}, full U-Net {_spread(theirs[e])}" for e in both],
        "By accuracy downstream, mean ± standard deviation over seeds. Holds if never worse, refuted if always.",
        [bool(ours[e].mean() >= theirs[e].mean()) for e in both],
    )


def _size_claim(material: DPMaterial) -> Claim:
    counts = {n: material.runs[material.runs["trainable"] == n]["n_trainable"].max() for n in ("attention", "unet")}
    share = counts["attention"] / counts["unet"]
    known = not pd.isna(share)
    entries = [
        f"{layout.number(counts['attention'])} of {layout.number(counts['unet'])} weights, embedder included"
    ] * known
    entries += [f"{100 * share:.1f}\u00a0% of the U-Net's"] * known
    return judged(
        "About 90 % fewer parameters are trained.", entries, "Holds if at most 15 % are.", [bool(share <= 0.15)] * known
    )


def _utility_claim(material: DPMaterial) -> Claim:
    name, floor = material.floor
    found = material.measured("attention", material.finite)
    gains = {} if math.isnan(floor) else {e: float(values.mean()) - floor for e, values in found.items()}
    entries = [f"{material.words(e)}: {100 * gain:+.1f} points over the {name}" for e, gain in gains.items()]
    rule = "By accuracy downstream, attention only. Holds if higher at every ε, refuted if at none."
    return judged(
        "What is fine-tuned privately is better than the public model.", entries, rule, [g > 0 for g in gains.values()]
    )


def _cost_claim(material: DPMaterial) -> Claim:
    found = material.measured("attention", material.targets)
    means = [values.mean() for values in found.values()]
    return judged(
        "A larger ε gives better samples (CelebA, 64 × 64: FID 21.1, 16.1, 14.3 at ε = 1, 5, 10).",
        [f"{material.words(e)}: {_spread(values)}" for e, values in found.items()],
        "Accuracy downstream, attention only. An independent benchmark (DPImageBench, 2025) has DP-LDM on MNIST at "
        "44.2 % and 95.5 % for ε = 1 and 10. Holds if every larger ε is better, refuted if none is.",
        [bool(b > a) for a, b in pairwise(means)],
    )


def _members_claim(material: DPMaterial) -> Claim:
    plain = material.values("attention", math.inf, "mia_auc")
    found = material.measured("attention", [*material.finite, math.inf], "mia_auc") if len(plain) else {}
    entries = [f"{material.words(e)}: {_spread(values, 3)}" for e, values in found.items()]
    private = [values for e, values in found.items() if not math.isinf(e)]
    return judged(
        "The guarantee protects those whose images were used.",
        entries,
        "AUC of membership inference by calibrated loss; 0.5 is chance. Holds if at every ε it falls by more than one "
        "standard deviation over seeds against ε = ∞, refuted if it falls at none.",
        [bool(plain.mean() - values.mean() > max(_std(values), _std(plain))) for values in private],
        partly=[bool(values.mean() < plain.mean()) for values in private],
    )


def _audit_claim(material: DPMaterial) -> Claim:
    bounds = _audited(material)
    groups = bounds.groupby(bounds["epsilon"].map(nominal))
    entries = [
        f"{material.words(float(str(target)))}: at least {own['audit_epsilon_lb'].max():.2f} "
        f"(most of {counted(len(own), 'run')})"
        for target, own in groups
    ]
    private = material.table["epsilon"].between(0, math.inf, inclusive="neither")
    if absent := int((private & material.table["audit_epsilon_lb"].isna()).sum()):
        entries.append(f"{UNMEASURED}: {counted(absent, 'run')}")
    return judged(
        "The ε that is stated is true.",
        entries,
        "A one-run audit bounds ε from below by canaries, at 95 % confidence; it can refute an ε, never prove it. "
        "Holds if no bound exceeds what is stated.",
        [bool((bounds["audit_epsilon_lb"] <= bounds["epsilon"]).all())] if len(bounds) else [],
    )


def _audited(material: DPMaterial) -> pd.DataFrame:
    bounds = material.table.dropna(subset=["audit_epsilon_lb"])
    return bounds[bounds["epsilon"].between(0, math.inf, inclusive="neither")]


def _std(values: pd.Series) -> float:
    return 0.0 if len(values) < 2 else float(values.std())


def _spread(values: pd.Series, digits: int = 0) -> str:
    """Write mean and standard deviation over seeds: as percentages, or with `digits` as numbers."""
    if digits:
        return f"{values.mean():.{digits}f} ± {_std(values):.{digits}f}"
    return f"{100 * values.mean():.1f} ± {100 * _std(values):.1f}\u00a0%"


def _guessing(rows: pd.DataFrame) -> str:
    """Say what guessing gets, where the number of classes is known."""
    share = CHANCE.get(str(rows["dataset"].iloc[0])) if len(rows) else None
    return f"; guessing: {percent(share)}" if share and rows["downstream_acc"].notna().any() else ""


def pictures(material: DPMaterial) -> HTML:
    """Show what each ε costs, and what the models draw."""
    costs = "mean over seeds, bars from the lowest to the highest. Grey: what needs no private fine-tuning."
    note = "" if randomness_of(material.runs) == SECRET else f" {SIMULATED_NOTE}"
    drawn = "images of the real and the generated kind, one column per class; the first of each, none picked by hand"
    captions = {material.figures / "curve.png": f"What each ε costs: {costs}{note}"}
    for path in sorted(material.figures.glob("samples-*.png")):
        captions[path] = f"{path.stem.removeprefix('samples-')}: {drawn}, seed 0.{note}"
    return layout.together(layout.figure(path, caption) for path, caption in captions.items())


def table(material: DPMaterial) -> HTML:
    """Show every setting of every data set, means over seeds."""
    groups = {}
    for dataset, own in layout.by_dataset(material.table):
        first, most = own.iloc[0], layout.numbers(own[["n", "n_test", "n_samples"]].max(), "n n_test n_samples")
        title = layout.aside(
            dataset,
            f"{first['conditioning']}-conditional; n = {most['n']} private images, {most['n_test']} to test on, "
            f"{most['n_samples']} generated{_guessing(own)}; Fréchet distance: {first['features']}",
        )
        kinds = own.assign(target=own["epsilon"].map(nominal)).groupby(["trainable", "target"], sort=False)
        groups[title] = [_row(str(trainable), float(str(target)), rows) for (trainable, target), rows in kinds]
    return layout.table(groups, notes=[SIMULATED_NOTE])


def _row(trainable: str, target: float, own: pd.DataFrame) -> dict[str, str]:
    mean = own.mean(numeric_only=True)
    tuned = trainable not in CONTRASTS
    return {
        "trained": WORDS.get(trainable, trainable),
        "weights": layout.number(mean["n_trainable"] if tuned else None),
        "ε": layout.Number(
            layout.DASH
            if trainable == REAL
            else epsilon_words(target, randomness_of(own), digits="g").replace("ε = ", "")
        ),
        "σ": layout.number(mean["noise_multiplier"] if tuned else None, 2),
        **layout.means(own, "downstream_acc", missing=UNMEASURED),
        "± seeds": layout.number(own["downstream_acc"].std(skipna=False), 3),
        **layout.means(own, "frechet mia_auc audit_epsilon_lb", missing=UNMEASURED),
        **layout.numbers(mean, "step_s"),
        "seeds": layout.number(len(own)),
    }
