"""The report's part on privacy against utility over all schemes, from saved artefacts only."""

import html

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.labels import UNMEASURED, counted, percent
from splitlab.core.tables import read_table
from splitlab.privacy.accounting import SIMULATED_NOTE, epsilon_words
from splitlab.report.cells import DASH, figure, lay_out, number
from splitlab.report.figures.tradeoff_figures import LOOKS
from splitlab.report.page import Material
from splitlab.study.tradeoff import MEMBERSHIP, PUBLIC_DATA, SPLIT, full_name

GUESSING, USEFUL = 0.1, 0.75
"""Leak up to which a setting counts as private, and utility kept from which it counts as useful, in the summary."""


def points(material: Material) -> pd.DataFrame:
    """Read what the picture shows.

    Raises:
        InputError: it is missing or damaged.
    """
    table = read_table(material.figures / "tradeoff.csv")
    return table.assign(**{name: table[name].fillna("") for name in ("left_out", "why_no_epsilon", "ceiling_by")})


def conclusion(table: pd.DataFrame) -> Markdown:
    """Say which settings keep both, and which come nearest."""
    shown = table[table["left_out"] == ""]
    public, shown = shown[shown["scheme"] == PUBLIC_DATA], shown[shown["scheme"] != PUBLIC_DATA]
    private = shown[(shown["leak"] <= GUESSING) & shown["why_no_epsilon"].ne("no noise, ε = ∞")]
    both = private[private["kept"] >= USEFUL]
    lines = [
        f"- {counted(len(private), 'setting')} of {len(shown)} leave the strongest attacker at most {GUESSING:g} on a "
        f"scale from guessing (0) to always right (1); {len(both)} of them keep at least {percent(USEFUL)} of what "
        f"private data bring without a defence{_names(both)}."
    ]
    messages = private[private["scheme"].str.startswith(SPLIT)]
    once = messages[messages["messages"].eq(1)]
    if len(once):
        lines.append(
            f"- Of these, {counted(len(once), 'setting')} of split clients were attacked from one message per image, "
            f"not from all that a run sends{_names(once)}: what a run gives away was {UNMEASURED}."
        )
    if len(private):
        best = private.sort_values("kept", kind="stable").iloc[-1]
        lines.append(f"- The most useful of them: {_name(best)}, which keeps {percent(float(best['kept']))}.")
    if len(messages) and best["measure"] == MEMBERSHIP:
        best = messages.sort_values("kept", kind="stable").iloc[-1]
        lines.append(f"- Among split clients it is {_name(best)}, which keeps {percent(float(best['kept']))}.")
    lines += [
        f"- **Public data alone** teach a ControlNet, on {row['dataset']}, {percent(float(row['kept']))} of the same: "
        "what private data are worth begins above that."
        for _, row in public.iterrows()
    ]
    return Markdown("\n".join(lines))


def _names(rows: pd.DataFrame) -> str:
    return f" ({', '.join(_name(row) for _, row in rows.iterrows())})" if len(rows) else ""


def _name(row: pd.Series) -> str:
    privacy = f", {epsilon_words(row['epsilon'], row['randomness'])}" if not pd.isna(row["epsilon"]) else ""
    return f"{full_name(row)}{privacy}, on {row['dataset']}"


def picture(material: Material) -> HTML:
    """Show it."""
    caption = (
        "Privacy against utility. Right: the strongest attacker recognises every image; left: it guesses. Top: as "
        "useful as without a defence; bottom: as without private data. Filled: the strongest attack by whatever it "
        "recovers. Identifying an image among 100 is a graver breach than telling whether it was trained on: marks of "
        "different kinds share the ends of the scale, not what lies between. Whiskers: ± 1 standard deviation over "
        f"training seeds, where there are several. {SIMULATED_NOTE}"
    )
    return HTML(figure(material.figures / "tradeoff.png", caption))


def table(points: pd.DataFrame) -> HTML:
    """Show what stands behind every mark, and what was left out and why."""
    numbers = ("success", "chance", "leak", "at most", "utility", "± seeds", "no private data", "no defence", "kept")
    columns = {"setting, and its strongest attack": "setting"} | dict.fromkeys((*numbers, "n", "seeds"), "number")
    shown = points[points["left_out"] == ""]
    groups = {
        f"{html.escape(str(scheme))} <small>{html.escape(str(own['measure'].iloc[0]))}</small>": [
            _row(row) for _, row in own.iterrows()
        ]
        for scheme, own in sorted(shown.groupby("scheme"), key=lambda one: list(LOOKS).index(str(one[0])))
    }
    absent = points[points["left_out"] != ""]
    reasons = "; ".join(
        f"{html.escape(', '.join(_name(row) for _, row in own.iterrows()))}: {html.escape(str(why))}"
        for why, own in absent.groupby("left_out", sort=False)
    )
    note = (
        "<i>Leak</i>: (success − chance) / (1 − chance), worst timestep bucket; the strongest attack from one message "
        "per image up to as many as stated, which is a whole run's only where it is more than one. <i>At most</i>: "
        "what no attacker can exceed on that scale: somebody who holds the candidates and weighs them by Bayes, or any "
        "membership test against the ε printed. <i>Kept</i>: (utility − no private data) / (no defence − no private "
        "data). <i>Control under guidance</i>: of held-out hints, at the guidance best for public ones, after as "
        f"many steps. <i>n</i>: attacked samples; <i>seeds</i>: of training. {SIMULATED_NOTE}"
    )
    left = f'<p class="note">Left out of the picture: {reasons}.</p>' if reasons else ""
    return HTML(f'{lay_out(columns, groups).data}<p class="note">{note}</p>{left}')


def _row(row: pd.Series) -> tuple[str, ...]:
    why = str(row["why_no_epsilon"])
    claimed = None if pd.isna(row["epsilon"]) else epsilon_words(row["epsilon"], row["randomness"])
    privacy = claimed or (why if "∞" in why else f"no ε: {why}")
    share = percent if row["chance"] < 0.5 else lambda value: number(value, 3)
    iou = "accuracy" not in str(row["utility_of"])
    units = [number(row[name], 2) if iou else percent(float(row[name])) for name in ("utility", "floor", "reference")]
    return (
        f"{html.escape(str(row['setting']))} <small>{html.escape(str(row['attack']))}<br>{html.escape(privacy)}<br>"
        f"{html.escape(str(row['utility_of']))} on {html.escape(str(row['dataset']))}{_attacked(row)}</small>",
        share(float(row["success"])),
        share(float(row["chance"])),
        number(row["leak"], 2),
        number(row["ceiling"], 2),
        units[0],
        number(row["spread"], 3) if row["n_seeds"] > 1 else DASH,
        *units[1:],
        number(row["kept"], 2),
        number(row["n"]),
        number(row["n_seeds"]),
    )


def _attacked(row: pd.Series) -> str:
    """Say from how many messages per image a split client was attacked."""
    return (
        ""
        if pd.isna(row["messages"])
        else f"; attacked from up to {counted(int(row['messages']), 'message')} per image"
    )
