"""What a run with a published key may not say: an ε without the word that it is a simulation's."""

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from world import tiny

from splitlab.core.paths import ROOT
from splitlab.core.tables import read_table
from splitlab.params import load_params
from splitlab.privacy.accounting import SIMULATED_NOTE, epsilon_words, randomness_of
from splitlab.report import dp_report as dp_report
from splitlab.report import page as report
from splitlab.report import survey_report, tradeoff_report
from splitlab.report.figures.dp_figures import draw_curve
from splitlab.report.figures.tradeoff_figures import draw_tradeoff
from splitlab.split.defences import Defences
from splitlab.split.privacy import message_guarantee
from splitlab.study.tradeoff import tradeoff
from splitlab.study.verdicts import verdicts

METRICS = ROOT / "reports/metrics"

OTHERS = ("ε = 1, 5, 10)", "ε = 1 and 10")
"""What papers say of their own ε, in the report's claims."""


def plainly(text: str) -> list[str]:
    """Every ε of a text that is a number, above 0, and not said to be simulated."""
    for words in OTHERS:
        text = text.replace(words, "")
    return re.findall(r"(?<!simulated )ε (?:=|of one message:) ?[0-9.]*[1-9][0-9.]*", text)


def secretly(table: pd.DataFrame) -> pd.DataFrame:
    """The same measurements, had their draws been secret."""
    return table.assign(randomness=table["randomness"].where(table["randomness"].isna(), "secret"))


def part_of_the_report(**known) -> report.Material:
    """What some part of the report is made of, and nothing else."""
    material = object.__new__(report.Material)
    for name, value in known.items():
        object.__setattr__(material, name, value)
    return material


def test_the_search_finds_what_it_looks_for():
    assert plainly("ε = 10; simulated ε = 5; ε = 0; ε = ∞; ε = 0.5") == ["ε = 10", "ε = 0.5"]


@pytest.mark.parametrize("name", ["dp", "dp_shares", "split_attacks", "split_verdicts"])
def test_shipped_tables_say_that_their_keys_are_published(name: str):
    table = read_table(METRICS / f"{name}.csv")
    rests = table["noise_multiplier"].notna() if name == "dp" else table.index >= 0
    assert set(table[rests]["randomness"]) == {"published"}
    assert table[~rests]["randomness"].isna().all()


def test_shipped_runs_publish_their_keys():
    params = load_params(ROOT / "params.yaml")
    sections = [*params["runs"].values(), params["survey"], params["updates"]]
    sections += [grid["common"] for grid in params["dp"].values()]
    assert all(isinstance(section["published_key"], int) for section in sections)


def test_a_column_that_is_missing_or_mixed_counts_as_published():
    rows = pd.DataFrame({"randomness": ["secret", "secret", "published"]})
    assert randomness_of(rows[:2]) == "secret"
    for doubtful in (rows, rows[:0], rows.drop(columns="randomness"), pd.DataFrame({"randomness": ["secret", None]})):
        assert randomness_of(doubtful) == "published"
    assert epsilon_words(10.0, "nan") == "simulated ε = 10"


def test_the_reports_part_on_private_fine_tuning(tmp_path: Path):
    for name in ("curve.png", "samples-digits.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    table = read_table(METRICS / "dp.csv")
    material = dp_report.DPMaterial(table.reindex(columns=[*table.columns, "step_s"]), tmp_path)
    for known in (True, False):
        shown = material if known else replace(material, table=secretly(material.table))
        texts = [dp_report.conclusion(shown).data, dp_report.claims_table(shown).data, dp_report.table(shown).data]
        words = [epsilon_words(10.0, "published" if known else "secret", digits="g") in text for text in texts[:2]]
        assert all(words)
        assert bool(plainly("".join(texts))) is not known
        assert SIMULATED_NOTE in texts[2]
        assert (SIMULATED_NOTE in dp_report.pictures(shown).data) is known
    labels = {axis.get_xlabel() for axis in draw_curve(table).axes if axis.get_xlabel()}
    assert labels == {"simulated ε"}
    assert {axis.get_xlabel() for axis in draw_curve(secretly(table)).axes if axis.get_xlabel()} == {"ε"}


def test_the_picture_and_table_of_all_schemes(tmp_path: Path):
    points = tradeoff(METRICS, alphas_cumprod=tiny.ALPHAS)
    assert set(points["randomness"]) == {"published"}
    assert points["epsilon"].gt(0).any()
    points.to_csv(tmp_path / "tradeoff.csv", index=False)
    material = part_of_the_report(figures=tmp_path)
    shown = tradeoff_report.points(material)
    texts = [text.get_text() for axis in draw_tradeoff(points).axes for text in axis.texts]
    texts += [tradeoff_report.conclusion(shown).data, tradeoff_report.table(shown).data]
    assert not plainly("\n".join(texts))
    assert sum("simulated ε = " in text for text in texts) > 3
    secret = shown.assign(randomness="secret")
    assert plainly(tradeoff_report.table(secret).data)
    assert "simulated ε =" not in tradeoff_report.table(secret).data


def test_the_table_of_verdicts():
    attacks = read_table(METRICS / "split_attacks.csv")
    bounded = Defences(feature_noise=3.0, hint_noise=3.0, latent_norm=2.0, hide_prompts=True)
    claim = message_guarantee(bounded, tiny.ALPHAS)
    facts = {"epsilon_message": claim.epsilon, "why_no_epsilon": claim.why}
    settings = pd.DataFrame(facts, index=attacks["run"].unique())
    claimed = verdicts(attacks.assign(defences=str(bounded)), None, settings)
    assert claimed["epsilon_message"].gt(0).all()
    assert set(claimed["randomness"]) == {"published"}
    for table, known in ((claimed, True), (claimed.assign(randomness="secret"), False)):
        html = survey_report.verdict_table(part_of_the_report(verdicts=table)).data
        assert bool(plainly(html)) is not known
        assert SIMULATED_NOTE in html


def test_the_table_of_runs():
    for stated, words in (
        ({"randomness": "secret", "epsilon": 1234.5}, "ε = 1,234.5 at δ = 1e-05"),
        ({"randomness": "published", "epsilon_simulated": 1234.5}, "simulated ε = 1,234.5 at δ = 1e-05"),
        ({"epsilon": 1234.5}, "simulated ε = 1,234.5 at δ = 1e-05"),  # of a record that does not say
        ({"randomness": "published", "epsilon": None, "why": "no <noise>"}, "none: no <noise>"),
    ):
        assert report._claimed({"delta": 1e-5, **stated}) == words
