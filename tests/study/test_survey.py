"""The survey: grids that say what they are, transcripts like those of training, attacks where they belong."""

import base64
import re
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import pandas as pd
import pytest
from world import tiny
from world.project import World

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.labels import percent
from splitlab.core.tables import read_table
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.report import survey_report
from splitlab.report.figures import survey_figures
from splitlab.report.page import Material, load_material
from splitlab.split.attacks import ATTACKS, FAMILIES, attack_label
from splitlab.split.config import AttackSpec, Defences, TrainConfig
from splitlab.split.train import record, train
from splitlab.split.wire import read_truth
from splitlab.study.survey import UTILITY_COLUMNS, SurveyConfig, record_survey, utility
from splitlab.study.survey_attack import attack_survey, catalogue
from splitlab.study.update_grid import UpdateConfig
from splitlab.study.update_survey import attack_updates, record_updates

SETTINGS = {"none": Defences(), "noise": Defences(feature_noise=0.3)}


def config(**changes: object) -> SurveyConfig:
    few = {"messages": 3, "batch_size": 3, "steps": 2, "epochs": 2, "epoch_samples": 6, "settings": SETTINGS}
    few |= {"published_key": 0}
    return SurveyConfig(**(few | {"default": {"tiny": ("noise",)}, "datasets": ("tiny",)} | changes))


def test_the_default_grid_is_listed_and_the_full_one_is_everything():
    assert config().cells == [("tiny", "noise")]
    assert config(grid="full").cells == [("tiny", "none"), ("tiny", "noise")]
    assert list(config(accumulate=("noise",)).transcripts()) == ["survey-tiny-noise", "epochs-tiny-noise"]


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


def test_stages_of_empty_grids_leave_the_folders_that_others_look_for(base: Base, private: ImageSet, tmp_path: Path):
    empty, load = config(default={}), lambda *_: private
    seen, hidden, out = tmp_path / "seen", tmp_path / "hidden", tmp_path / "out"
    record_survey(empty, base, load, seen=seen, hidden=hidden)
    attack_survey(empty, base, load, seen=seen, out=out, cache=tmp_path)
    record_updates(UpdateConfig(), base, load, out=tmp_path / "updates")
    attack_updates(UpdateConfig(), base, load, recorded=tmp_path / "updates", out=tmp_path / "inversions")
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_dir()}
    assert made >= {
        "seen",
        "hidden",
        "out",
        "inversions",
        *(f"updates/{name}" for name in ("sent", "granted", "truth")),
    }


def test_attacks_apply_where_their_defence_is_on():
    specs = AttackSpec("closed_form"), AttackSpec("unmixing", when="key_mixing"), AttackSpec("jigsaw", when="matched")
    chosen = config(attacks=specs, epoch_attacks=(AttackSpec("accumulation"),))
    mixing = Defences(key_mixing=3)
    assert [spec.attack for spec in catalogue(chosen, "survey", mixing)] == ["closed_form", "unmixing"]
    assert [spec.attack for spec in catalogue(chosen, "epochs", mixing)] == ["accumulation"]
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

    monkeypatch.setattr("splitlab.study.survey.train", refuse)
    pd.testing.assert_frame_equal(utility(config(), base, load, cache=tmp_path), first)
    with pytest.raises(AssertionError, match="trained again"):
        utility(config(steps=3), base, load, cache=tmp_path)


def test_the_survey_is_judged_and_its_pictures_drawn(world: World):
    judged = read_table(world.root / "metrics" / "split_verdicts.csv")
    assert judged["setting"].tolist() == ["none", "mixing", "matched"]  # as in the table of costs
    assert judged["control_iou"].tolist() == [0.5] * 3
    for name in ("frontier-tiny", "matrix-tiny", "grid-survey-tiny-mixing", "leakage-epochs-tiny-none"):
        assert (world.folders["figures"] / f"{name}.png").stat().st_size > 5000
    assert survey_figures.draw_frontier(judged.assign(control_iou=float("nan"))).axes


def test_an_attack_that_cannot_run_without_a_fact_says_so_in_the_ablations(world: World):
    table = read_table(world.root / "metrics" / "ablations.csv")
    refused = table[table["denied"] == "noise smashed"]
    assert len(refused) == 3
    assert refused["breaks"].all()
    assert refused["note"].str.contains("carries no noise").all()


@pytest.fixture(scope="module")
def material(world: World) -> Material:
    return load_material(**world.folders)


def cells(html: str) -> list[list[str]]:
    """Return the words in every cell of every row of the tables in `html`, headings left out."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in rows]
    return [[re.sub(r"<[^>]*>", " ", cell).strip() for cell in row] for row in found if row]


def test_the_verdict_table_says_what_the_verdicts_do(material: Material):
    rows = cells(survey_report.verdict_table(material).data)
    assert len(rows) == len(material.verdicts) == 3
    for row, (_, verdict) in zip(rows, material.verdicts.iterrows(), strict=True):
        assert row[0].startswith(f"{verdict['setting']} ")
        assert str(verdict["reason"]) in unescape(row[0])
        said = ["not measured" if pd.isna(v) else "yes" if v in (True, "True") else "no"
                for v in (verdict["stops_paper_attacks"], verdict["stops_adaptive"])]  # fmt: skip
        assert row[1:3] == said
        assert row[3] == attack_label(str(verdict["strongest_attack"]))
        assert row[6] == percent(verdict["id_worst"])
        assert row[-1] == "0.50"
    turned = material.verdicts.assign(stops_paper_attacks="True", stops_adaptive="False")
    assert {tuple(row[1:3]) for row in cells(survey_report.verdict_table(replace(material, verdicts=turned)).data)} == {
        ("yes", "no")
    }


def test_the_pictures_of_the_survey_are_shown(material: Material):
    html = survey_report.frontier(material).data
    for kind in ("frontier", "matrix"):
        picture = base64.b64encode((material.figures / f"{kind}-tiny.png").read_bytes()).decode()
        assert picture in html


def test_every_family_of_attacks_is_told_with_its_numbers_or_said_not_to_be_run(material: Material):
    html = survey_report.families(material).data
    parts = dict(zip(re.findall(r"<h3>(.*?)</h3>", html), re.split(r"<h3>.*?</h3>", html)[1:], strict=True))
    assert list(parts) == [escape(family.title) for family in FAMILIES]
    every = pd.concat([material.evidence.attacks, material.surveyed])
    shown = 0
    for family in FAMILIES:
        names = [name for name, record in ATTACKS.items() if record.family == family]
        own, rows = parts[escape(family.title)], every[every["attack"].isin(names)]
        assert ("Not run: see params/split.yaml." in own) == rows.empty
        assert len(cells(own)) == len(rows.groupby(["run", "attack", "denied"], dropna=False))
        shown += len(cells(own))
    assert shown > 5


def test_the_ablation_table_says_what_cannot_run(material: Material):
    rows = cells(survey_report.ablation_table(material).data)
    assert len(rows) == len(material.ablations) == 6
    refused = material.ablations["note"].notna().tolist()
    assert ["it cannot run" in row[-1] for row in rows] == refused
    assert 0 < sum(refused) < len(refused)


def test_prompts_are_told_where_an_attack_read_them(material: Material):
    assert cells(survey_report.prompts_table(material).data) == []
    every = material.surveyed
    read = every[every["attack"].eq("closed_form") & every["denied"].isna()].assign(prompt_exact=0.25)
    rows = cells(survey_report.prompts_table(replace(material, surveyed=read)).data)
    assert len(rows) == read["run"].nunique() > 1
    assert {row[-1] for row in rows} == {percent(0.25)}


def test_the_conclusion_counts_what_the_verdicts_say(material: Material):
    chosen = material.verdicts.assign(stops_paper_attacks="True", stops_adaptive=["True", "False", None])
    chosen = chosen.assign(id_worst=[0.0, 1.0, 0.0], id_top1=0.0, id_chance=0.01)
    said = survey_report.conclusion(replace(material, verdicts=chosen)).data
    assert said == (
        "- **tiny:** 3 of 3 settings stop the paper's attackers (none, mixing, matched); 2 keep the image from the "
        "strongest attacker that knows the defence (none, matched); 1 keep image and hint (none); not measured: "
        "matched."
    )
    empty = replace(material, verdicts=material.verdicts.iloc[:0])
    assert "No survey" in survey_report.conclusion(empty).data


def test_every_setting_parses_as_a_run_of_its_own():
    values = {"settings": {"a": {"half": True}}, "default": {"shapes": ["a"]}, "attacks": [{"attack": "mean_public"}]}
    parsed = parse(SurveyConfig, values, where="survey")
    assert isinstance(parsed.transcripts()["survey-shapes-a"].config, TrainConfig)
    with pytest.raises(InputError, match=r"survey.settings.a: unknown key hlaf"):
        parse(SurveyConfig, {"settings": {"a": {"hlaf": True}}}, where="survey")
