"""Privacy against utility over all schemes, on one pair of scales: what is left to the attacker, and of the use.

Every scheme is attacked in its own way and judged by its own utility. What they share are the ends of the scales: an
attacker who guesses (0) or is always right (1); a model made without private data (0) or without a defence (1).
"""

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from splitlab.core.labels import UNSCORED
from splitlab.core.seeds import PUBLISHED
from splitlab.core.tables import read_table
from splitlab.federated.attacks import ON_IMAGES, inversion_label
from splitlab.privacy.accounting import randomness_of
from splitlab.split.attacks import NO_INFORMATION, attack_label
from splitlab.split.config import read_defences
from splitlab.split.privacy import message_guarantee
from splitlab.study.dp_survey import CONTRASTS, PUBLIC, REAL, START
from splitlab.study.results import adversaries, words
from splitlab.study.verdicts import SURVEY, WAYS, known, unscored

COLUMNS = (
    *("scheme", "setting", "dataset", "attack", "measure", "success", "chance", "leak", "image_leak", "ceiling"),
    *("ceiling_by", "utility_of", "utility", "spread", "floor", "reference", "kept", "epsilon", "randomness"),
    *("why_no_epsilon", "n", "n_seeds", "left_out", "messages"),
)
"""`leak`: the strongest attacker's success above chance, 0 to 1. `image_leak`: the same by the image alone. `ceiling`:
what no attacker can exceed, on the scale of `leak`, and `ceiling_by` what says so. `kept`: utility, 0 for the same
scheme without private data (`floor`) and 1 without defence (`reference`). `spread`: standard deviation of utility over
training seeds. `randomness`: whether the draws that ε rests on are "secret" or "published". `n`: attacked samples.
`left_out`: why a row has no place in the picture; empty where it has one.
`messages`: from up to how many messages per image a split client was attacked; a run sends more than one."""

IDENTIFICATION, MEMBERSHIP = "identification among {:.0f}", "membership, AUC"

SPLIT, MATCHED, FEDERATED, FEDERATED_DP = "split", "split, matched client", "federated", "federated DP-LDM"
PUBLIC_DATA = "public data alone"
DP_LDM, DP_LORA, DP_FULL = "DP-LDM", "DP-LoRA", "DP-SGD on the full U-Net"
TRAINED = {"attention": DP_LDM, "blocks": DP_LDM, "transformers": DP_LDM, "lora": DP_LORA, "unet": DP_FULL}


MATCHED_TABLES = {"matched_client": ("shapes", "control_iou"), "matched_client_photos": ("photos", "control_edges")}
"""Table of `benchmarks/matched_client.py` -> its data set, and how control is measured there."""
MEASURED_BY = {"id_image": "image", "id_hint": "hint", "id_both": "image and hint"}


def tradeoff(metrics: Path, *, alphas_cumprod: Tensor) -> pd.DataFrame:
    """Collect every measured setting of every scheme.

    Args:
        metrics: folder of the result tables; a scheme whose table is not there has no rows.
        alphas_cumprod: `[T]` ᾱ of the noise schedule, for the ε of split clients.

    Returns a table of `COLUMNS`.
    """
    names = (
        "split_attacks",
        "utility",
        "training",
        *MATCHED_TABLES,
        "whole_run",
        "gradient_attacks",
        "dp",
        "dp_shares",
    )
    found = {n: read_table(metrics / f"{n}.csv") for n in names if (metrics / f"{n}.csv").exists()}
    rows = []
    if {"split_attacks", "utility", "training"} <= set(found):
        rows += _surveyed(found["split_attacks"], found["utility"], found["training"], alphas_cumprod)
    for name, (dataset, measure) in MATCHED_TABLES.items():
        if {name, "training"} <= set(found):
            floor = _without_control(found["training"], dataset, measure)
            runs = found.get("whole_run", found[name])
            runs = runs[runs["dataset"] == dataset] if "dataset" in runs else runs[:0]
            rows += _matched(found[name], runs, alphas_cumprod, dataset=dataset, measure=measure, floor=floor)
    if {"gradient_attacks", "training"} <= set(found):
        rows += _federated(found["gradient_attacks"], found["training"])
    if "dp" in found:
        private = _private(found["dp"])
        rows += private
        if "dp_shares" in found:
            rows += _shared(found["dp_shares"], private)
    return pd.DataFrame([_placed(row) for row in rows], columns=list(COLUMNS)).round(4)


def above_chance(success: float, chance: float) -> float:
    """Return how far a success rate is on the way from chance (0) to certainty (1); worse than chance counts as 0.

    NaN where the success was not scored.
    """
    return math.nan if math.isnan(success) else max(0.0, (success - chance) / (1.0 - chance))


def membership_ceiling(epsilon: float, delta: float) -> float:
    """Return the largest 2 AUC - 1 of any membership test against an (ε, δ) guarantee.

    The area below the trade-off curve f(α) = max(0, 1 - δ - e^ε α, e^-ε (1 - δ - α)) of Dong, Roth and Su 2022
    (Prop. 2.4), which every test's curve stays above: 1 - 2 (1 - δ)² / (1 + e^ε).
    """
    return 1.0 if math.isinf(epsilon) else 1.0 - 2.0 * (1.0 - delta) ** 2 / (1.0 + math.exp(min(epsilon, 700.0)))


def nominal(epsilon: float) -> float:
    """Return the ε that a run was asked for: calibration ends just below it."""
    return epsilon if math.isinf(epsilon) else float(f"{epsilon:.2g}")


def full_name(row: pd.Series) -> str:
    """Name a row's scheme, and its setting where the scheme does not say it."""
    said = row["scheme"] == TRAINED.get(row["setting"]) and row["setting"] not in ("blocks", "transformers")
    return str(row["scheme"]) if said else f"{row['scheme']}, {row['setting']}"


def _placed(row: dict[str, Any]) -> dict[str, Any]:
    """Add a row's two coordinates, or say why it has none."""
    defaults: dict[str, Any] = {"image_leak": math.nan, "ceiling": math.nan, "ceiling_by": "", "messages": math.nan}
    row = defaults | {"randomness": PUBLISHED, "why_no_epsilon": "", "left_out": ""} | row
    row["leak"] = above_chance(row["success"], row["chance"])
    gain = row["reference"] - row["floor"]
    row["kept"] = (row["utility"] - row["floor"]) / gain if gain > 0 else math.nan
    if row["left_out"]:
        pass
    elif math.isnan(row["success"]):
        row["left_out"] = "no attack was scored"
    elif math.isnan(row["utility"]):
        row["left_out"] = "its utility was not measured"
    elif math.isnan(row["floor"]):
        row["left_out"] = "what is reached without private data was not measured"
    elif math.isnan(row["reference"]):
        row["left_out"] = "the same training without defence was not measured"
    elif not gain > 0:
        row["left_out"] = (
            f"without defence it is no better ({row['reference']:.2f}) than without private data ({row['floor']:.2f})"
        )
    return row


def _surveyed(attacks: pd.DataFrame, utility: pd.DataFrame, training: pd.DataFrame, alphas: Tensor) -> list[dict]:
    """Place the survey's settings: the strongest attack in its worst timestep bucket, one message per image."""
    rows = []
    surveyed = attacks[attacks["kind"].eq(SURVEY) & ~attacks["attack"].isin(NO_INFORMATION)]
    for _, own in surveyed.groupby("run", sort=False):
        dataset, setting, defences = (str(own[name].iloc[0]) for name in ("dataset", "name", "defences"))
        of_data = utility[utility["dataset"] == dataset]
        cost = of_data[of_data["setting"] == setting]
        column = "control_iou" if of_data["control_iou"].notna().any() else "control_edges"
        best = max((_strongest(own, name) for name in WAYS), key=lambda one: known(one[0]))
        absent = unscored(own) if known(best[0]) < 1.0 else []  # more than all cannot be identified
        chance = float(own["id_chance"].iloc[0])
        rows.append(
            _client(defences, alphas)
            | {
                "setting": setting,
                "dataset": dataset,
                "randomness": randomness_of(own),
                "attack": best[1],
                "measure": IDENTIFICATION.format(1.0 / chance),
                "success": best[0],
                "chance": chance,
                "image_leak": above_chance(_strongest(own, "id_top1")[0], chance),
                "utility_of": column.replace("_", " ").replace("iou", "IoU"),
                "utility": cost[column].mean(skipna=False),
                "spread": cost[column].std(skipna=False),
                "reference": of_data[of_data["defences"] == "none"][column].mean(skipna=False),
                "floor": _without_control(training, dataset, column),
                "n": best[2],
                "n_seeds": len(cost),
                "messages": 1,
                "left_out": f"{UNSCORED} by {' or '.join(absent)} in every timestep bucket" if absent else "",
            }
        )
    return rows


def _strongest(rows: pd.DataFrame, column: str) -> tuple[float, str, int]:
    """Return the highest identification by one measure, of equals the cheapest attack's, and over how many samples.

    NaN where none was scored.
    """
    scored = rows.dropna(subset=[column])
    if scored.empty:
        return math.nan, UNSCORED, 0
    best = scored.sort_values([column, "n_evals"], ascending=[False, True], kind="stable").iloc[0]
    (who,) = adversaries(best.to_frame().T)
    by = {"id_top1": "image", "hint_id_top1": "hint", "both_id_top1": "image and hint"}[column]
    return float(best[column]), f"{attack_label(who)}, by {by}", int(best["n"])


def _client(defences: str, alphas: Tensor) -> dict[str, Any]:
    """Say of a split client which scheme it is, and which ε one message of it buys or why none."""
    config = read_defences(defences.removesuffix(" recoloured"))
    found = message_guarantee(config, alphas)
    return {
        "scheme": MATCHED if config.matched else SPLIT,
        "epsilon": found.epsilon if found.events else math.nan,
        "why_no_epsilon": found.why,
    }


def _without_control(training: pd.DataFrame, dataset: str, column: str) -> float:
    """Return what the public base reaches without a ControlNet."""
    return float(
        training[(training["dataset"] == dataset) & (training["scheme"] == "no control")][column].mean(skipna=False)
    )


def _matched(
    table: pd.DataFrame, runs: pd.DataFrame, alphas: Tensor, *, dataset: str, measure: str, floor: float
) -> list[dict]:
    """Place the longer trainings of `benchmarks/matched_client.py`; who holds the candidates is their ceiling.

    `runs`: what more messages per image tell (`benchmarks/whole_run.py`); of all, the strongest attack counts.
    """
    rows = []
    for row in table.dropna(subset=["defences"]).to_dict("records"):
        chance = float(row["id_chance"])
        messages = [row | {"messages": 1}, *runs[runs["setting"] == row["setting"]].to_dict("records")]
        best = max(messages, key=lambda one: known(one["id_worst"]))
        absent = [str(one["messages"]) for one in messages if any(math.isnan(one[way]) for way in MEASURED_BY)]
        absent = absent if known(best["id_worst"]) < 1.0 else []  # more than all cannot be identified
        ideals = [(share, one["messages"]) for one in messages for share in _ideals(one)]
        ceiling, number = max(ideals, default=(math.nan, 1))
        rows.append(
            _client(str(row["defences"]), alphas)
            | _controlled(row, table, measure)
            | {
                "setting": row["setting"],
                "dataset": dataset,
                "attack": f"{attack_label(best['attack'])}, by {_way(best)}{_from(best['messages'])}",
                "measure": IDENTIFICATION.format(1.0 / chance),
                "success": float(best["id_worst"]),
                "chance": chance,
                "image_leak": above_chance(max((float(one["id_image"]) for one in messages), key=known), chance),
                "ceiling": above_chance(ceiling, chance) if ideals else math.nan,
                "ceiling_by": f"somebody who holds the candidates, by Bayes{_from(number)}" if ideals else "",
                "floor": floor,
                "n": int(best["n"]),
                "messages": max(int(one["messages"]) for one in messages),
                "left_out": f"from {', '.join(absent)} message(s) per image it was {UNSCORED}" if absent else "",
            }
        )
    chance = float(table["id_chance"].mean())
    for row in table[table["setting"] == "(public data only)"].to_dict("records"):
        found = {"scheme": PUBLIC_DATA, "setting": "ControlNet", "dataset": dataset, "floor": floor, "epsilon": 0.0}
        found |= {"attack": "nothing private is used", "measure": IDENTIFICATION.format(1.0 / chance), "n": 0}
        rows.append(found | {"success": chance, "chance": chance} | _controlled(row, table, measure))
    return rows


def _ideals(row: Mapping[Hashable, Any]) -> list[float]:
    found = [float(row.get(f"{way}_ideal", math.nan)) for way in MEASURED_BY]
    return [share for share in found if not math.isnan(share)]


def _way(row: Mapping[Hashable, Any]) -> str:
    return MEASURED_BY[max(MEASURED_BY, key=lambda way: known(row[way]))]


def _from(messages: int) -> str:
    return f", from {messages:.0f} messages per image" if messages > 1 else ""


def _controlled(row: Mapping[Hashable, Any], table: pd.DataFrame, measure: str) -> dict[str, Any]:
    """Say how well a training follows hints under guidance, and how well the undefended one of as many steps does.

    All are asked alike: at the guidance along the control that is best for public hints.
    """
    column = f"{measure}_guided"
    undefended = ("none", f"(none, {row['steps']:.0f} steps)")
    plain = table[table["setting"].isin(undefended) & table["steps"].eq(row["steps"])]
    return {
        "utility_of": f"{measure.replace('_iou', ' IoU').replace('_', ' ')} under guidance",
        "utility": float(row[column]),
        "spread": float(row[f"{column}_std"]),
        "reference": float(plain[column].mean(skipna=False)),
        "n_seeds": int(row["n_seeds"]),
    }


def _federated(attacks: pd.DataFrame, training: pd.DataFrame) -> list[dict]:
    """Place federated training of a ControlNet as it is attacked in the updates' survey."""
    rows = attacks[attacks["model"].eq("controlnet") & attacks["attack"].isin(ON_IMAGES)]
    found = []
    for (dataset, defence, level), own in rows.groupby(["dataset", "defence", "level"], sort=False, dropna=False):
        best = own.sort_values("id_top1", ascending=False, kind="stable").iloc[0]
        absent = bool((own["ssim"].notna() & own["id_top1"].isna()).any())
        trained = training[(training["scheme"] == "federated") & (training["dataset"] == dataset)]
        plain = float(trained["control_iou"].mean(skipna=False))
        found.append(
            {
                "scheme": FEDERATED,
                "setting": "none" if defence == "none" else f"{defence}-{level:g}",
                "dataset": dataset,
                "attack": f"{inversion_label(str(best['attack']), words(best['granted']))}, by image",
                "measure": IDENTIFICATION.format(1.0 / best["id_chance"]),
                "success": float(best["id_top1"]),
                "chance": float(best["id_chance"]),
                "utility_of": "control IoU",
                "utility": plain if defence == "none" else math.nan,
                "spread": math.nan,
                "reference": plain,
                "floor": _without_control(training, str(dataset), "control_iou"),
                "epsilon": math.nan,
                "why_no_epsilon": "nothing is bounded and noised",
                "n": int(best["n"] * best["n_seeds"]),
                "n_seeds": len(trained),
                "left_out": f"whom an attack identifies was {UNSCORED}" if absent else "",
            }
        )
    return found


def _private(table: pd.DataFrame) -> list[dict]:
    """Place private fine-tuning: accuracy of a classifier trained on samples, against membership inference."""
    rows = []
    targets = table["epsilon"].map(nominal)
    kinds = table.assign(target=targets).groupby(["dataset", "trainable", "target"], sort=False)
    for (dataset, trainable, epsilon), own in kinds:
        if trainable in CONTRASTS:
            continue
        target = float(str(epsilon))
        data = table[table["dataset"] == dataset]
        start = data[data["trainable"] == (START if (data["trainable"] == START).any() else PUBLIC)]
        plain = data[data["epsilon"].eq(math.inf) & ~data["trainable"].eq(REAL)]
        same = plain[plain["trainable"] == trainable]
        reference = same if len(same) else plain[plain["trainable"] == "attention"]
        measured = not own["downstream_acc"].isna().all()
        private, part = not math.isinf(target), str(trainable)
        rows.append(
            {
                "scheme": TRAINED.get(part, part),
                "setting": part,
                "dataset": dataset,
                "attack": "calibrated loss, on the finished model",
                "measure": MEMBERSHIP,
                "success": own["mia_auc"].mean(skipna=False),
                "chance": 0.5,
                "ceiling": membership_ceiling(own["epsilon"].max(), own["delta"].max()) if private else math.nan,
                "ceiling_by": "the guarantee, against every test" if private else "",
                "utility_of": "accuracy downstream" + ("" if len(same) else "; no defence: attention only"),
                "utility": own["downstream_acc"].mean(skipna=False),
                "spread": own["downstream_acc"].std(skipna=False),
                "reference": reference["downstream_acc"].mean(skipna=False),
                "floor": start["downstream_acc"].mean(skipna=False),
                "epsilon": target if private else math.nan,
                "randomness": randomness_of(own),
                "why_no_epsilon": "" if private else "no noise, ε = ∞",
                "n": int(min(own["n"].min(), own["n_test"].min())) * 2,
                "n_seeds": len(own),
                "left_out": "" if measured else "no accuracy downstream: its images are not of classes",
            }
        )
    return rows


def _shared(shares: pd.DataFrame, private: list[dict]) -> list[dict]:
    """Place federated DP-LDM whose clients share the noise: their sum is DP-SGD's step, so its utility is DP-LDM's."""
    own = shares[shares["noise"].isin(["none", "central"]) & shares["trainable"].eq("attention")]
    found = []
    for epsilon, rows in own.groupby("epsilon", sort=False):
        target = float(str(epsilon))
        best = rows.sort_values("identified", ascending=False, kind="stable", na_position="last").iloc[0]
        twin = [
            p
            for p in private
            if p["scheme"] == DP_LDM and (p["epsilon"] == target or _both_plain(p["epsilon"], target))
        ]
        base = twin[0] if twin else {"utility": math.nan, "spread": math.nan, "reference": math.nan, "floor": math.nan}
        reached = rows[rows["attack"] != best["attack"]]["identified"]
        found.append(
            {name: base[name] for name in ("utility", "spread", "reference", "floor")}
            | {
                "scheme": FEDERATED_DP,
                "setting": "shares of one image",
                "dataset": "digits",
                "attack": f"{best['attack']} ({best['knowledge']}), {best['shares']:.0f} share(s) of a client",
                "measure": IDENTIFICATION.format(1.0 / best["chance"]),
                "success": float(best["identified"]),
                "chance": float(best["chance"]),
                "image_leak": above_chance(float(reached.max()), float(best["chance"])) if len(reached) else math.nan,
                "utility_of": "accuracy downstream",
                "epsilon": math.nan if math.isinf(target) else target,
                "randomness": randomness_of(rows),
                "why_no_epsilon": "no noise, ε = ∞" if math.isinf(target) else "",
                "n": int(best["n"]),
                "n_seeds": int(base.get("n_seeds", 0)),
            }
        )
    return found


def _both_plain(epsilon: float, target: float) -> bool:
    return math.isnan(epsilon) and math.isinf(target)
