"""The report's part on the survey: which set-up is safe, attack family by attack family, and what each attack needs."""

import math

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.labels import UNMEASURED, UNSCORED, percent
from splitlab.privacy.accounting import SIMULATED_NOTE, epsilon_words
from splitlab.report import layout
from splitlab.report.claims import HOLDS, REFUTED
from splitlab.report.page import Material
from splitlab.split.attacks import ATTACKS, FAMILIES, NO_INFORMATION, REFERENCE, attack_label, fields_label
from splitlab.split.config import Adversary
from splitlab.split.privacy import DELTA
from splitlab.study.results import by_adversary, by_run, words
from splitlab.study.verdicts import STOPPED, SURVEY, pooled


def verdict_table(material: Material) -> HTML:
    """Answer, defence by defence: does it stop the paper's attackers, does it stop those that adapt, at what cost?"""
    groups = {
        data: [_verdict_row(row) for row in layout.records(own)] for data, own in layout.by_dataset(material.verdicts)
    }
    rule = (
        f"Stopped: in no timestep bucket does an attack identify more than {STOPPED:.0f} times chance. The paper's "
        "attackers know neither the noise they are sent nor which defences are on, and are judged by the image; those "
        "that adapt know both, and are judged by image, by hint, and by both together. Top-1 and PSNR are the "
        "strongest attack's over all timesteps that the client draws, the worst bucket any attack's. What guessing "
        f"gets stands below the families. An ε (δ = {DELTA:g}, another image in its place) is stated only where a "
        "defence owns both the bound and the noise; it is that of one message, and messages of later epochs compose. "
        f"{SIMULATED_NOTE}"
    )
    return layout.table(groups, first="setting", notes=[rule])


def _verdict_row(row: pd.Series) -> dict[str, str]:
    attack, denied = row["strongest_attack"], words(row["strongest_denied"])
    return {
        "defence, and why": layout.aside(
            row["setting"], f"({layout.in_words(row['defences'])})", row["reason"], _claim(row)
        ),
        "stops the paper's": _yes(row["stops_paper_attacks"]),
        "stops adaptive": _yes(row["stops_adaptive"]),
        "strongest attack": UNMEASURED if pd.isna(attack) else attack_label(Adversary(attack, denied)),
        **layout.numbers(row, "psnr_db"),
        **layout.numbers(row, "id_top1 id_worst hint_id_top1 both_id_top1", missing=UNMEASURED),
        **layout.numbers(row, "control_iou"),
    }


def _claim(row: pd.Series) -> str:
    """Print the ε that a defence has earned, or why it has none."""
    if math.isnan(row["epsilon_message"]):
        return f"no ε: {row['why_no_epsilon']}"
    return f"{epsilon_words(row['epsilon_message'], row['randomness'], digits=',.1f')} for one message"


def _yes(stops: object) -> str:
    if pd.isna(stops):  # type: ignore[call-overload]
        return UNMEASURED
    return layout.badge(HOLDS, "yes") if str(stops) == "True" else layout.badge(REFUTED, "no")


def frontier(material: Material) -> HTML:
    """Show privacy against utility, and every attack against every defence."""
    parts = []
    for data, own in layout.by_dataset(material.verdicts):
        if own["control_iou"].notna().any():
            caption = (
                f"{data}: what the defences leave of the use, and of the privacy. Each line leads from the paper's "
                "attackers up to the strongest one that knows the defence."
            )
            parts.append(layout.figure(material.figures / f"frontier-{data}.png", caption))
        parts.append(
            layout.figure(material.figures / f"matrix-{data}.png", f"{data}: every attack against every defence.")
        )
    return layout.together(parts)


def families(material: Material) -> HTML:
    """Walk through the attacks, idea by idea: what it does, what it got, and the pictures."""
    every = pd.concat([material.evidence.attacks, material.surveyed])
    sections = []
    for family in FAMILIES:
        names = [name for name, record in ATTACKS.items() if record.family == family]
        rows = every[every["attack"].isin(names)]
        if rows.empty:
            results = [layout.table([], notes=["Not run: see params/split.yaml."])]
        else:
            furthest = rows[["id_top1", "hint_id_top1"]].max(axis=1).fillna(0.0).to_numpy().argmax()
            run = rows["run"].iloc[furthest]
            caption = f"{run}: the first samples of each timestep bucket, none picked by hand; weakest attack first."
            results = [
                layout.table(
                    _family_rows(rows), first="setting", notes=[_guessing(every[every["run"].isin(rows["run"])])]
                ),
                layout.figure(material.figures / f"grid-{run}.png", caption),
            ]
        sections.append(layout.section(family.title, *results, says=family.says))
    return layout.together(sections)


def _family_rows(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Return the rows of a family's table, by transcript the weakest attack first."""
    lines = []
    for _, of_run in rows.groupby("run", sort=False):
        buckets = by_adversary(of_run)
        for mean in reversed(pooled(of_run)):
            name = layout.aside(_transcript(of_run), attack_label(mean["adversary"]))
            own = buckets[mean["adversary"]]
            row = mean | own[["n_evals", "cpu_s"]].max().to_dict() | {"psnr_db_std": own["psnr_db_std"].mean()}
            columns = "psnr_db psnr_db_std ssim id_top1 hint_id_top1 n n_seeds n_evals cpu_s"
            lines.append({"transcript, and the attack": name} | layout.numbers(row, columns, digits={"cpu_s": 1}))
    return lines


def _transcript(rows: pd.DataFrame) -> str:
    """Name the transcript of an attack table's rows: a setting of the survey by its data and its own name."""
    first = rows.iloc[0]
    return f"{first['dataset']}-{first['name']}" if first["kind"] == SURVEY else str(first["run"])


def _guessing(rows: pd.DataFrame) -> str:
    """Say what guessing gets on the same transcripts."""
    guesses = rows[rows["attack"].isin(NO_INFORMATION)]
    psnr = guesses[guesses["attack"] == REFERENCE]["psnr_db"]
    images, hints = (percent(guesses[name].max()) for name in ("id_top1", "hint_id_top1"))
    return (
        f"No information, on the same transcripts: the mean public image reaches {psnr.min():.1f} to "
        f"{psnr.max():.1f} dB, depending on transcript and bucket; it or a random public one identifies at most "
        f"{images} by the image and {hints} by the hint in any bucket (mixed samples are matched within their group, "
        f"which helps guesses too). Chance: {percent(rows['id_chance'].max())}."
    )


def prompts_table(material: Material) -> HTML:
    """Show what is recovered of the prompts."""
    every = pd.concat([material.evidence.attacks, material.surveyed])
    rows = []
    for (_, who), own in by_run(every[every["prompt_exact"].notna()]).items():
        (mean,) = pooled(own)
        rows.append(
            {
                "transcript": _transcript(own),
                "defences": layout.in_words(own["defences"].iloc[0]),
                "attack": attack_label(who),
                "reads": fields_label(words(own["used"].iloc[0])) or "nothing",
                **layout.numbers(mean, "n n_seeds"),
                "exact": layout.number(mean["prompt_exact"], layout.PERCENT),
            }
        )
    return layout.table(rows)


def ablation_table(material: Material) -> HTML:
    """Show which single fact each attack lives on."""
    measures = {"id_top1": "top-1", "hint_id_top1": "hint top-1", "prompt_exact": "prompt exact"}
    every = pd.concat([material.evidence.attacks, material.surveyed])
    rows = [
        {
            "transcript": _transcript(every[every["run"] == row["run"]]),
            "attack": attack_label(row["attack"]),
            "denied": fields_label(words(row["denied"])),
            "measure": measures.get(row["measure"], ""),
            "with it": layout.number(row["with_it"], layout.PERCENT, missing=UNSCORED),
            "without it": layout.number(row["without_it"], layout.PERCENT, missing=UNSCORED),
            "breaks": UNSCORED if pd.isna(row["breaks"]) else _broken(row),
        }
        for row in layout.records(material.ablations)
    ]
    return layout.table(rows)


def _broken(row: pd.Series) -> str:
    breaks = "yes" if str(row["breaks"]) == "True" else "no"
    return breaks if pd.isna(row["note"]) else layout.aside(breaks, "it cannot run")


def conclusion(material: Material) -> Markdown:
    """Say in a few sentences which defences stopped whom."""
    sentences, listed = [], layout.bracketed
    for data, own in layout.by_dataset(material.verdicts):
        papers, safe = (
            own[own[stops].astype(str) == "True"]["setting"] for stops in ("stops_paper_attacks", "stops_adaptive")
        )
        unknown = own[own["stops_adaptive"].isna()]["setting"]
        limit = STOPPED * own["id_chance"]
        hidden = own[(own["id_worst"] <= limit) & (limit < 1.0) & own["id_top1"].notna()]["setting"]
        absent = f"; {UNMEASURED}: {', '.join(unknown)}" if len(unknown) else ""
        sentences.append(
            f"**{data}:** {len(papers)} of {len(own)} settings stop the paper's attackers{listed(papers)}; "
            f"{len(hidden)} keep the image from the strongest attacker that knows the defence{listed(hidden)}; "
            f"{len(safe)} keep image and hint{listed(safe)}{absent}."
        )
    return layout.bullets(sentences or ["No survey was run."])
