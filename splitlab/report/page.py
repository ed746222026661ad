"""The report: every sentence, table and picture of `notebooks/report.ipynb`, from saved artefacts only.

`python -m splitlab.report` runs that notebook and writes `reports/index.html`.
"""

import argparse
import html
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.checkpoint import load_json
from splitlab.core.errors import InputError
from splitlab.core.labels import SCHEME_WORDS, counted, percent
from splitlab.core.paths import ROOT, resolve
from splitlab.core.seeds import PUBLISHED
from splitlab.core.storage import write_text
from splitlab.core.tables import read_table, read_timed
from splitlab.privacy.accounting import SIMULATED_NOTE, epsilon_words, recorded_epsilon
from splitlab.report import html as pages
from splitlab.report.cells import DASH, figure, in_words, lay_out, mean_of, number
from splitlab.report.claims import Claim, Evidence, claims, message_sizes
from splitlab.report.figures.run_figures import by_strength, control_per_image
from splitlab.report.findings import findings
from splitlab.split.artefacts import load_reconstruction
from splitlab.split.attacks import ATTACKS, NO_INFORMATION, attack_label
from splitlab.study.leaks import leaks, shares, strongest

_WHOLE = ("bytes.png", "tradeoff.png", "tradeoff.csv")
_FOLDERS = {
    "runs": "runs",
    "reconstructions": "reconstructions",
    "metrics": "reports/metrics",
    "figures": "reports/figures",
    "update_figures": "reports/figures-updates",
    "dp_figures": "reports/figures-dp",
}


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
        models[run] = dict(load_reconstruction(reconstructions / run / f"{leak.attack}-0.safetensors").threat_model)
    control = {}
    for run in trained.dropna(subset=["control_iou"])["run"]:
        overlap = control_per_image(runs / run, shapes=True)
        control[str(run)] = len(overlap), float(overlap.std() / len(overlap) ** 0.5)
    records = {str(run): load_json(runs / run / "record.json", "base", "privacy") for run in trained["run"]}
    sent = {run: tuple(rows.get("receives", "").split(", ")) for run, rows in models.items()}
    material = Material(
        evidence=Evidence(training, attacks, sent, control),
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
    return Markdown("\n".join(f"- {sentence}" for sentence in findings(material.evidence)))


# Tables


def runs_table(material: Material) -> HTML:
    """List the training runs."""
    columns = {"run": "name", "data": "", "scheme": "", "defences": "", "clients": "number", "steps": "number", "ε": ""}
    rows = [
        (
            html.escape(row["run"]),
            html.escape(row["dataset"]),
            SCHEME_WORDS.get(row["scheme"], html.escape(row["scheme"])),
            html.escape(in_words(row["defences"])),
            number(row["n_clients"]),
            number(row["steps"]),
            _claimed(material.privacy[row["run"]]),
        )
        for _, row in material.trained.iterrows()
    ]
    simulated = any("epsilon_simulated" in privacy for privacy in material.privacy.values())
    note = f'<p class="note">{SIMULATED_NOTE}</p>' if simulated else ""
    return HTML(f"{lay_out(columns, {'': rows}).data}{note}")


def _claimed(privacy: Mapping[str, Any]) -> str:
    """Print the ε that a run has earned over all its messages of an image, or why it has none."""
    value = recorded_epsilon(privacy)
    if value is None:
        return f"none: {html.escape(privacy['why'])}"
    return f"{epsilon_words(value, privacy.get('randomness', PUBLISHED), digits=',.1f')} at δ = {privacy['delta']:g}"


def threat_models(material: Material) -> HTML:
    """Show who the adversary is: rows that all runs share once, the others run by run."""
    every = list(material.threat_models.values())
    names = list(dict.fromkeys(name for rows in every for name in rows))
    shared = [name for name in names if len({rows.get(name) for rows in every}) == 1]
    own = [name for name in names if name not in shared and name != "uses of it"]
    common = [(html.escape(name), html.escape(every[0][name])) for name in shared]
    single = [
        (html.escape(run), *(html.escape(_spelled(name, rows.get(name, DASH))) for name in own))
        for run, rows in material.threat_models.items()
    ]
    tables = (
        lay_out({"in every run": "name", " ": ""}, {"": common}),
        lay_out({"run": "name"} | dict.fromkeys(own, ""), {"": single}),
    )
    return HTML("".join(table.data for table in tables))


def _spelled(name: str, value: str) -> str:
    if name == "knows the defences":
        return in_words(value)
    return SCHEME_WORDS.get(value, value) if name == "scheme" else value


def claims_table(material: Material) -> HTML:
    """Set S1's claims against the measurements, each with its verdict and the rule behind it."""
    columns = {"S1 says": "says", "we measured": "", "verdict": ""}
    return lay_out(columns, {"": map(_claim_row, claims(material.evidence))})


def _claim_row(claim: Claim) -> tuple[str, str, str]:
    entries = []
    for one in claim.measured:
        lead, colon, rest = one.partition(": ")
        short = colon and len(lead) < 60
        entries.append(f"<b>{html.escape(lead)}</b>: {html.escape(rest)}" if short else html.escape(one))
    found = "".join(f"<li>{entry}</li>" for entry in entries)
    verdict = f'<span class="verdict {claim.verdict.replace(" ", "-")}">{claim.verdict}</span>'
    return html.escape(claim.says), f"<ul>{found}</ul><small>{html.escape(claim.rule)}</small>", verdict


def attack_legend(material: Material) -> HTML:
    """Say what each attack does and which sent fields it reads, strongest first."""
    attacks, rows = material.evidence.attacks, []
    for attack in by_strength(attacks)[::-1]:
        fields = min(attacks[attacks["attack"] == attack]["knowledge"].unique(), key=len)
        known = ATTACKS.get(attack.split("-")[0])
        does = (known.function.__doc__ or "").partition("\n")[0] if known else DASH
        reads = fields if fields == "nothing" else f"<code>{html.escape(fields.replace(' + ', ', '))}</code>"
        rows.append((html.escape(attack_label(attack)), html.escape(does), reads))
    return lay_out({"attack": "name", "what it does": "", "reads": ""}, {"": rows})


def attack_table(material: Material) -> HTML:
    """Show every attack on every run, means over its timestep buckets, strongest first."""
    attacks = material.evidence.attacks.assign(share=shares(material.evidence.attacks))
    columns = {"attack": "name"} | dict.fromkeys(
        ("PSNR, dB", "± images", "± seeds", "way", "SSIM", "top-1", "hint, dB", "hint IoU", "seeds"), "number"
    )
    groups: dict[str, list[tuple[str, ...]]] = {}
    for run in material.attacked:
        of_run = attacks[attacks["run"] == run]
        one = of_run.drop_duplicates("t_low")
        title = (
            f"{html.escape(run)} <small>VAE ceiling {number(one['ceiling_psnr_db'].mean(), 1)} dB, chance "
            f"{percent(one['id_chance'].mean())}, n = {number(one['n'].sum())} in {counted(len(one), 'bucket')}</small>"
        )
        tables = ((attack, of_run[of_run["attack"] == attack]) for attack in by_strength(attacks)[::-1])
        groups[title] = [_attack_row(attack, rows) for attack, rows in tables if len(rows)]
    return lay_out(columns, groups)


def _attack_row(attack: str, rows: pd.DataFrame) -> tuple[str, ...]:
    seeds, images = int(rows["n_seeds"].max()), bool(rows["psnr_db"].notna().any())
    return (
        html.escape(attack_label(attack)),
        mean_of(rows["psnr_db"], images, 1),
        mean_of(rows["psnr_db_std"], images, 1),
        mean_of(rows["psnr_db_seed_std"], images and seeds > 1, 1),
        mean_of(rows["share"], images and attack not in NO_INFORMATION),
        mean_of(rows["ssim"], images, 2),
        mean_of(rows["id_top1"], images),
        mean_of(rows["hint_psnr_db"], bool(rows["hint_psnr_db"].notna().any()), 1),
        mean_of(rows["hint_iou"], bool(rows["hint_iou"].notna().any()), 2),
        str(seeds),
    )


def cost_table(material: Material) -> HTML:
    """Show what each scheme costs: bytes, seconds and memory, with the machine they were measured on."""
    columns = {"run": "name", "scheme": ""} | dict.fromkeys(
        (
            "up, bytes per sample",
            "down, bytes per sample",
            "client, ms per sample",
            "server, ms per sample",
            "peak memory, MB",
        ),
        "number",
    )
    rows = []
    for _, row in material.trained.iterrows():
        timing = material.timings.get(row["run"], {})
        rows.append(
            (
                html.escape(row["run"]),
                SCHEME_WORDS.get(row["scheme"], html.escape(row["scheme"])),
                number(row["up_bytes_per_sample"]),
                number(row["down_bytes_per_sample"]),
                number(timing.get("client_s_per_sample") or None, 3, scale=1e3),
                number(timing.get("server_s_per_sample") or None, 3, scale=1e3),
                number(timing.get("peak_rss_mb")),
            )
        )
    machines = dict.fromkeys(
        f"{one['machine']}, {counted(one['threads'], 'thread')}" for one in material.timings.values()
    )
    note = (
        f"Measured on: {'; '.join(html.escape(machine) for machine in machines)}. Times are of one run each, with "
        "whatever else the machine was doing: read them as orders of magnitude. Encoding by the frozen VAE and text "
        "model, done once per data set, is not counted; in the central scheme all work is booked as the server's. "
        "Memory is of the whole process, clients and server."
    )
    return HTML(f'{lay_out(columns, {"": rows}).data}<p class="note">{note}</p>')


def message_table() -> HTML:
    """Show what one training sample costs on the wire at Stable Diffusion 1.5's shapes, protocol by protocol."""
    sizes = list(message_sizes())
    first = sizes[0][1]
    columns = {"latents 4×64×64, text 77×768": "", "bytes per sample": "number", "of S1's": "number"}
    return lay_out(columns, {"": [(html.escape(what), f"{n:,}", f"{100 * n / first:.1f} %") for what, n in sizes]})


def provenance(material: Material) -> HTML:
    """Show with which code, seeds, versions and base model each run was made."""
    columns = {"run": "name"} | dict.fromkeys(("commit", "training seed", "base model", "Python", "packages"), "")
    packages = {run: _packages(timing) for run, timing in material.timings.items()}
    alike = len(set(packages.values())) == 1
    rows = [
        (
            html.escape(run),
            html.escape(str(timing["commit"] or "no checkout")),
            str(timing["seed"]),
            f"<code>{html.escape(material.bases[run][:12])}</code>",
            html.escape(str(timing["python"])),
            "as below" if alike else packages[run],
        )
        for run, timing in material.timings.items()
    ]
    note = f'<p class="note">Packages of all runs: {next(iter(packages.values()))}.</p>' if alike and packages else ""
    return HTML(lay_out(columns, {"": rows}).data + note)


def _packages(timing: Mapping[str, Any]) -> str:
    return html.escape(", ".join(f"{name} {version}" for name, version in timing["versions"].items()))


# Pictures


def leakage(material: Material) -> HTML:
    """Show, run by run, how much leaks: the curves, then the reconstructions themselves."""
    parts = []
    words = material.evidence.attacks.drop_duplicates("run").set_index("run")["defences"]
    for run in material.attacked:
        scheme = material.threat_models.get(run, {}).get("scheme", "")
        title = f"{run}: {SCHEME_WORDS.get(scheme, scheme)}; defences: {in_words(str(words[run]))}"
        parts.append(f'<h3 id="{html.escape(run, quote=True)}">{html.escape(title)}</h3>')
        parts.append(
            figure(
                material.figures / f"leakage-{run}.png",
                f"{run}: reconstruction against timestep. Wide grey line: the VAE's own reconstruction, the ceiling.",
            )
        )
        parts.append(
            figure(
                material.figures / f"grid-{run}.png",
                f"{run}: the first samples of each timestep bucket, none picked by hand; attack seed 0; PSNR below "
                "each reconstruction; weakest attack first.",
            )
        )
    return HTML("".join(parts))


def utility(material: Material) -> HTML:
    """Show, data set by data set, what the trained ControlNets can do."""
    parts = []
    for data in material.trained["dataset"].unique():
        parts.append(f"<h3>{html.escape(data)}</h3>")
        for kind, caption in (
            ("control", "how well generated images follow held-out hints, by run; one training seed each."),
            ("samples", "generated images for the same held-out hints and prompts, by run."),
            (
                "loss",
                "training loss. Its level cannot be compared between runs with different timestep floors, or with and "
                "without prompts: both change how hard the noise is to predict.",
            ),
        ):
            parts.append(figure(material.figures / f"{kind}-{data}.png", f"{data}: {caption}"))
    return HTML("".join(parts))


def traffic(material: Material) -> HTML:
    """Show the bytes per sample of all runs."""
    caption = "Bytes per training sample on the data used here; federated sends the whole ControlNet, per round."
    return HTML(figure(material.figures / "bytes.png", caption))


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; the command behind `python -m splitlab.report`."""
    parser = argparse.ArgumentParser(prog="python -m splitlab.report", description="Write the HTML report.")
    for name, default in _FOLDERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=f"folder, default {default}")
    parser.add_argument("--executed", default="reports/executed/report.ipynb", help="the executed notebook to write")
    parser.add_argument("--out", default="reports/index.html", help="the page to write")
    options = parser.parse_args(arguments)
    folders = {name: resolve(getattr(options, name)) for name in _FOLDERS}
    try:
        written = write_report(folders, executed=resolve(options.executed), out=resolve(options.out))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(written)
    return 0
