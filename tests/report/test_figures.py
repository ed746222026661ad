"""The figures: drawn twice they are equal byte for byte, carry no date, and say what is missing."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from world.project import World

from splitlab.core.errors import InputError
from splitlab.report.figures import run_figures as figures
from splitlab.report.figures import style as canvas
from splitlab.split.artefacts import Recorded
from splitlab.split.attacks import attack_label
from splitlab.split.config import Adversary
from splitlab.study.config import EvaluateConfig


@pytest.fixture(scope="module")
def drawn(world: World) -> list[Path]:
    return sorted(world.folders["figures"].glob("*.png"))


def test_every_figure_is_drawn(drawn: list[Path]) -> None:
    surveyed = ["survey-tiny-none", "survey-tiny-mixing", "survey-tiny-matched", "epochs-tiny-none"]
    per_run = {f"{kind}-{run}.png" for kind in ("grid", "leakage") for run in ("split", "s1", *surveyed)}
    per_dataset = {f"{kind}-tiny.png" for kind in ("loss", "control", "samples", "frontier", "matrix")}
    assert {path.name for path in drawn} == per_run | per_dataset | {"bytes.png", "overview.png", "tradeoff.png"}
    for path in drawn:
        assert min(Image.open(path).size) > 150


def test_drawn_again_in_another_style_the_bytes_are_equal(world: World, drawn: list[Path]) -> None:
    with plt.style.context("dark_background"), plt.rc_context({"figure.dpi": 40, "savefig.bbox": "tight"}):
        again = world.draw(world.root / "twice")
    for first, second in zip(drawn, sorted(again), strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_no_software_and_no_date_in_the_files(drawn: list[Path]) -> None:
    for path in drawn:
        assert not {"Software", "Date", "Creation Time"} & set(Image.open(path).info), path.name


def test_samples_are_picked_by_bucket_in_order_of_timestep(world: World) -> None:
    recorded = Recorded.of_run("split", world.root / "runs", world.root)
    picked = figures.pick(recorded, EvaluateConfig(buckets=(0, 500, 1000)))
    assert (picked.timesteps.diff() >= 0).all()
    assert {bool(t >= 500) for t in picked.timesteps.tolist()} == {False, True}
    assert len(picked.indices) == len(picked.positions) <= 10


def test_attacks_are_ordered_by_measured_strength() -> None:
    table = pd.DataFrame({"attack": ["strong", "weak", "strong", "weak"], "psnr_db": [30.0, 9.0, 20.0, 11.0]})
    assert figures.by_strength(table) == [Adversary("weak"), Adversary("strong")]


def test_attacks_have_words_and_what_they_were_denied() -> None:
    assert attack_label("closed_form") == "closed form"
    denied = Adversary("inverse_network", ("noise", "defences"))
    assert attack_label(denied) == "inverse network without noise label, defences"
    assert attack_label("live: new_idea") == "live: new idea"


def test_show_images_draws_one_row_per_entry() -> None:
    figure = canvas.show_images({"a": torch.zeros(3, 3, 8, 8), "b": torch.ones(2, 3, 8, 8)})
    assert sum(bool(axis.images) for axis in figure.axes) == 5
    plt.close(figure)


def test_missing_and_empty_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.csv: missing; run `dvc repro` first"):
        figures.read_table(tmp_path / "training.csv")
    (tmp_path / "training.csv").write_text("run,dataset\n")
    with pytest.raises(InputError, match="no rows"):
        figures.read_table(tmp_path / "training.csv")


def test_the_word_none_is_no_missing_value(tmp_path: Path) -> None:
    (tmp_path / "training.csv").write_text("run,defences,steps\na,none,3\nb,,\n")
    table = figures.read_table(tmp_path / "training.csv")
    assert table["defences"][0] == "none"
    assert table["defences"].isna()[1]
    assert table["steps"].isna()[1]
