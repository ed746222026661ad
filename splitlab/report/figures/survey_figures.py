"""Pictures of the survey: every defence against every attack, and what privacy costs."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from splitlab.report.figures.style import subplots
from splitlab.split.attacks import attack_label
from splitlab.split.config import Adversary
from splitlab.study.results import by_adversary
from splitlab.study.verdicts import PAPER, STOPPED, SURVEY, pooled

PAPER_COLOUR, ADAPTIVE_COLOUR, HINT_COLOUR = "#E69F00", "#D55E00", "#0072B2"


def draw_frontier(verdicts: pd.DataFrame) -> Figure:
    """Draw privacy against utility: how often a defence's attackers identify, over the control that it leaves.

    Args:
        verdicts: the verdict table's rows of one data set; those whose cost and attackers were measured are drawn. The
            ordinate is the worst timestep bucket for images, the mean for hints.
    """
    rows = verdicts.dropna(subset=["control_iou", "id_worst"]).sort_values("control_iou", kind="stable")
    figure, axes = subplots(1, 1, size=(11.0, 6.4))
    axis = axes[0, 0]
    axis.vlines(rows["control_iou"], rows["paper_id_worst"], rows["id_worst"], color="#999999", lw=1.2, zorder=1)
    looks: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("paper_id_worst", "the paper's attackers: no label, no knowledge of the defence",
         {"marker": "o", "facecolors": "none", "edgecolors": PAPER_COLOUR, "lw": 2.0}),
        ("hint_id_top1", "by the recovered hint", {"marker": "^", "color": HINT_COLOUR}),
        ("id_worst", "strongest attacker that knows the defence", {"marker": "o", "color": ADAPTIVE_COLOUR}),
    )  # fmt: skip
    for column, label, look in looks:
        axis.scatter(rows["control_iou"], rows[column], s=62, label=label, zorder=3, **look)
    limit = STOPPED * float(rows["id_chance"].iloc[0]) if len(rows) else 0.1
    axis.axhline(limit, color="#555555", ls="--", lw=1.2, label=f"stopped: at most {limit:.0%}")
    for place, (_, row) in enumerate(rows.iterrows()):
        height = (1.035, 1.105, 1.175, 1.245)[place % 4]
        axis.annotate(
            row["setting"], (row["control_iou"], row["id_worst"]), (row["control_iou"], height), fontsize=8,
            ha="center", arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "lw": 0.6},
        )  # fmt: skip
    axis.set(ylim=(-0.03, 1.3), xlabel="control: overlap (IoU) of generated and asked-for disc")
    axis.set(yticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0], ylabel="top-1 identification in the worst timestep bucket")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _short(adversary: Adversary) -> str:
    """Name an attack without what stands behind it in brackets; the paper's, which is denied two facts, by that."""
    papers = adversary.denied == PAPER
    label = attack_label(Adversary(adversary.attack) if papers else adversary).split(" (")[0]
    return label + (", paper's" if papers else "")


def draw_matrix(attacks: pd.DataFrame, dataset: str, order: Sequence[str]) -> Figure:
    """Draw how often each attack identifies the private image under each defence of the survey, over all timesteps.

    Args:
        attacks: the attack table.
        dataset: which data set's rows.
        order: the settings, from top to bottom.
    """
    rows = attacks[attacks["kind"].eq(SURVEY) & attacks["dataset"].eq(dataset)]
    cells = {
        name: {pool["adversary"].name: pool["id_top1"] for pool in pooled(of_setting)}
        for name, of_setting in rows.groupby("name", sort=False)
    }
    table = pd.DataFrame(cells).T.dropna(axis="columns", how="all")
    table = table.loc[[name for name in order if name in table.index], table.mean().sort_values(kind="stable").index]
    figure, axes = subplots(1, 1, size=(11.0, 2.4 + 0.36 * len(table)))
    axis = axes[0, 0]
    sns.heatmap(table, ax=axis, vmin=0.0, vmax=1.0, cmap="rocket_r", annot=True, fmt=".2f", linewidths=0.5,
                cbar=False, annot_kws={"fontsize": 8})  # fmt: skip
    adversaries = {who.name: who for who in by_adversary(rows)}
    names = [_short(adversaries[str(name)]) for name in table.columns]
    axis.set_xticks(axis.get_xticks(), names, rotation=30, ha="right")
    axis.tick_params(axis="y", rotation=0)
    axis.grid(visible=False)
    axis.set(
        title=f"{dataset}: how often the private image is identified (empty: it does not apply, or was not scored)"
    )
    return figure
