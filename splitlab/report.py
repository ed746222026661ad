"""The report: every sentence, table and picture of `notebooks/report.ipynb`, from saved artefacts only.

`python -m splitlab.report` runs that notebook and writes `reports/index.html`.
"""

import argparse
import base64
import html
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab import html as pages
from splitlab.artefacts import load_reconstruction
from splitlab.attacks import NO_INFORMATION
from splitlab.claims import (
    FULL,
    HOLDS,
    PARTLY,
    REFUTED,
    UNMEASURED,
    Claim,
    Evidence,
    claims,
    counted,
    defended,
    leaks,
    message_sizes,
    percent,
    shares,
    strength,
    strongest,
)
from splitlab.errors import InputError
from splitlab.evaluate import read_json
from splitlab.figures import SCHEME_LABELS, attack_label, by_strength, control_per_image, read_table
from splitlab.paths import ROOT, resolve

DASH = "–"
_FOLDERS = {
    "runs": "runs",
    "reconstructions": "reconstructions",
    "metrics": "reports/metrics",
    "figures": "reports/figures",
}


@dataclass(frozen=True)
class Material:
    """Everything the report is made of.

    Attributes:
        evidence: the result tables and what else the claims are judged by.
        threat_models: for each attacked run, the (what, value) rows saved with its strongest attack.
        timings: for each run, its `timing.json`.
        bases: for each run, the digest of the public base model it was trained with.
        figures: folder of the pictures.
        metrics: folder of the tables.
    """

    evidence: Evidence
    threat_models: Mapping[str, Mapping[str, str]]
    timings: Mapping[str, Mapping[str, Any]]
    bases: Mapping[str, str]
    figures: Path
    metrics: Path

    @property
    def trained(self) -> pd.DataFrame:
        """The training table without its yardstick rows."""
        return self.evidence.training.dropna(subset=["steps"])

    @property
    def attacked(self) -> list[str]:
        """The attacked runs, in the attack table's order."""
        return [str(run) for run in self.evidence.attacks["run"].unique()]


def load_material(runs: Path, reconstructions: Path, metrics: Path, figures: Path) -> Material:
    """Read what the report is made of.

    Raises:
        InputError: something is missing or damaged; the message says what makes it.
    """
    training, attacks = (read_table(metrics / f"{name}.csv") for name in ("training", "split_attacks"))
    trained = training.dropna(subset=["steps"])
    models = {}
    for run, leak in strongest(leaks(attacks)).items():
        models[run] = dict(load_reconstruction(reconstructions / run / f"{leak.attack}-0.safetensors").threat_model)
    control = {}
    for run in trained.dropna(subset=["control_iou"])["run"]:
        overlap = control_per_image(runs / run, shapes=True)
        control[str(run)] = len(overlap), float(overlap.std() / len(overlap) ** 0.5)
    sent = {run: tuple(rows.get("receives", "").split(", ")) for run, rows in models.items()}
    material = Material(
        evidence=Evidence(training, attacks, sent, control),
        threat_models=models,
        timings={str(run): read_json(runs / run / "timing.json") for run in trained["run"]},
        bases={str(run): str(read_json(runs / run / "record.json")["base"]) for run in trained["run"]},
        figures=figures,
        metrics=metrics,
    )
    for name in _figure_names(material):
        if not (figures / name).exists():
            raise InputError(f"{figures / name}: missing; run `dvc repro` first, which draws it")
    return material


def _figure_names(material: Material) -> list[str]:
    own = [f"{kind}-{run}.png" for run in material.attacked for kind in ("leakage", "grid")]
    datasets = material.trained["dataset"].unique()
    return [*own, *(f"{kind}-{data}.png" for data in datasets for kind in ("control", "samples", "loss")), "bytes.png"]


# Sentences


def summary(material: Material) -> Markdown:
    """Say what was found, in a few sentences made from the tables."""
    found = [*_main_finding(material), *_side_findings(material), *_use_findings(material)]
    return Markdown("\n".join(f"- {sentence}" for sentence in found))


def _main_finding(material: Material) -> list[str]:
    """Say what the strongest attack gets out of the defended runs of S1's split."""
    own = defended(material.evidence.training)
    best = [leak for run, leak in strongest(leaks(material.evidence.attacks)).items() if run in own]
    if not best:
        return ["No run of S1's split with defences was attacked."]
    names = " and ".join(dict.fromkeys(attack_label(leak.attack) for leak in best))
    chance = percent(max(leak.id_chance for leak in best))
    found = percent(min(leak.id_top1 for leak in best))
    gap = max(leak.worst_gap_db for leak in best)
    if min(leak.least for leak in best) >= FULL:
        first = (
            f"**S1's defences do not keep the images from the server.** In every timestep bucket of "
            f"{counted(len(best), 'defended run')} ({', '.join(leak.run for leak in best)}), the attack *{names}* "
            f"comes within {max(gap, 0.05):.1f} dB of the VAE ceiling, the best that any attack on latents can reach, "
            f"and it singles out at least {found} of the private images (chance {chance})."
        )
    else:
        least, most = percent(min(leak.least for leak in best)), percent(max(leak.most for leak in best))
        first = (
            f"**S1's defences withstand the attacks in part.** The strongest (*{names}*) gets between {least} and "
            f"{most} of the way from the no-information guess to the VAE ceiling, depending on run and timestep, and "
            f"identifies at least {found} of the private images (chance {chance})."
        )
    why = (
        "The reason is the protocol, not a trained attacker: the server computes the loss, so it is *sent the noise*, "
        "and noisy latents minus known noise are latents. No defence of S1's touches that."
    )
    return [first, why] if all(leak.attack == "closed_form" for leak in best) else [first]


def _side_findings(material: Material) -> list[str]:
    """Say what the timestep floor does, what an attacker without the noise sees, and that other schemes leak."""
    attacks = material.evidence.attacks
    best, found = strongest(leaks(attacks)), []
    floors: dict[float, list[float]] = {}
    for run, words in attacks.drop_duplicates("run").set_index("run")["defences"].items():
        if str(run) in best and str(run) in material.evidence.control:
            floors.setdefault(strength(str(words), "timestep_floor"), []).append(best[str(run)].least)
    if len(floors) > 1:
        parts = ", ".join(f"{percent(min(least))} at floor {floor:.0f}" for floor, least in sorted(floors.items()))
        found.append(f"**The timestep floor.** How far the strongest attack gets in its worst bucket: {parts}.")
    own = defended(material.evidence.training)
    blind = strongest([leak for leak in leaks(attacks) if not leak.uses_noise and leak.run in own])
    for run, leak in list(blind.items())[:1]:
        rows = attacks[(attacks["run"] == run) & (attacks["attack"] == leak.attack)].sort_values("t_low")
        first, last = rows["psnr_db"].iloc[0], rows["psnr_db"].iloc[-1]
        found.append(
            f"**An attacker who leaves the sent noise aside** sees a protection that is not there: "
            f"{attack_label(leak.attack)} goes from {first:.1f} dB at the least noisy to {last:.1f} dB at the noisiest "
            f"timesteps of {run}."
        )
    for run in material.trained[material.trained["scheme"] == "split_gradients"]["run"]:
        if run in best:
            found.append(f"**Conventional split learning** sends the same fields. {best[run]}.")
    return found


def _use_findings(material: Material) -> list[str]:
    """Say how the trained models do, and count the verdicts."""
    found = []
    judged = claims(material.evidence)
    rows = material.evidence.trained()
    if not rows.empty:
        low, high = rows["control_iou"].min(), rows["control_iou"].max()
        every = material.evidence.training
        free = every[every["scheme"] == "no control"]["control_iou"].dropna()
        reference = f" (no control: {free.iloc[0]:.2f})" if len(free) else ""
        own = rows[rows["run"].isin(defended(rows))]["control_iou"]
        span = f"; S1 with defences lies at {own.min():.2f} to {own.max():.2f}" if len(own) else ""
        found.append(
            f"**What training is worth.** The generated discs overlap the asked-for ones with an IoU of {low:.2f} to "
            f"{high:.2f} over all schemes{reference}{span}."
        )
    kinds = (HOLDS, PARTLY, REFUTED, UNMEASURED)
    counts = {kind: sum(claim.verdict == kind for claim in judged) for kind in kinds}
    tally = ", ".join(f"{n} {'hold' if kind == HOLDS and n != 1 else kind}" for kind, n in counts.items() if n)
    found.append(f"**Of {len(judged)} claims of S1's**, by the rules stated in the table below: {tally}.")
    return found


# Tables


def _table(columns: Mapping[str, str], rows: Iterable[Sequence[str]], *, group: bool = False) -> HTML:
    """Lay out cells that are HTML already; `columns` maps titles to a CSS class; `group` rules off new first cells."""
    head = "".join(f'<th class="{kind}">{title}</th>' for title, kind in columns.items())
    body, previous = [], None
    for row in rows:
        new = group and previous is not None and row[0] != previous
        cells = ["" if group and not new and row[0] == previous else row[0], *row[1:]]
        marked = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(columns.values(), cells, strict=True))
        body.append(f'<tr class="group">{marked}</tr>' if new else f"<tr>{marked}</tr>")
        previous = row[0]
    return HTML(f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>')


def number(value: Any, digits: int = 0, *, scale: float = 1.0) -> str:
    """Write a number for a table cell; a dash where there is none."""
    return DASH if value is None or pd.isna(value) else f"{float(value) * scale:,.{digits}f}"


def in_words(defences: str) -> str:
    """Say a table's defences cell in words."""
    words = {"symsigmoid": "symsigmoid", "half": "16 bits", "hide_prompts": "hidden prompts"}
    parts = [words.get(part, part.replace("_", " ").replace("=", " ")) for part in defences.split()]
    return ", ".join(parts) if parts else "none"


def runs_table(material: Material) -> HTML:
    """List the training runs."""
    columns = {"run": "name", "data": "", "scheme": "", "defences": "", "clients": "number", "steps": "number"}
    return _table(
        columns,
        (
            (
                html.escape(row["run"]),
                html.escape(row["dataset"]),
                SCHEME_LABELS.get(row["scheme"], html.escape(row["scheme"])),
                html.escape(in_words(row["defences"])),
                number(row["n_clients"]),
                number(row["steps"]),
            )
            for _, row in material.trained.iterrows()
        ),
    )


def threat_models(material: Material) -> HTML:
    """Show who the adversary is: rows that all runs share once, the others run by run."""
    every = list(material.threat_models.values())
    names = list(dict.fromkeys(name for rows in every for name in rows))
    shared = [name for name in names if len({rows.get(name) for rows in every}) == 1]
    own = [name for name in names if name not in shared and name != "uses of it"]
    common = _table(
        {"in every run": "name", " ": ""},
        ((html.escape(name), html.escape(every[0][name])) for name in shared),
    )
    single = _table(
        {"run": "name"} | dict.fromkeys(own, ""),
        (
            (html.escape(run), *(html.escape(_spelled(name, rows.get(name, DASH))) for name in own))
            for run, rows in material.threat_models.items()
        ),
    )
    return HTML(common.data + single.data)


def _spelled(name: str, value: str) -> str:
    if name == "knows the defences":
        return in_words(value)
    return SCHEME_LABELS.get(value, value) if name == "scheme" else value


def claims_table(material: Material) -> HTML:
    """Set S1's claims against the measurements, each with its verdict and the rule behind it."""
    return _table({"S1 says": "", "we measured": "", "verdict": ""}, map(_claim_row, claims(material.evidence)))


def _claim_row(claim: Claim) -> tuple[str, str, str]:
    findings = "".join(f"<li>{html.escape(one)}</li>" for one in claim.measured)
    verdict = f'<span class="verdict {claim.verdict.replace(" ", "-")}">{claim.verdict}</span>'
    return html.escape(claim.says), f"<ul>{findings}</ul><small>{html.escape(claim.rule)}</small>", verdict


def attack_table(material: Material) -> HTML:
    """Show every attack on every run, means over its timestep buckets, strongest first."""
    attacks = material.evidence.attacks.assign(share=shares(material.evidence.attacks))
    columns = {"run": "name", "attack": "", "reads": ""} | dict.fromkeys(
        ("PSNR, dB", "± images", "± seeds", "ceiling, dB", "way", "SSIM", "top-1", "hint, dB", "seeds", "n"), "number"
    )
    order = by_strength(attacks)[::-1]
    rows = []
    for run in material.attacked:
        for attack in order:
            own = attacks[(attacks["run"] == run) & (attacks["attack"] == attack)]
            if own.empty:
                continue
            mean = own.mean(numeric_only=True)
            several = own["n_seeds"].max() > 1
            rows.append(
                (
                    html.escape(run),
                    html.escape(attack_label(attack)),
                    html.escape(own["knowledge"].iloc[0].replace("_", " ")),
                    number(mean["psnr_db"], 1),
                    number(mean["psnr_db_std"], 1),
                    number(mean["psnr_db_seed_std"] if several else None, 1),
                    number(mean["ceiling_psnr_db"], 1),
                    DASH if attack in NO_INFORMATION else percent(mean["share"]),
                    number(mean["ssim"], 2),
                    percent(mean["id_top1"]),
                    number(mean["hint_psnr_db"], 1),
                    number(own["n_seeds"].max()),
                    number(own["n"].sum()),
                )
            )
    return _table(columns, rows, group=True)


def cost_table(material: Material) -> HTML:
    """Show what each scheme costs: bytes, seconds and memory, with the machine they were measured on."""
    columns = {"run": "name", "scheme": ""} | dict.fromkeys(
        ("up, B/sample", "back, B/sample", "client, ms/sample", "server, ms/sample", "peak memory, MB"), "number"
    )
    table = _table(
        columns,
        (
            (
                html.escape(row["run"]),
                SCHEME_LABELS.get(row["scheme"], html.escape(row["scheme"])),
                number(row["up_bytes_per_sample"]),
                number(row["down_bytes_per_sample"]),
                number(row["client_s_per_sample"], 3, scale=1e3),
                number(row["server_s_per_sample"], 3, scale=1e3),
                number(row["peak_rss_mb"]),
            )
            for _, row in material.trained.iterrows()
        ),
    )
    machines = dict.fromkeys(f"{one['machine']}, {one['threads']} threads" for one in material.timings.values())
    note = (
        f"Measured on: {'; '.join(html.escape(machine) for machine in machines)}. Times are of one run each and differ "
        "from machine to machine. Encoding by the frozen VAE and text model, done once per data set, is not counted; "
        "in the central scheme all work is booked as the server's. Memory is of the whole process, clients and server."
    )
    return HTML(f'{table.data}<p class="note">{note}</p>')


def message_table() -> HTML:
    """Show what one training sample costs on the wire at Stable Diffusion 1.5's shapes, protocol by protocol."""
    sizes = list(message_sizes())
    first = sizes[0][1]
    columns = {"one message, latents 4×64×64, text 77×768": "", "bytes per sample": "number", "share": "number"}
    return _table(columns, ((html.escape(what), f"{size:,}", f"{100 * size / first:.1f} %") for what, size in sizes))


def provenance(material: Material) -> HTML:
    """Show with which code, seeds, versions and base model each run was made."""
    columns = dict.fromkeys(("run", "code", "training seed", "base model", "Python", "versions"), "")
    return _table(
        columns | {"run": "name"},
        (
            (
                html.escape(run),
                html.escape(str(timing["commit"] or "no checkout")),
                str(timing["seed"]),
                f"<code>{html.escape(material.bases[run][:12])}</code>",
                html.escape(str(timing["python"])),
                html.escape(", ".join(f"{name} {version}" for name, version in timing["versions"].items())),
            )
            for run, timing in material.timings.items()
        ),
    )


# Pictures


def figure(path: Path, caption: str) -> str:
    """Return a picture as HTML, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    label = html.escape(caption, quote=True)
    return f'<figure><img alt="{label}" src="data:image/png;base64,{data}"><figcaption>{label}</figcaption></figure>'


def leakage(material: Material) -> HTML:
    """Show, run by run, how much leaks: the curves, then the reconstructions themselves."""
    parts = []
    words = material.evidence.attacks.drop_duplicates("run").set_index("run")["defences"]
    for run in material.attacked:
        scheme = material.threat_models.get(run, {}).get("scheme", "")
        title = f"{run}: {SCHEME_LABELS.get(scheme, scheme)}; defences: {in_words(str(words[run]))}"
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
                "training loss. Levels of runs with different timestep floors cannot be compared: noisier latents "
                "make the noise easier to predict.",
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
    load_material(**folders)  # fails here, with a clear message, rather than inside a kernel
    parameters = {name: str(path) for name, path in folders.items()}
    notebook = pages.execute(ROOT / "notebooks" / "report.ipynb", executed, parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(pages.page(notebook))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; the command behind `python -m splitlab.report`."""
    parser = argparse.ArgumentParser(prog="python -m splitlab.report", description="Write the HTML report.")
    for name, default in _FOLDERS.items():
        parser.add_argument(f"--{name}", default=default, help=f"folder, default {default}")
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


if __name__ == "__main__":
    sys.exit(main())
