"""What was not scored or not measured, in the report: never a number, never "no", never a verdict."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from IPython.display import HTML
from world.evidence import attack_at, evidence, verdicts
from world.project import World

from splitlab.core.labels import UNMEASURED, UNSCORED, percent
from splitlab.core.paths import ROOT
from splitlab.report import claims, layout, survey_report, update_report
from splitlab.report import dp_report as dp_report
from splitlab.report import page as report
from splitlab.report.figures import dp_figures as dp_figures
from splitlab.report.figures import survey_figures
from splitlab.study.headlines import HEADLINES, write_headlines
from splitlab.study.leaks import leaks, strongest

Change = Callable[[pd.DataFrame, pd.DataFrame], None]


@pytest.fixture(scope="module")
def material(world: World) -> report.Material:
    return report.load_material(**world.folders)


def unscored(column: str, *, run: str = "s1", whole: bool = True) -> Change:
    """Take a score of the closed form away, in all buckets of a run or in its last."""

    def change(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        attack_at(0.1)(training, attacks)
        own = attacks[(attacks["run"] == run) & (attacks["attack"] == "closed_form")].index
        attacks.loc[own if whole else own[-1:], column] = math.nan

    return change


def test_a_missing_share_is_a_word() -> None:
    assert percent(math.nan) == UNMEASURED


def test_protection_is_not_claimed_from_attacks_that_were_not_scored(material: report.Material) -> None:
    found = verdicts(evidence(material, unscored("psnr_db")))
    assert {found[name] for name in ("floor", "prompts", "attacks")} == {UNMEASURED}
    assert verdicts(evidence(material, unscored("hint_psnr_db", run="split")))["activation"] == UNMEASURED
    assert claims.protection([math.nan], [math.nan]) == UNMEASURED
    said = claims.claims(evidence(material, unscored("psnr_db")))[2].measured
    assert "No attack on images was scored on s1." in said


def test_a_bucket_that_was_not_scored_is_not_counted_in_n(material: report.Material) -> None:
    def change(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        own = attacks[(attacks["run"] == "split") & (attacks["attack"] == "closed_form")].index
        assert len(own) == 2
        attacks.loc[own[-1:], "psnr_db"] = math.nan

    whole, part = (
        strongest(leaks(found.attacks))["split"] for found in (material.evidence, evidence(material, change))
    )
    assert (whole.n_buckets, part.n_buckets) == (2, 1)
    assert 0 < part.n < whole.n


def test_identification_that_was_not_scored_is_not_told_as_a_number(material: report.Material) -> None:
    def change(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        attack_at(1.0)(training, attacks)
        attacks["id_top1"] = math.nan

    found = evidence(material, change)
    assert (
        "how many private images it picks out of a gallery was not measured"
        in report.summary(replace(material, evidence=found)).data
    )
    assert f"identifies {UNMEASURED}" in str(strongest(leaks(found.attacks))["s1"])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("column", ["id_top1", "ssim"])
def test_the_attack_table_says_what_was_not_scored(material: report.Material, column: str, whole: bool) -> None:
    assert UNSCORED not in report.attack_table(material).data
    found = replace(material, evidence=evidence(material, unscored(column, whole=whole)))
    assert report.attack_table(found).data.count(f">{UNSCORED}<") == 1


def test_a_dash_is_what_an_attack_does_not_try() -> None:
    table = pd.DataFrame({"none": [math.nan, math.nan], "id_top1": [0.5, math.nan], "ssim": [0.5, 1.0]})
    assert layout.means(table, "none id_top1 ssim") == {"none": layout.DASH, "top-1": UNSCORED, "SSIM": "0.75"}
    assert layout.means(table, "none ssim", False) == {"none": layout.DASH, "SSIM": layout.DASH}
    assert layout.means(table, "none", True) == {"none": UNSCORED}
    assert layout.numbers({"id_top1": 0.996, "n": None, "n_evals": 1234}, "id_top1 n n_evals") == {
        "top-1": percent(0.996),
        "n": layout.DASH,
        "evaluations": "1,234",
    }


@pytest.mark.parametrize("column", ["up_bytes_per_sample", "down_bytes_per_sample"])
def test_bytes_that_were_not_counted_are_not_none(material: report.Material, column: str) -> None:
    def change(training: pd.DataFrame, attacks: pd.DataFrame) -> None:
        training["control_iou"] = training["scheme"].map(lambda name: 0.2 if name == "no control" else 0.8)
        training.loc[training["run"] == "s1", column] = math.nan

    found = verdicts(evidence(material, change))
    assert found["bytes"] == UNMEASURED
    assert found["gradient"] == (UNMEASURED if column.startswith("down") else claims.HOLDS)


def test_a_defence_that_was_not_judged_is_neither_yes_nor_no(material: report.Material) -> None:
    judged = material.verdicts.assign(stops_adaptive=None, stops_paper_attacks=None, strongest_attack=None)
    judged[["id_top1", "id_worst", "hint_id_top1", "both_id_top1", "paper_id_worst"]] = math.nan
    found = replace(material, verdicts=judged)
    html = survey_report.verdict_table(found).data
    assert "nan" not in html
    assert html.count(f">{UNMEASURED}<") == 7 * len(judged)
    assert ">yes<" not in html
    assert ">no<" not in html
    said = survey_report.conclusion(found).data
    assert (
        f"0 keep the image from the strongest attacker that knows the defence; 0 keep image and hint; {UNMEASURED}:"
        in said
    )
    assert survey_figures.draw_frontier(judged).axes


def test_an_ablation_that_was_not_scored_says_so(material: report.Material) -> None:
    found = material.ablations.assign(breaks=None, without_it=math.nan, note=math.nan)
    html = survey_report.ablation_table(replace(material, ablations=found)).data
    assert html.count(f">{UNSCORED}<") == 2 * len(found)  # what is left, and whether the attack breaks


def test_headlines_are_read_from_the_tables_and_none_is_a_mean_over_some_rows(tmp_path: Path) -> None:
    tables = ROOT / "reports/metrics"
    for table in {table for table, _, _ in HEADLINES.values()}:
        shutil.copy(tables / f"{table}.csv", tmp_path)
    found = write_headlines(tmp_path, tmp_path / "summary.json")
    assert list(found) == list(HEADLINES)
    for folder in (tmp_path, tables):
        assert json.loads((folder / "summary.json").read_text()) == found
    dp = pd.read_csv(tmp_path / "dp.csv")
    counted = dp.query(HEADLINES["acc_10"][2])
    assert len(counted) > 1
    dp.loc[counted.index[0], "downstream_acc"] = math.nan
    dp.to_csv(tmp_path / "dp.csv", index=False)
    left = write_headlines(tmp_path, tmp_path / "summary.json")
    assert set(found) - set(left) == {"acc_10"}


def seeds(column: str) -> pd.DataFrame:
    """Return a table of private fine-tuning of which one seed of the attention rows lacks a measure."""
    common = {"dataset": "digits", "delta": 1e-5, "n": 9, "n_test": 9, "n_samples": 9, "features": "f"}
    common |= {"conditioning": "class", "n_trainable": 1, "noise_multiplier": 1.0, "step_s": 1.0}
    common |= {"downstream_acc": 0.8, "frechet": 1.0, "mia_auc": 0.51, "audit_epsilon_lb": 0.5}
    rows = [
        common | {"trainable": name, "epsilon": epsilon, "seed": seed}
        for name, epsilon in (("public base", 0.0), ("attention", 1.0), ("attention", math.inf), ("unet", 1.0))
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows)
    table.loc[2, column] = math.nan
    return table


def words(shown: HTML) -> str:
    return re.sub("<[^>]*>", "", shown.data)


@pytest.mark.parametrize("column", ["downstream_acc", "frechet", "mia_auc", "audit_epsilon_lb"])
def test_a_mean_over_seeds_is_over_all_of_them_or_is_none(column: str, tmp_path: Path) -> None:
    found = dp_report.DPMaterial(seeds(column), tmp_path)
    assert found.measured("attention", [1.0], column) == {}
    row = next(part for part in dp_report.table(found).data.split("<tr>") if "attention only" in part)
    assert row.count(f">{UNMEASURED}<") == 1
    if column == "downstream_acc":
        assert re.search(rf"{UNMEASURED} \([^)]*ε = 1\)", dp_report.conclusion(found).data)
    if column == "audit_epsilon_lb":
        assert f"{UNMEASURED}: 1 run" in words(dp_report.claims_table(found))


def test_a_curve_has_no_point_where_a_seed_is_missing() -> None:
    lines = [
        dp_figures.draw_curve(table).axes[0].get_lines()[0].get_xdata()
        for table in (seeds("frechet"), seeds("downstream_acc"))
    ]
    assert [len(places) for places in lines] == [2, 1]


def updates(tmp_path: Path, *rows: dict) -> update_report.UpdateMaterial:
    common = {"defence": "none", "level": math.nan, "granted": None, "ceiling_ssim": math.nan, "cpu_s": 1.0}
    common |= dict.fromkeys(("ssim", "ssim_std", "psnr_db", "timestep_exact", "prompt_exact", "id_top1"), math.nan)
    common |= {"id_chance": 0.01, "n": 2, "n_seeds": 1, "n_evals": 5, "refused": None}
    table = pd.DataFrame([common | row for row in rows]).astype({"refused": object})
    return update_report.UpdateMaterial(table, tmp_path)


def verdicts_of(material: update_report.UpdateMaterial) -> list[str]:
    return re.findall(r'<span class="verdict [^"]*">([^<]*)</span>', update_report.claims_table(material).data)


def test_an_update_that_gave_nothing_back_is_counted_and_refusals_are_told(tmp_path: Path) -> None:
    good = {"cell": "a", "attack": "unknown_noise", "ssim": 0.99}
    refused = {"cell": "b", "attack": "unknown_noise", "refused": "it cannot"}
    times = {"cell": "a", "attack": "timesteps", "timestep_exact": 1.0}
    silent = {"cell": "b", "attack": "timesteps", "refused": "frozen"}
    assert verdicts_of(updates(tmp_path, good, times))[1:] == [claims.HOLDS, claims.HOLDS]
    found = updates(tmp_path, good, refused, times, silent)
    assert verdicts_of(found)[1] == claims.PARTLY
    assert "b: nothing was recovered or scored" in words(update_report.claims_table(found))
    for said in (update_report.claims_table(found).data, update_report.conclusion(found).data):
        assert "in 1 further cell the attack was refused" in said


def test_timesteps_that_never_come_back_refute_and_unscored_ones_do_not(tmp_path: Path) -> None:
    good = {"cell": "a", "attack": "unknown_noise", "ssim": 0.99}
    times = {"cell": "a", "attack": "timesteps"}
    for exact, verdict in ((0.0, claims.REFUTED), (0.5, claims.PARTLY), (1.0, claims.HOLDS), (math.nan, UNMEASURED)):
        assert verdicts_of(updates(tmp_path, good, times | {"timestep_exact": exact}))[2] == verdict
    assert f"from random starts, in {UNMEASURED}" in update_report.claims_table(updates(tmp_path, good, times)).data


def test_the_gallery_of_updates_is_that_of_the_table(tmp_path: Path) -> None:
    found = updates(tmp_path, {"cell": "a", "attack": "unknown_noise", "ssim": 0.9, "id_chance": 0.125})
    assert "among 8 private images" in update_report.table(found).data
