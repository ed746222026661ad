"""The report's part on the survey: which set-up is safe, attack family by attack family, and what each attack needs."""

import html
import math
from collections.abc import Sequence

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.labels import FIELD_WORDS, UNMEASURED, UNSCORED, percent
from splitlab.privacy.accounting import SIMULATED_NOTE, epsilon_words
from splitlab.report.cells import DASH, figure, in_words, lay_out, number
from splitlab.report.page import Material
from splitlab.split.attacks import ATTACKS, FAMILIES, NO_INFORMATION, attack_label
from splitlab.split.guarantees import DELTA
from splitlab.study.verdicts import STOPPED, SURVEY, pooled


def verdict_table(material: Material) -> HTML:
    """Answer, defence by defence: does it stop the paper's attackers, does it stop those that adapt, at what cost?"""
    columns = {"defence, and why": "setting", "stops the paper's": "", "stops adaptive": "", "strongest attack": ""}
    columns |= dict.fromkeys(("PSNR, dB", "top-1", "worst bucket", "hint top-1", "both", "control IoU"), "number")
    groups = {html.escape(str(data)): map(_verdict_row, _records(own)) for data, own in _by_dataset(material.verdicts)}
    rule = (
        f"Stopped: in no timestep bucket does an attack identify more than {STOPPED:.0f} times chance. The paper's "
        "attackers know neither the noise they are sent nor which defences are on, and are judged by the image; those "
        "that adapt know both, and are judged by image, by hint, and by both together. Top-1 and PSNR are the "
        "strongest attack's over all timesteps that the client draws, the worst bucket any attack's. What guessing "
        f"gets stands below the families. An ε (δ = {DELTA:g}, another image in its place) is stated only where a "
        "defence owns both the bound and the noise; it is that of one message, and messages of later epochs compose. "
        f"{SIMULATED_NOTE}"
    )
    return HTML(f'{lay_out(columns, groups).data}<p class="note">{rule}</p>')


def _records(frame: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _by_dataset(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(data), own) for data, own in frame.groupby("dataset", sort=False)]


def _verdict_row(row: dict[str, object]) -> Sequence[str]:
    name, words = html.escape(str(row["setting"])), in_words(str(row["defences"]).replace("none", ""))
    return (
        f"<b>{name}</b> <small>({html.escape(words)})<br>{html.escape(str(row['reason']))}<br>{_claim(row)}</small>",
        _yes(row["stops_paper_attacks"]),
        _yes(row["stops_adaptive"]),
        _attack(row["strongest_attack"]),
        number(row["psnr_db"], 1),
        *(percent(float(str(row[name]))) for name in ("id_top1", "id_worst", "hint_id_top1", "both_id_top1")),
        number(row["control_iou"], 2),
    )


def _attack(name: object) -> str:
    return UNMEASURED if pd.isna(name) else html.escape(attack_label(str(name)))  # type: ignore[call-overload]


def _claim(row: dict[str, object]) -> str:
    """Print the ε that a defence has earned, or why it has none."""
    value = float(str(row["epsilon_message"]))
    if math.isnan(value):
        return f"no ε: {html.escape(str(row['why_no_epsilon']))}"
    return f"{epsilon_words(value, str(row['randomness']), digits=',.1f')} for one message"


def _share(value: object) -> str:
    return DASH if pd.isna(value) else percent(float(str(value)))  # type: ignore[call-overload]


def _yes(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return UNMEASURED
    stops = str(value) == "True"
    return f'<span class="verdict {"holds" if stops else "refuted"}">{"yes" if stops else "no"}</span>'


def frontier(material: Material) -> HTML:
    """Show privacy against utility, and every attack against every defence."""
    parts = []
    for data, own in _by_dataset(material.verdicts):
        if own["control_iou"].notna().any():
            caption = (
                f"{data}: what the defences leave of the use, and of the privacy. Each line leads from the paper's "
                "attackers up to the strongest one that knows the defence."
            )
            parts.append(figure(material.figures / f"frontier-{data}.png", caption))
        parts.append(figure(material.figures / f"matrix-{data}.png", f"{data}: every attack against every defence."))
    return HTML("".join(parts))


def families(material: Material) -> HTML:
    """Walk through the attacks, idea by idea: what it does, what it got, and the pictures."""
    every = pd.concat([material.evidence.attacks, material.surveyed])
    parts = []
    for family in FAMILIES:
        parts += [f"<h3>{html.escape(family.title)}</h3>", f"<p>{html.escape(family.says)}</p>"]
        names = [name for name, record in ATTACKS.items() if record.family == family]
        rows = every[every["attack"].str.partition("-without-")[0].isin(names)]
        if rows.empty:
            parts.append('<p class="note">Not run: see params.yaml.</p>')
            continue
        parts.append(_family_table(rows) + _without_information(every[every["run"].isin(rows["run"])]))
        furthest = rows[["id_top1", "hint_id_top1"]].max(axis=1).fillna(0.0).to_numpy().argmax()
        run = rows["run"].iloc[furthest]
        caption = f"{run}: the first samples of each timestep bucket, none picked by hand; weakest attack first."
        parts.append(figure(material.figures / f"grid-{run}.png", caption))
    return HTML("".join(parts))


def _family_table(rows: pd.DataFrame) -> str:
    columns = {"transcript, and the attack": "setting"} | dict.fromkeys(
        ("PSNR, dB", "± images", "SSIM", "top-1", "hint top-1", "n", "seeds", "evaluations", "CPU s"), "number"
    )
    cells = []
    for run, own in rows.groupby("run", sort=False):
        costs = own.groupby("attack")[["n_evals", "cpu_s"]].max()
        spread = own.groupby("attack")["psnr_db_std"].mean()
        for one in reversed(pooled(own)):  # the weakest first
            cells.append(
                (
                    f"{html.escape(str(run).removeprefix(SURVEY))} "
                    f"<small>{html.escape(attack_label(one['attack']))}</small>",
                    number(one["psnr_db"], 1),
                    number(spread[one["attack"]], 1),
                    number(one["ssim"], 2),
                    _share(one["id_top1"]),
                    _share(one["hint_id_top1"]),
                    str(one["n"]),
                    str(one["n_seeds"]),
                    number(costs["n_evals"][one["attack"]]),
                    number(costs["cpu_s"][one["attack"]], 1),
                )
            )
    return str(lay_out(columns, {"": cells}).data)


def _without_information(rows: pd.DataFrame) -> str:
    """Say what guessing gets on the same transcripts."""
    guesses = rows[rows["attack"].isin(NO_INFORMATION)]
    psnr = guesses[guesses["attack"] == "mean_public"]["psnr_db"]
    images, hints = (percent(guesses[name].max()) for name in ("id_top1", "hint_id_top1"))
    return (
        f'<p class="note">No information, on the same transcripts: the mean public image reaches {psnr.min():.1f} to '
        f"{psnr.max():.1f} dB, depending on transcript and bucket; it or a random public one identifies at most "
        f"{images} by the image and {hints} by the hint in any bucket (mixed samples are matched within their group, "
        f"which helps guesses too). Chance: {percent(rows['id_chance'].max())}.</p>"
    )


def prompts_table(material: Material) -> HTML:
    """Show what is recovered of the prompts."""
    every = pd.concat([material.evidence.attacks, material.surveyed])
    rows = every[every["prompt_exact"].notna()]
    columns = {"transcript": "name", "defences": "", "attack": "name", "reads": ""}
    columns |= dict.fromkeys(("n", "seeds", "exact"), "number")
    cells = []
    for (run, attack), own in rows.groupby(["run", "attack"], sort=False):
        (one,) = pooled(own)
        reads = str(own["knowledge"].iloc[0]).split(" + ")
        cells.append(
            (
                html.escape(str(run).removeprefix(SURVEY)),
                html.escape(in_words(str(own["defences"].iloc[0]).replace("none", ""))),
                html.escape(attack_label(str(attack))),
                html.escape(", ".join(FIELD_WORDS.get(name, name) for name in reads)),
                str(one["n"]),
                str(one["n_seeds"]),
                percent(one["prompt_exact"]),
            )
        )
    return lay_out(columns, {"": cells})


def ablation_table(material: Material) -> HTML:
    """Show which single fact each attack lives on."""
    columns = {"transcript": "name", "attack": "name", "denied": "", "measure": "", "with it": "number"}
    columns |= {"without it": "number", "breaks": ""}
    measures = {"id_top1": "top-1", "hint_id_top1": "hint top-1", "prompt_exact": "prompt exact"}
    cells = [
        (
            html.escape(str(row["run"]).removeprefix(SURVEY)),
            html.escape(attack_label(str(row["attack"]))),
            html.escape(", ".join(FIELD_WORDS.get(name, name) for name in str(row["denied"]).split("-"))),
            measures.get(str(row["measure"]), ""),
            *(UNSCORED if str(row[side]) == "nan" else _share(row[side]) for side in ("with_it", "without_it")),
            UNSCORED if pd.isna(row["breaks"]) else _broken(row),  # type: ignore[call-overload]
        )
        for row in _records(material.ablations)
    ]
    return lay_out(columns, {"": cells})


def _broken(row: dict[str, object]) -> str:
    refused = "" if pd.isna(row["note"]) else "<small>it cannot run</small>"  # type: ignore[call-overload]
    return ("yes" if str(row["breaks"]) == "True" else "no") + refused


def conclusion(material: Material) -> Markdown:
    """Say in a few sentences which defences stopped whom."""
    rows = material.verdicts
    if rows.empty:
        return Markdown("- No survey was run.")
    sentences = []
    for data, own in _by_dataset(rows):
        papers = [str(name) for name in own[own["stops_paper_attacks"].astype(str) == "True"]["setting"]]
        safe = own[own["stops_adaptive"].astype(str) == "True"]
        unknown = own[own["stops_adaptive"].isna()]
        limit = STOPPED * own["id_chance"]
        hidden = own[(own["id_worst"] <= limit) & (limit < 1.0) & own["id_top1"].notna()]
        sentences.append(
            f"**{data}:** {len(papers)} of {len(own)} settings stop the paper's attackers"
            + (f" ({', '.join(papers)})" if papers else "")
            + f"; {len(hidden)} keep the image from the strongest attacker that knows the defence"
            + (f" ({', '.join(map(str, hidden['setting']))})" if len(hidden) else "")
            + f"; {len(safe)} keep image and hint"
            + (f" ({', '.join(map(str, safe['setting']))})" if len(safe) else "")
            + (f"; {UNMEASURED}: {', '.join(map(str, unknown['setting']))}." if len(unknown) else ".")
        )
    return Markdown("\n".join(f"- {sentence}" for sentence in sentences))
