"""The report: every sentence, table and picture of `notebooks/report.ipynb`, from saved artefacts only.

`python -m splitlab.report` runs that notebook and writes `reports/index.html`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.checkpoint import load_json
from splitlab.core.errors import InputError
from splitlab.core.labels import counted, percent
from splitlab.core.paths import ROOT
from splitlab.core.seeds import PUBLISHED
from splitlab.core.storage import write_text
from splitlab.core.tables import read_table, read_timed
from splitlab.privacy.accounting import SIMULATED_NOTE, epsilon_words, recorded_epsilon
from splitlab.report import html as pages
from splitlab.report import layout
from splitlab.report.claims import Evidence, claims, message_sizes
from splitlab.report.figures.run_figures import by_strength, control_per_image
from splitlab.report.findings import findings
from splitlab.split.artefacts import load_reconstruction, read_record
from splitlab.split.attacks import ATTACKS, NO_INFORMATION, attack_label
from splitlab.split.config import Adversary
from splitlab.study.leaks import leaks, shares, strongest
from splitlab.study.results import by_adversary, words

_WHOLE = ("bytes.png", "tradeoff.png", "tradeoff.csv")


@dataclass(frozen=True)
class Material:
    """Everything the report is made of.

    Attributes:
        evidence: the result tables and what else the claims are judged by.
        threat_models: for each attacked run, the (what, value) rows saved with its strongest attack.
        timings: for each run whose `timing.json` is there, its content.
        bases: for each run, the digest of the public base model it was trained with.
        privacy: for each run, what its record says it may claim.
        figures: folder of the pictures.
        metrics: folder of the tables.
        surveyed: the attack table's rows of the survey of defences.
        verdicts, ablations: the survey's other tables.
    """

    evidence: Evidence
    threat_models: Mapping[str, Mapping[str, str]]
    timings: Mapping[str, Mapping[str, Any]]
    bases: Mapping[str, str]
    privacy: Mapping[str, Mapping[str, Any]]
    figures: Path
    metrics: Path
    surveyed: pd.DataFrame
    verdicts: pd.DataFrame
    ablations: pd.DataFrame

    @property
    def trained(self) -> pd.DataFrame:
        """The training table without its yardstick rows."""
        return self.evidence.training.dropna(subset=["steps"])

    @property
    def attacked(self) -> list[str]:
        """The attacked runs, in the attack table's order."""
        return [str(run) for run in self.evidence.attacks["run"].unique()]


def load_material(runs: Path, reconstructions: Path, metrics: Path, figures: Path) -> Material:
    """Read what the report is made of, but for the part on updates (`splitlab.report.update_report`).

    Raises:
        InputError: something is missing or damaged; the message says what makes it.
    """
    training, every = read_table(metrics / "training.csv"), read_timed(metrics / "split_attacks.csv")
    verdicts, ablations = (read_table(metrics / f"{name}.csv", empty=True) for name in ("split_verdicts", "ablations"))
    trained = training.dropna(subset=["steps"])
    attacks = every[every["run"].isin(trained["run"])]
    models = {}
    for run, leak in strongest(leaks(attacks)).items():
        models[run] = dict(
            load_reconstruction(reconstructions / run / f"{leak.adversary.name}-0.safetensors").threat_model
        )
    control = {}
    for run in trained.dropna(subset=["control_iou"])["run"]:
        overlap = control_per_image(runs / run, shapes=True)
        control[str(run)] = len(overlap), float(overlap.std() / len(overlap) ** 0.5)
    records, configs = {}, {}
    for run in trained["run"]:
        records[str(run)], configs[str(run)] = read_record(runs / run / "record.json", "base", "privacy")
    sent = {run: tuple(rows.get("receives", "").split(", ")) for run, rows in models.items()}
    material = Material(
        evidence=Evidence(training, attacks, sent, control, {run: config.defences for run, config in configs.items()}),
        threat_models=models,
        timings={str(run): load_json(path) for run in trained["run"] if (path := runs / run / "timing.json").exists()},
        bases={run: str(record["base"]) for run, record in records.items()},
        privacy={run: record["privacy"] for run, record in records.items()},
        figures=figures,
        metrics=metrics,
        surveyed=every[~every["run"].isin(trained["run"])],
        verdicts=verdicts,
        ablations=ablations,
    )
    for name in _figure_names(material):
        if not (figures / name).exists():
            raise InputError(f"{figures / name}: missing; run `dvc repro` first, which draws it")
    return material


def _figure_names(material: Material) -> list[str]:
    recorded = [*material.attacked, *material.surveyed["run"].unique()]
    own = [f"{kind}-{run}.png" for run in recorded for kind in ("leakage", "grid")]
    own += [f"{kind}-{data}.png" for data in material.verdicts["dataset"].unique() for kind in ("frontier", "matrix")]
    datasets = material.trained["dataset"].unique()
    return [*own, *(f"{kind}-{data}.png" for data in datasets for kind in ("control", "samples", "loss")), *_WHOLE]


def summary(material: Material) -> Markdown:
    """Say what was found, in a few sentences made from the tables."""
    return layout.bullets(findings(material.evidence))


# Tables


def runs_table(material: Material) -> HTML:
    """List the training runs."""
    rows = [
        {
            "run": row["run"],
            "data": row["dataset"],
            "scheme": layout.scheme_words(row["scheme"]),
            "defences": layout.in_words(row["defences"]),
            **layout.numbers(row, "n_clients steps"),
            "ε": _claimed(material.privacy[row["run"]]),
        }
        for row in layout.records(material.trained)
    ]
    simulated = any("epsilon_simulated" in privacy for privacy in material.privacy.values())
    return layout.table(rows, notes=[SIMULATED_NOTE] if simulated else [])


def _claimed(privacy: Mapping[str, Any]) -> str:
    """Print the ε that a run has earned over all its messages of an image, or why it has none."""
    value = recorded_epsilon(privacy)
    if value is None:
        return f"none: {privacy['why']}"
    return f"{epsilon_words(value, privacy.get('randomness', PUBLISHED), digits=',.1f')} at δ = {privacy['delta']:g}"


def threat_models(material: Material) -> HTML:
    """Show who the adversary is: rows that all runs share once, the others run by run."""
    every = list(material.threat_models.values())
    names = list(dict.fromkeys(name for rows in every for name in rows))
    shared = [name for name in names if len({rows.get(name) for rows in every}) == 1]
    own = [name for name in names if name not in shared and name != "uses of it"]
    common = [{"in every run": name, " ": every[0][name]} for name in shared]
    single = [
        {"run": run} | {name: _spelled(name, rows.get(name, layout.DASH)) for name in own}
        for run, rows in material.threat_models.items()
    ]
    return layout.together([layout.table(common), layout.table(single)])


def _spelled(name: str, value: str) -> str:
    if name == "knows the defences":
        return layout.in_words(value)
    return layout.scheme_words(value) if name == "scheme" else value


def claims_table(material: Material) -> HTML:
    """Set S1's claims against the measurements, each with its verdict and the rule behind it."""
    return layout.claims("S1", claims(material.evidence))


def attack_legend(material: Material) -> HTML:
    """Say what each attack does and which sent fields it reads, strongest first."""
    attacks, rows = material.evidence.attacks, []
    lines = by_adversary(attacks)
    for adversary in by_strength(attacks)[::-1]:
        used = min((words(cell) for cell in lines[adversary]["used"].unique()), key=lambda names: len(", ".join(names)))
        known = ATTACKS.get(adversary.attack)
        rows.append(
            {
                "attack": attack_label(adversary),
                "what it does": (known.function.__doc__ or "").partition("\n")[0] if known else layout.DASH,
                "reads": layout.code(", ".join(used)) if used else "nothing",
            }
        )
    return layout.table(rows)


def attack_table(material: Material) -> HTML:
    """Show every attack on every run, means over its timestep buckets, strongest first."""
    attacks = material.evidence.attacks.assign(share=shares(material.evidence.attacks))
    groups = {}
    for run in material.attacked:
        of_run = attacks[attacks["run"] == run]
        buckets = of_run.drop_duplicates("t_low")
        title = layout.aside(
            run,
            f"VAE ceiling {layout.number(buckets['ceiling_psnr_db'].mean(), 1)} dB, chance "
            f"{percent(buckets['id_chance'].mean())}, n = {layout.number(buckets['n'].sum())} in "
            f"{counted(len(buckets), 'bucket')}",
        )
        lines = by_adversary(of_run)
        groups[title] = [_attack_row(who, lines[who]) for who in by_strength(attacks)[::-1] if who in lines]
    return layout.table(groups)


def _attack_row(adversary: Adversary, rows: pd.DataFrame) -> dict[str, str]:
    seeds, images = int(rows["n_seeds"].max()), bool(rows["psnr_db"].notna().any())
    return {
        "attack": attack_label(adversary),
        **layout.means(rows, "psnr_db psnr_db_std", images),
        **layout.means(rows, "psnr_db_seed_std", images and seeds > 1),
        **layout.means(rows, "share", images and adversary.attack not in NO_INFORMATION),
        **layout.means(rows, "ssim id_top1", images),
        **layout.means(rows, "hint_psnr_db hint_iou"),
        "seeds": layout.number(seeds),
    }


def cost_table(material: Material) -> HTML:
    """Show what each scheme costs: bytes, seconds and memory, with the machine they were measured on."""
    rows = []
    for row in layout.records(material.trained):
        timing = material.timings.get(row["run"], {})
        rows.append(
            {
                "run": row["run"],
                "scheme": layout.scheme_words(row["scheme"]),
                **layout.numbers(row, "up_bytes_per_sample down_bytes_per_sample"),
                "client, ms per sample": layout.number(timing.get("client_s_per_sample") or None, 3, scale=1e3),
                "server, ms per sample": layout.number(timing.get("server_s_per_sample") or None, 3, scale=1e3),
                "peak memory, MB": layout.number(timing.get("peak_rss_mb")),
            }
        )
    machines = dict.fromkeys(
        f"{timing['machine']}, {counted(timing['threads'], 'thread')}" for timing in material.timings.values()
    )
    note = (
        f"Measured on: {'; '.join(machines)}. Times are of one run each, with "
        "whatever else the machine was doing: read them as orders of magnitude. Encoding by the frozen VAE and text "
        "model, done once per data set, is not counted; in the central scheme all work is booked as the server's. "
        "Memory is of the whole process, clients and server."
    )
    return layout.table(rows, notes=[note])


def message_table() -> HTML:
    """Show what one training sample costs on the wire at Stable Diffusion 1.5's shapes, protocol by protocol."""
    sizes = dict(message_sizes())
    first = next(iter(sizes.values()))
    rows = [
        {
            "latents 4×64×64, text 77×768": what,
            "bytes per sample": layout.number(size),
            "of S1's": layout.Number(f"{100 * size / first:.1f} %"),
        }
        for what, size in sizes.items()
    ]
    return layout.table(rows)


def provenance(material: Material) -> HTML:
    """Show with which code, seeds, versions and base model each run was made."""
    packages = {
        run: ", ".join(f"{name} {version}" for name, version in timing["versions"].items())
        for run, timing in material.timings.items()
    }
    alike = set(packages.values()) if len(set(packages.values())) == 1 else set()
    rows = [
        {
            "run": run,
            "commit": str(timing["commit"] or "no checkout"),
            "training seed": str(timing["seed"]),
            "base model": layout.code(material.bases[run][:12]),
            "Python": str(timing["python"]),
            "packages": "as below" if alike else packages[run],
        }
        for run, timing in material.timings.items()
    ]
    return layout.table(rows, notes=[f"Packages of all runs: {listed}." for listed in alike])


# Pictures


def leakage(material: Material) -> HTML:
    """Show, run by run, how much leaks: the curves, then the reconstructions themselves."""
    captions = {
        "leakage": "reconstruction against timestep. Wide grey line: the VAE's own reconstruction, the ceiling.",
        "grid": "the first samples of each timestep bucket, none picked by hand; attack seed 0; PSNR below each "
        "reconstruction; weakest attack first.",
    }
    sections = []
    for run in material.attacked:
        scheme = layout.scheme_words(material.threat_models.get(run, {}).get("scheme", ""))
        title = f"{run}: {scheme}; defences: {layout.in_words(str(material.evidence.of_run(run)))}"
        sections.append(layout.section(title, *_pictures(material, run, captions), anchor=run))
    return layout.together(sections)


def _pictures(material: Material, of: str, captions: Mapping[str, str]) -> list[HTML]:
    return [layout.figure(material.figures / f"{kind}-{of}.png", f"{of}: {words}") for kind, words in captions.items()]


def utility(material: Material) -> HTML:
    """Show, data set by data set, what the trained ControlNets can do."""
    captions = {
        "control": "how well generated images follow held-out hints, by run; one training seed each.",
        "samples": "generated images for the same held-out hints and prompts, by run.",
        "loss": "training loss. Its level cannot be compared between runs with different timestep floors, or with and "
        "without prompts: both change how hard the noise is to predict.",
    }
    datasets = material.trained["dataset"].unique()
    return layout.together(layout.section(data, *_pictures(material, data, captions)) for data in datasets)


def traffic(material: Material) -> HTML:
    """Show the bytes per sample of all runs."""
    caption = "Bytes per training sample on the data used here; federated sends the whole ControlNet, per round."
    return layout.figure(material.figures / "bytes.png", caption)


# The page


def write_report(folders: Mapping[str, Path], *, executed: Path, out: Path) -> Path:
    """Execute `notebooks/report.ipynb` and write it as one HTML file.

    Args:
        folders: where runs, reconstructions, metrics and figures are.
        executed: the executed notebook to write.
        out: the page to write.

    Raises:
        InputError: an artefact is missing or damaged.
    """
    load_material(
        **{name: folders[name] for name in ("runs", "reconstructions", "metrics", "figures")}
    )  # fails here, with a clear message, rather than inside a kernel
    parameters = {name: str(path) for name, path in folders.items()}
    notebook = pages.execute(ROOT / "notebooks" / "report.ipynb", executed, parameters)
    write_text(out, pages.page(notebook))
    return out
