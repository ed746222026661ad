"""Which defence is safe? Per defence: the strongest attacker, what it gets, what control is left, and why."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from splitlab.core.labels import UNMEASURED
from splitlab.privacy.accounting import randomness_of
from splitlab.split.attacks import ATTACKS, NO_INFORMATION
from splitlab.split.config import Adversary
from splitlab.study.results import by_adversary, words

VERDICT_COLUMNS = (
    *("defences", "strongest_attack", "psnr_db", "ssim", "id_top1", "control_iou", "eval_loss"),
    *("stops_paper_attacks", "stops_adaptive", "reason", "dataset", "setting", "id_worst", "worst_t_low"),
    *("strongest_denied", "paper_attack", "paper_id_worst", "hint_attack", "hint_id_top1", "id_chance", "n", "n_seeds"),
    *("both_id_top1", "epsilon_message", "randomness", "why_no_epsilon"),
)

STOPPED = 10.0
"""An attack is stopped if in no timestep bucket it identifies more than this many times chance."""

PAPER = ("noise", "defences")
"""The paper's attackers use neither the label nor which defences are on: attacks denied both."""

SURVEY = "survey"
"""The kind of setting that is judged; see `splitlab.study.results.SETTINGS`."""

WAYS = {"id_top1": "image", "hint_id_top1": "hint", "both_id_top1": "image and hint together"}
"""Columns that say which share was identified, and by what."""

POOLED = ("psnr_db", "ssim", "id_top1", "hint_psnr_db", "hint_id_top1", "prompt_exact", "both_id_top1")
"""Columns of the attack table that are averaged over timestep buckets."""

ABLATION_COLUMNS = ("run", "dataset", "attack", "denied", "measure", "with_it", "without_it", "breaks", "note")


def verdicts(attacks: pd.DataFrame, costs: pd.DataFrame | None, settings: pd.DataFrame | None = None) -> pd.DataFrame:
    """Judge every defence of the survey.

    Args:
        attacks: the attack table (`splitlab.study.results.VIEWS`).
        costs: what each defence costs, likewise; None: that was not measured.
        settings: facts of the settings by their id, to say which ε one message buys; None: do not.

    Returns one row per surveyed run, in the order of `costs`. `strongest_attack` identifies most private images over
    all the timesteps that the client draws (PSNR decides between equals), and `psnr_db`, `ssim`, `id_top1` are its;
    `id_worst` is the highest identification by any attack in any one timestep bucket. `stops_adaptive` also asks that
    no recovered hint identifies, nor image and hint together. Both are empty, neither stopped nor not, where something
    was not scored, or `STOPPED` times chance is everybody.
    `epsilon_message` is the ε of one message (δ: `splitlab.split.privacy.DELTA`), where the defences own both a bound
    and a noise; else `why_no_epsilon` says why not. `randomness` says whether the clients' draws, which an ε rests on,
    are "secret" or "published".
    """
    rows = [
        _verdict(rows_of_run, costs) | _claimed(str(run), rows_of_run, settings)
        for run, rows_of_run in attacks[attacks["kind"] == SURVEY].groupby("run", sort=False)
    ]
    if costs is not None:
        places = {cell: i for i, cell in enumerate(zip(costs["dataset"], costs["name"], strict=True))}
        rows.sort(key=lambda row: places.get((row["dataset"], row["setting"]), len(places)))
    return pd.DataFrame(rows, columns=list(VERDICT_COLUMNS)).round(4)


def pooled(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Pool each attack's rows of one run over timestep buckets, weighted by n; strongest first.

    A measure that is missing in one bucket is NaN; `id_worst` is the largest there is. What was not scored comes last.
    """
    pools: list[dict[str, Any]] = []
    rows = rows.astype(dict.fromkeys(POOLED, float))
    for adversary, buckets in by_adversary(rows[~rows["attack"].isin(NO_INFORMATION)]).items():
        weights = buckets["n"] / buckets["n"].sum()
        pool: dict[str, Any] = {name: float((buckets[name] * weights).sum(min_count=len(buckets))) for name in POOLED}
        worst = buckets.sort_values("id_top1", ascending=False, kind="stable", na_position="last").iloc[0]
        pool |= {"id_worst": float(worst["id_top1"]), "worst_t_low": worst["t_low"], "adversary": adversary}
        pool["prompted"] = "encoder_hidden_states" in words(worst["used"])
        pools.append(pool | {"n": int(buckets["n"].sum()), "n_seeds": int(buckets["n_seeds"].max())})
    return sorted(pools, key=lambda pool: (-known(pool["id_top1"]), -known(pool["psnr_db"])))


def known(value: float) -> float:
    """Return a number to order by: what is NaN comes behind everything that was measured."""
    return -math.inf if math.isnan(value) else value


def unscored(rows: pd.DataFrame) -> list[str]:
    """Name by what no attack's identification was scored, in some timestep bucket of one run; guesses do not count."""
    attacks, places = rows[~rows["attack"].isin(NO_INFORMATION)], set(rows["t_low"])
    return [way for name, way in WAYS.items() if places - set(attacks[attacks[name].notna()]["t_low"])]


def _verdict(rows: pd.DataFrame, costs: pd.DataFrame | None) -> dict[str, Any]:
    chance = float(rows["id_chance"].iloc[0])
    verdict: dict[str, Any] = {name: str(rows[name].iloc[0]) for name in ("defences", "dataset")}
    verdict |= {"setting": str(rows["name"].iloc[0]), "id_chance": chance}
    if costs is not None:
        same = costs[costs["dataset"].eq(verdict["dataset"]) & costs["name"].eq(verdict["setting"])]
        verdict |= {name: same[name].mean(skipna=False) for name in ("control_iou", "eval_loss") if len(same)}
    attacks = pooled(rows)
    if not attacks:
        return verdict | {"stops_adaptive": None, "reason": f"{UNMEASURED}: no attack but guesses was run"}
    worst = max(attacks, key=lambda pool: (known(pool["id_worst"]), -_rank(pool["adversary"])))
    return verdict | _judged(attacks, worst, chance, unscored(rows))


def _judged(attacks: list[dict[str, Any]], worst: dict[str, Any], chance: float, absent: list[str]) -> dict[str, Any]:
    """Say who is stopped; nothing where something was not scored, or so few candidates leave nothing to exceed."""
    best, limit = attacks[0], STOPPED * chance
    hint = max(attacks, key=lambda pool: known(pool["hint_id_top1"]))
    both = max((pool["both_id_top1"] for pool in attacks), key=known)
    most = max(map(known, (worst["id_worst"], hint["hint_id_top1"], both)))
    judged: dict[str, Any] = {
        "strongest_attack": best["adversary"].attack,
        "strongest_denied": " ".join(best["adversary"].denied),
        **{name: best[name] for name in ("psnr_db", "ssim", "id_top1", "n", "n_seeds")},
        "stops_adaptive": False if most > limit else None if absent or limit >= 1.0 else True,
        "id_worst": worst["id_worst"],
        "worst_t_low": worst["worst_t_low"],
        "hint_attack": hint["adversary"].attack,
        "hint_id_top1": hint["hint_id_top1"],
        "both_id_top1": both,
        "id_chance": chance,
    }
    papers = [pool for pool in attacks if pool["adversary"].denied == PAPER]
    if papers:
        first = max(papers, key=lambda pool: known(pool["id_worst"]))
        judged |= {"paper_attack": first["adversary"].attack, "paper_id_worst": first["id_worst"]}
        complete = limit < 1.0 and not math.isnan(first["id_worst"]) and all(map(_complete, papers))
        judged["stops_paper_attacks"] = False if first["id_worst"] > limit else True if complete else None
    return judged | {"reason": _reason(judged, worst, absent)}


def _complete(attack: dict[str, Any]) -> bool:
    """Say whether a pooled attack that recovers images was scored in every bucket; others have nothing to score."""
    after_images = not all(math.isnan(attack[name]) for name in ("psnr_db", "id_worst"))
    return not (after_images and math.isnan(attack["id_top1"]))


def _claimed(run: str, rows: pd.DataFrame, settings: pd.DataFrame | None) -> dict[str, Any]:
    """Say which ε one message buys, or why none."""
    if settings is None:
        return {}
    facts = {name: settings[name][run] for name in ("epsilon_message", "why_no_epsilon")}
    return facts | {"randomness": randomness_of(rows)}


def ablations(attacks: pd.DataFrame, refused: Mapping[tuple[str, Adversary], str]) -> pd.DataFrame:
    """Compare each attack with itself denied a single fact.

    Args:
        attacks: the attack table.
        refused: (run, adversary) -> why the attack could not run without what it was denied.

    Returns one row per run and denial. `measure` is what the attack is after: identification by image, by hint, or the
    share of exact prompts; `breaks` says whether less than half of it is left, or the attack cannot run at all; it is
    empty where either was not scored.
    """
    rows = []
    datasets = attacks.drop_duplicates("run").set_index("run")["dataset"]
    pools = {(run, pool["adversary"]): pool for run, of_run in attacks.groupby("run") for pool in pooled(of_run)}
    for run, adversary in [*pools, *refused]:
        whole = pools.get((run, Adversary(adversary.attack)))
        if not adversary.denied or whole is None:
            continue
        measure = next((m for m in ("id_top1", "hint_id_top1", "prompt_exact") if not pd.isna(whole[m])), "id_top1")
        left = _left(pools.get((run, adversary)), measure)
        row = {"run": run, "dataset": datasets[run], "attack": adversary.attack, "measure": measure}
        note = refused.get((str(run), adversary), "")
        scored = not math.isnan(left) and not math.isnan(whole[measure])
        breaks = True if note else left < 0.5 * whole[measure] if scored else None
        row |= {"denied": " ".join(adversary.denied), "with_it": whole[measure], "without_it": left}
        rows.append(row | {"breaks": breaks, "note": note})
    return pd.DataFrame(rows, columns=list(ABLATION_COLUMNS)).round(4)


def _left(denied: dict[str, Any] | None, measure: str) -> float:
    """Return what an attack reaches without a fact: 0 where it cannot run or recovers nothing, NaN if not scored."""
    recovered = {"id_top1": "psnr_db", "hint_id_top1": "hint_psnr_db"}.get(measure, measure)
    return 0.0 if denied is None or math.isnan(denied[recovered]) else float(denied[measure])


def _rank(adversary: Adversary) -> int:
    """Return an attack's place: of equals the first, which is the simplest, gives the reason."""
    record = ATTACKS.get(adversary.attack)
    return record.rank if record else len(ATTACKS) * 1000


def _reason(judged: dict[str, Any], worst: dict[str, Any], absent: list[str]) -> str:
    """Say in one sentence why the defence holds or not, or what it would take to know."""
    limit, where = STOPPED * judged["id_chance"], f"t ≥ {judged['worst_t_low']:.0f}"
    if judged["id_worst"] > limit:
        plain = worst["adversary"].attack
        reason = ATTACKS[plain].reason if plain in ATTACKS else ""
        why = (reason or "the attack named undoes it") + (", and the prompt is sent" if worst["prompted"] else "")
        return f"{plain} identifies {judged['id_worst']:.0%} at {where}: {why}"
    if judged["hint_id_top1"] > limit:
        return f"the image is hidden, but the hint is recovered and identifies {judged['hint_id_top1']:.0%}"
    if judged["both_id_top1"] > limit:
        return f"neither image nor hint identifies, but the two together do: {judged['both_id_top1']:.0%}"
    if limit >= 1.0:
        candidates = round(1.0 / judged["id_chance"])
        return f"{UNMEASURED}: among {candidates} candidates no attack can exceed {STOPPED:.0f} times chance"
    if absent:
        return f"{UNMEASURED}: no attack was scored by {' or '.join(absent)} in every timestep bucket"
    return (
        f"no attack identifies more than {judged['id_worst']:.0%} by image or hint (chance {judged['id_chance']:.0%})"
    )
