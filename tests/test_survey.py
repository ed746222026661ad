"""The survey: grids that say what they are, transcripts like those of training, attacks where they belong."""

from dataclasses import replace
from pathlib import Path

import fabricated
import pandas as pd
import pytest
import tiny

from splitlab import survey_figures, survey_report
from splitlab.artefacts import read_table
from splitlab.base import Base
from splitlab.config import AttackSpec, Defences, TrainConfig, parse
from splitlab.data import ImageSet
from splitlab.errors import InputError
from splitlab.report import load_material
from splitlab.survey import UTILITY_COLUMNS, SurveyConfig, record_survey, utility
from splitlab.survey_attack import catalogue
from splitlab.train import record, train
from splitlab.wire import read_truth

SETTINGS = {"none": Defences(), "noise": Defences(feature_noise=0.3)}


def config(**changes: object) -> SurveyConfig:
    few = {"messages": 3, "batch_size": 3, "steps": 2, "epochs": 2, "epoch_samples": 6, "settings": SETTINGS}
    return SurveyConfig(**(few | {"default": {"tiny": ("noise",)}, "datasets": ("tiny",)} | changes))


@pytest.fixture(scope="module")
def world(base_path: Path) -> fabricated.World:
    return fabricated.world(base_path)


def test_the_default_grid_is_listed_and_the_full_one_is_everything():
    assert config().cells == [("tiny", "noise")]
    assert config(grid="full").cells == [("tiny", "none"), ("tiny", "noise")]
    assert list(config(accumulate=("noise",)).runs()) == ["survey-tiny-noise", "epochs-tiny-noise"]


def test_a_transcript_for_accumulation_shows_each_image_once_per_epoch(base: Base, private: ImageSet, tmp_path: Path):
    chosen = config(accumulate=("noise",))
    names = record_survey(chosen, base, tiny.splits(private), seen=tmp_path / "seen", hidden=tmp_path / "hidden")
    truth = read_truth(tmp_path / "hidden" / names[1] / "truth.safetensors")
    assert truth.indices.bincount().tolist() == [2] * 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"grid": "half"}, "choose one of default, full"),
     ({"default": {"tiny": ("noies",)}}, "no setting is called noies"),
     ({"accumulate": ("x",)}, "no setting is called x")],
)  # fmt: skip
def test_grids_and_settings_that_do_not_exist_are_refused(changes: dict, reason: str):
    with pytest.raises(InputError, match=reason):
        config(**changes)


def test_recording_without_training_gives_the_very_bytes_of_training(
    base: Base, private: ImageSet, heldout: ImageSet, tmp_path: Path
):
    run = tiny.config(defences=Defences(feature_noise=0.3, symsigmoid=True), n_clients=2)
    train("x", run, base, private, heldout, out=tmp_path / "run", cache=tmp_path / "cache")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("transcript", "truth")}
    record("x", run, base, private, **files)
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "run" / f"{name}.safetensors").read_bytes()


def test_only_s1s_split_can_be_recorded_without_training(base: Base, private: ImageSet, tmp_path: Path):
    with pytest.raises(InputError, match="depend on the training"):
        record("x", tiny.config(scheme="u_shaped"), base, private, transcript=tmp_path / "a", truth=tmp_path / "b")


def test_attacks_apply_where_their_defence_is_on():
    specs = AttackSpec("closed_form"), AttackSpec("unmixing", when="key_mixing"), AttackSpec("jigsaw", when="matched")
    chosen = config(attacks=specs, epoch_attacks=(AttackSpec("accumulation"),))
    mixing = Defences(key_mixing=3)
    assert [spec.attack for spec in catalogue(chosen, "survey-x", mixing)] == ["closed_form", "unmixing"]
    assert [spec.attack for spec in catalogue(chosen, "epochs-x", mixing)] == ["accumulation"]
    with pytest.raises(InputError, match="when='noise' is no defence"):
        AttackSpec("closed_form", when="noise")


def test_what_was_trained_is_not_trained_again(
    base: Base, private: ImageSet, heldout: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(dataset: str, split: str) -> ImageSet:
        return {"private": private, "heldout": heldout}[split]

    first = utility(config(), base, load, cache=tmp_path)
    assert list(first.columns) == list(UTILITY_COLUMNS)
    assert first["setting"].tolist() == ["none", "noise"]
    assert first["eval_loss"].nunique() == 2

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("splitlab.survey.train", refuse)
    pd.testing.assert_frame_equal(utility(config(), base, load, cache=tmp_path), first)
    with pytest.raises(AssertionError, match="trained again"):
        utility(config(steps=3), base, load, cache=tmp_path)


def test_the_survey_is_judged_and_its_pictures_drawn(world: fabricated.World):
    judged = read_table(world.root / "metrics" / "split_verdicts.csv")
    assert judged["setting"].tolist() == ["none", "mixing", "matched"]  # as in the table of costs
    assert judged["control_iou"].tolist() == [0.5] * 3
    for name in ("frontier-tiny", "matrix-tiny", "grid-survey-tiny-mixing", "leakage-epochs-tiny-none"):
        assert (world.folders["figures"] / f"{name}.png").stat().st_size > 5000
    assert survey_figures.draw_frontier(judged.assign(control_iou=float("nan"))).axes


def test_an_attack_that_cannot_run_without_a_fact_says_so_in_the_ablations(world: fabricated.World):
    table = read_table(world.root / "metrics" / "ablations.csv")
    refused = table[table["denied"] == "noise-smashed"]
    assert len(refused) == 3
    assert refused["breaks"].all()
    assert refused["note"].str.contains("carries no noise").all()


def test_the_reports_part_on_the_survey_renders(world: fabricated.World):
    material = load_material(**world.folders)
    assert set(material.surveyed["run"]) >= {"survey-tiny-none", "epochs-tiny-none"}
    for part in (survey_report.verdict_table, survey_report.frontier, survey_report.families,
                 survey_report.prompts_table, survey_report.ablation_table):  # fmt: skip
        assert "<" in part(material).data
    assert "no" in survey_report.verdict_table(material).data
    assert "**tiny:**" in survey_report.conclusion(material).data
    empty = replace(material, verdicts=material.verdicts.iloc[:0])
    assert "No survey" in survey_report.conclusion(empty).data


def test_every_setting_parses_as_a_run_of_its_own():
    values = {"settings": {"a": {"half": True}}, "default": {"shapes": ["a"]}, "attacks": [{"attack": "mean_public"}]}
    parsed = parse(SurveyConfig, values, where="survey")
    assert isinstance(parsed.runs()["survey-shapes-a"], TrainConfig)
    with pytest.raises(InputError, match=r"survey.settings.a: unknown key hlaf"):
        parse(SurveyConfig, {"settings": {"a": {"hlaf": True}}}, where="survey")
