"""Private fine-tuning by a grid: its judges, its table, its part of the report."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from world import project, tiny

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.report import dp_report as report
from splitlab.study.dp_evaluate import frechet_distance, train_classifier
from splitlab.study.dp_survey import COLUMNS, PUBLIC, REAL, DPCell, DPSurveyConfig


def test_frechet_distance_of_known_gaussians() -> None:
    draw = tiny.draw()
    first, second = torch.randn(40_000, 2, generator=draw), torch.randn(40_000, 2, generator=draw)
    stretched = second * torch.tensor([2.0, 1.0]) + torch.tensor([3.0, 0.0])
    # |mu|² + Σ (s1 - s2)² for diagonal covariances (Dowson & Landau 1982): 9 + 1
    assert frechet_distance(first, stretched) == pytest.approx(10.0, abs=0.2)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(InputError, match="give more samples"):
        frechet_distance(first[:2], second)


def test_a_classifier_learns_what_can_be_told_apart_and_nothing_else() -> None:
    draw = tiny.draw()
    labels = torch.arange(200) % 2
    images = 0.3 * torch.randn(200, 3, 16, 16, generator=draw) + (labels - 0.5)[:, None, None, None]
    told = train_classifier(images[:100], labels[:100], n_classes=2, seed=0, steps=60, batch=32)
    assert told.accuracy(images[100:], labels[100:]) > 0.95
    shuffled = labels[torch.randperm(200, generator=draw)]
    guessing = train_classifier(images[:100], shuffled[:100], n_classes=2, seed=0, steps=60, batch=32)
    assert guessing.accuracy(images[100:], shuffled[100:]) < 0.75
    with pytest.raises(InputError, match="outside 0 to 1"):
        train_classifier(images, labels + 1, n_classes=2, seed=0)


@pytest.fixture(scope="module")
def made(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    folder = tmp_path_factory.mktemp("dp")
    return project.make_private(base, folder), folder


def test_what_was_done_is_not_done_again(made: tuple[pd.DataFrame, Path], base: Base) -> None:
    table, folder = made
    pd.testing.assert_frame_equal(project.make_private(base, folder), table)  # seconds per step included


def test_pictures_of_runs_with_a_published_key_are_called_simulated(
    made: tuple[pd.DataFrame, Path], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(project, "draw_dp_samples", lambda pictures, out: drawn.extend(pictures))
    project.make_private(base, made[1])
    assert drawn[-3:] == ["attention, ε = ∞", "attention, simulated ε = 1", "unet, simulated ε = 1"]


def test_the_table_has_every_run_and_both_contrasts(made: tuple[pd.DataFrame, Path]) -> None:
    (table, _), config = made, project.private_survey()
    assert tuple(table.columns) == COLUMNS
    assert list(config.runs) == [
        f"{cell}-{seed}" for cell in ("attention-inf", "attention-1", "unet-1") for seed in (0, 1)
    ]
    assert table.groupby("trainable")["seed"].nunique().to_dict() == {PUBLIC: 2, REAL: 2, "attention": 2, "unet": 2}
    private = table[table["noise_multiplier"] > 0]
    assert len(private) == 4
    assert (private["epsilon"] <= 1.0).all()
    assert private["downstream_acc"].between(0, 1).all()
    assert private["mia_auc"].between(0, 1).all()
    assert table["frechet"].notna().all()
    assert (
        table[table["trainable"] == "unet"]["n_trainable"].min()
        > table[table["trainable"] == "attention"]["n_trainable"].max()
    )


def test_the_reports_part_says_what_the_table_says(made: tuple[pd.DataFrame, Path]) -> None:
    _, folder = made
    material = report.load_dp(folder / "metrics", folder / "figures-dp")
    assert material.targets == [1.0, math.inf]
    text = report.conclusion(material).data
    assert "ε = ∞" in text
    assert "public base" in text
    claims = report.claims_table(material).data
    assert claims.count('class="verdict') == 6
    assert "full U-Net" in report.table(material).data
    assert report.pictures(material).data.count("<img") == 2
    with pytest.raises(InputError, match="run `dvc repro` first"):
        report.load_dp(folder / "metrics", folder / "nowhere")


def test_a_grid_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"dp\.digits: grid 'huge' is unknown; choose one of default, full"):
        parse(DPSurveyConfig, {"grid": "huge"}, where="dp.digits")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lrr": 1}, "dp, options of attention: unknown key lrr"),
        ({"lr": "fast"}, r"dp, options of attention\.lr: expected float, got 'fast'"),
        ({"steps": 0}, "dp, options of attention: steps must be 1 or more"),
    ],
)
def test_options_of_a_cell_are_checked_like_any_setting(options: dict, says: str) -> None:
    assert (
        DPSurveyConfig(cells=(DPCell(options={"lr": "1e-4", "steps": 1e1}),), seeds=1).runs["attention-inf-0"].lr
        == 1e-4
    )
    with pytest.raises(InputError, match=says):
        assert DPSurveyConfig(cells=(DPCell(options=options),)).runs
