"""The long table: every number of a wide one is in it, to the last digit, and it gives the wide one back."""

from pathlib import Path

import pandas as pd
import pytest

from splitlab.core.errors import InputError
from splitlab.core.tables import read_table, read_timed
from splitlab.split.config import Adversary
from splitlab.study.results import (
    VIEWS,
    Results,
    by_adversary,
    join_results,
    long_table,
    read_results,
    settings_table,
    write_dp,
    write_part,
)


def split_rows() -> list[dict]:
    setting = {
        "setting": "a run",
        "name": "a run",
        "kind": "trained",
        "dataset": "tiny",
        "defences": "none",
        "half": True,
        "steps": 4,
    }
    bucket = {"t_low": 0, "t_high": 500, "n": 6, "seeds": 2, "psnr_db": 1 / 3, "n_evals": 1, "cpu_s": 0.25}
    attack = setting | bucket | {"attack": "closed_form"}
    return [
        setting | {"eval_loss": 0.1},
        attack | {"denied": (), "used": ("timesteps", "noise")},
        attack | {"denied": ("noise", "defences"), "used": (), "psnr_db": None, "hint_psnr_db": 12.3456},
        attack | {"denied": (), "used": ("timesteps", "noise"), "t_low": 500, "t_high": 1000, "psnr_db": 1e-17},
    ]


def update_rows() -> list[dict]:
    cell = {"setting": "cell", "name": "cell", "kind": "update", "dataset": "tiny", "model": "pixel", "batch": 1}
    update = cell | {"defence": "none", "attack": "dlg", "granted": ("noise",), "n": 2, "seeds": 1}
    return [update | {"ssim": 0.5}, update | {"granted": (), "note": "it needs the noise"}]


def private_row(trainable: str, seed: int, **measured: object) -> dict:
    row = {"dataset": "tiny", "trainable": trainable, "epsilon": 1.0, "steps": 3, "seed": seed, "features": "latents"}
    return row | {"n": 8, "n_test": 4, "n_samples": 5, "conditioning": "class"} | measured


def results_of(system: str, rows: list[dict]) -> Results:
    table = pd.DataFrame(rows)
    return Results(long_table(system, table), settings_table(system, table))


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    write_part(results_of("split", split_rows()), tmp_path, "split")
    write_part(results_of("federated", update_rows()), tmp_path, "federated")
    tuned = [private_row("lora", seed, downstream_acc=seed / 3, step_s=1.5) for seed in (0, 1)]
    write_dp([pd.DataFrame([*tuned, private_row("public base", 0, steps=None, frechet=2.0)])], tmp_path)
    join_results(tmp_path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["training", "split_attacks", "gradient_attacks", "dp"])
def test_the_long_table_gives_every_wide_one_back(metrics: Path, name: str):
    found = read_results(metrics / "results.csv", metrics / "settings.csv").view(name)
    assert list(found) == list(VIEWS[name].columns)
    pd.testing.assert_frame_equal(
        found, read_timed(metrics / f"{name}.csv")[list(found)], check_dtype=False, rtol=0, atol=0
    )


def test_numbers_lists_and_reasons_come_through_whole(metrics: Path):
    attacks = read_table(metrics / "split_attacks.csv")
    lines = by_adversary(attacks)
    assert list(lines) == [Adversary("closed_form"), Adversary("closed_form", ("noise", "defences"))]
    assert lines[Adversary("closed_form")]["psnr_db"].tolist() == [1 / 3, 1e-17]
    assert lines[Adversary("closed_form", ("noise", "defences"))]["psnr_db"].isna().all()
    updates = read_table(metrics / "gradient_attacks.csv")
    assert updates["granted"].fillna("").tolist() == ["noise", ""]
    assert updates["refused"].fillna("").tolist() == ["", "it needs the noise"]


def test_seconds_stay_out_of_what_repeats(metrics: Path):
    table = read_table(metrics / "results.csv")
    assert not {"cpu_s", "step_s"} & set(table["metric"])
    assert {"cpu_s", "step_s"} == set(read_table(metrics / "timings" / "results.csv")["metric"])


def test_facts_are_columns_of_the_settings_and_two_meanings_of_one_id_are_refused(metrics: Path):
    settings = read_table(metrics / "settings.csv").set_index("setting")
    assert settings["kind"].tolist() == ["trained", "update", "fine-tuning", "contrast"]
    assert settings["half"]["a run"] in (True, "True")
    rows = [row | {"half": index == 0} for index, row in enumerate(split_rows()[:2])]
    with pytest.raises(InputError, match="two different settings are both called a run"):
        settings_table("split", pd.DataFrame(rows))
