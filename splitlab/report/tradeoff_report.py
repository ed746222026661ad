"""The report's part on privacy against utility over all schemes, from saved artefacts only."""

import pandas as pd
from IPython.display import HTML, Markdown

from splitlab.core.labels import UNMEASURED, counted, percent
from splitlab.core.tables import read_table
from splitlab.privacy.accounting import SIMULATED_NOTE, epsilon_words
from splitlab.report import layout
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
        f"{counted(len(private), 'setting')} of {len(shown)} leave the strongest attacker at most {GUESSING:g} on a "
        f"scale from guessing (0) to always right (1); {len(both)} of them keep at least {percent(USEFUL)} of what "
        f"private data bring without a defence{_named(both)}."
    ]
    messages = private[private["scheme"].str.startswith(SPLIT)]
    once = messages[messages["messages"].eq(1)]
    if len(once):
        lines.append(
            f"Of these, {counted(len(once), 'setting')} of split clients were attacked from one message per image, "
            f"not from all that a run sends{_named(once)}: what a run gives away was {UNMEASURED}."
        )
    if len(private):
        best = private.sort_values("kept", kind="stable").iloc[-1]
        lines.append(f"The most useful of them: {_name(best)}, which keeps {percent(float(best['kept']))}.")
    if len(messages) and best["measure"] == MEMBERSHIP:
        best = messages.sort_values("kept", kind="stable").iloc[-1]
        lines.append(f"Among split clients it is {_name(best)}, which keeps {percent(float(best['kept']))}.")
    lines += [
        f"**Public data alone** teach a ControlNet, on {row['dataset']}, {percent(float(row['kept']))} of the same: "
        "what private data are worth begins above that."
        for row in layout.records(public)
    ]
    return layout.bullets(lines)


def _named(rows: pd.DataFrame) -> str:
    return layout.bracketed(_name(row) for row in layout.records(rows))


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
    return layout.figure(material.figures / "tradeoff.png", caption)


def table(points: pd.DataFrame) -> HTML:
    """Show what stands behind every mark, and what was left out and why."""
    drawn = points[points["left_out"] == ""]
    groups = {
        layout.aside(scheme, own["measure"].iloc[0]): [_row(row) for row in layout.records(own)]
        for scheme, own in sorted(drawn.groupby("scheme"), key=lambda group: list(LOOKS).index(str(group[0])))
    }
    absent = points[points["left_out"] != ""].groupby("left_out", sort=False)
    reasons = "; ".join(f"{', '.join(map(_name, layout.records(own)))}: {why}" for why, own in absent)
    note = (
        "*Leak*: (success − chance) / (1 − chance), worst timestep bucket; the strongest attack from one message "
        "per image up to as many as stated, which is a whole run's only where it is more than one. *At most*: "
        "what no attacker can exceed on that scale: somebody who holds the candidates and weighs them by Bayes, or any "
        "membership test against the ε printed. *Kept*: (utility − no private data) / (no defence − no private "
        "data). *Control under guidance*: of held-out hints, at the guidance best for public ones, after as "
        f"many steps. *n*: attacked samples; *seeds*: of training. {SIMULATED_NOTE}"
    )
    left = f"Left out of the picture: {reasons}." if reasons else ""
    return layout.table(groups, first="setting", notes=[note, left])


def _row(row: pd.Series) -> dict[str, str]:
    digits = dict.fromkeys(("success", "chance"), layout.PERCENT if row["chance"] < 0.5 else 3)
    if "accuracy" in row["utility_of"]:
        digits |= dict.fromkeys(("utility", "floor", "reference"), layout.PERCENT)
    where = f"{row['utility_of']} on {row['dataset']}{_attacked(row)}"
    return {
        "setting, and its strongest attack": layout.aside(row["setting"], row["attack"], _privacy(row), where),
        **layout.numbers(row, "success chance leak ceiling utility", digits=digits),
        "± seeds": layout.number(row["spread"] if row["n_seeds"] > 1 else None, 3),
        **layout.numbers(row, "floor reference kept n n_seeds", digits=digits),
    }


def _privacy(row: pd.Series) -> str:
    """Print a setting's ε, or why it has none."""
    if not pd.isna(row["epsilon"]):
        return epsilon_words(row["epsilon"], row["randomness"])
    return row["why_no_epsilon"] if "∞" in row["why_no_epsilon"] else f"no ε: {row['why_no_epsilon']}"


def _attacked(row: pd.Series) -> str:
    """Say from how many messages per image a split client was attacked."""
    if pd.isna(row["messages"]):
        return ""
    return f"; attacked from up to {counted(int(row['messages']), 'message')} per image"
