"""The commands say what the functions behind them say; bad input is one line, an interruption loses nothing."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from world import tiny

from splitlab import attack_gradient, cli, doctor, load_base
from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.federated import external
from splitlab.federated.client import pixel_unet, share
from splitlab.federated.update import write_update
from splitlab.report import page
from splitlab.study import planner


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_help_is_there_at_once() -> None:
    """CPU seconds, median of five; what costs seconds to import is not imported."""
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(
            [sys.executable, "-m", "splitlab.cli", "--help"], capture_output=True, text=True, cwd=ROOT
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert all(name in shown.stdout for name in ("doctor", "plan", "attack-update", "report", "explore"))
    assert median(taken) <= 0.5
    code = "import sys, splitlab.cli; print({'torch', 'pandas', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"


def test_the_doctor_names_what_is_missing_and_what_mends_it(tmp_path: Path, base_path: Path) -> None:
    params = tmp_path / "params.yaml"
    sections = "pretrain: {}\nruns: {}\nattacks: {}\nsurvey: {}\nupdates: {}\ndp: {}\nevaluate: {}\n"
    params.write_text(f"base: {{source: {base_path}}}\ndatasets: {{}}\n{sections}")
    healthy = call("doctor", "--params", params)
    assert healthy.exit_code == 0, healthy.output
    assert "base model" in healthy.output
    assert "MISSING" not in healthy.output
    places = f"private: {tmp_path}/none, public: {tmp_path}/no, heldout: {tmp_path}/neither"
    params.write_text(f"base: {{source: {tmp_path}/nowhere}}\ndatasets: {{mine: {{{places}}}}}\n{sections}")
    ill = call("doctor", "--params", params, "--json")
    assert ill.exit_code == 1
    checks = {check["what"]: check for check in json.loads(ill.stdout)}
    assert not checks["base model"]["works"]
    assert "make data" in checks["base model"]["mend"]
    assert f"{tmp_path}/none" in checks["data set mine"]["detail"]
    assert "mend datasets.mine" in checks["data set mine"]["mend"]
    assert [check["what"] for check in json.loads(ill.stdout)] == [one.what for one in doctor.diagnose(params)]
    params.write_text("base: [")
    assert "not valid YAML" in call("doctor", "--params", params).output


def test_the_doctor_reads_shipped_splits_and_fetches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    digits = "{private: data/private/digits.zip, public: data/public/digits.zip, heldout: data/heldout/digits.zip}"
    sections = "pretrain: {}\nruns: {}\nattacks: {}\nsurvey: {}\nupdates: {}\ndp: {}\nevaluate: {}\n"
    hub = "{source: 'hub:someone/pets', fractions: {private: 0.4, public: 0.4, heldout: 0.2}}"
    params.write_text(f"base: {{source: 'hub:some/model'}}\ndatasets: {{digits: {digits}, pets: {hub}}}\n{sections}")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("it asked the hub"))
    checks = {check.what: check for check in doctor.diagnose(params)}
    assert checks["base model"].detail == "hub:some/model: on the hub, fetched when first used"
    assert checks["data set digits"].detail == "private 1297, public 2000, heldout 256"
    assert checks["data set pets"].detail == "source on the hub, fetched when first used"


def test_the_plan_is_the_planners() -> None:
    arguments = ("plan", "--messages", 29, "--identification", 0.1, "--norm", 36)
    alphas = load_base("models/base").alphas_cumprod
    settings = planner.shipped("shapes", messages=29)
    found = planner.plan(settings, alphas, norm=36.0, delta=1e-5, messages=29, identification=0.1)
    assert call(*arguments).stdout.strip() == str(found)
    told = json.loads(call(*arguments, "--json").stdout)
    assert told["setting"]["identification"] == found.setting.identification
    assert told["epsilon_run"] == pytest.approx(found.epsilon_run)
    unmet = call("plan", "--identification", 0.0, "--norm", 36)
    assert unmet.exit_code == 2
    assert unmet.stderr.startswith("error: no setting measured meets identification <= 0")
    assert unmet.stderr.count("\n") == 1


def test_an_update_is_attacked_and_its_images_saved(tmp_path: Path) -> None:
    model = pixel_unet(8, seed=0, channels=(8, 16))
    model.save_pretrained(tmp_path / "unet")
    write_update(tmp_path / "update.safetensors", share(model, tiny.update_truth(n=1), alphas_cumprod=tiny.ALPHAS))
    asked = ("attack-update", tmp_path / "update.safetensors", "--model", tmp_path / "unet", "--out", tmp_path / "out")
    direct = attack_gradient(tmp_path / "update.safetensors", model=tmp_path / "unet", attack="timesteps")
    (facts,) = json.loads(call(*asked, "--attack", "timesteps", "--json").stdout)
    assert facts["timesteps"] == direct.timesteps.tolist()
    images = call(*asked, "--attack", "random_guess")
    assert images.exit_code == 2
    assert "attack 'random_guess' is unknown; choose one of" in images.stderr
    assert not (tmp_path / "out").exists()


def test_images_are_saved_whole_and_beside_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        images, warnings, timesteps = torch.zeros(2, 3, 4, 4), ("it is noisy", "it is small"), torch.tensor([7, 9])

    monkeypatch.setattr(external, "attack_gradient", lambda *_, **__: Result())
    asked = ("attack-update", "gradient.npz", "--model", "unet", "--out", tmp_path / "out")
    shown = call(*asked)
    assert shown.stdout.splitlines()[:3] == ["timesteps: [7, 9]", "warnings: it is noisy", "warnings: it is small"]
    with Image.open(tmp_path / "out" / "001.png") as picture:
        assert picture.size == (4, 4)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    again = call(*asked)
    assert again.exit_code == 2
    assert "mine.txt was added" in again.stderr
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    Result.images = torch.zeros(2, 4, 4, 4)
    assert "saved: nothing: 4 channels make no picture; --base decodes latents" in call(*asked).stdout


def test_missing_tables_end_the_report_with_one_line(tmp_path: Path) -> None:
    ended = call("report", "--metrics", tmp_path, "--out", tmp_path / "index.html")
    assert ended.exit_code == 2
    assert "training.csv: missing; run `dvc repro` first" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "index.html").exists()


def test_the_report_is_written_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict = {}
    monkeypatch.setattr(page, "write_report", lambda folders, **where: asked.update(where, **folders) or where["out"])
    shown = call("report", "--runs", tmp_path, "--out", tmp_path / "page.html")
    assert shown.stdout.strip() == str(tmp_path / "page.html")
    assert asked["runs"] == tmp_path
    assert asked["dp_figures"] == ROOT / "reports/figures-dp"


def test_the_explorer_opens_in_jupyterlab(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append((program, words)))
    assert call("explore").exit_code == 0
    ((program, words),) = started
    assert program == sys.executable
    assert words[1:3] == ["-m", "jupyterlab"]
    assert Path(words[-1]).exists()


@pytest.mark.parametrize(
    ("raised", "code", "says"), [(KeyboardInterrupt, 130, "stopped"), (InputError("a\nb"), 2, "error: a b")]
)
def test_what_goes_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch, raised: object, code: int, says: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised  # type: ignore[misc]

    monkeypatch.setattr(doctor, "diagnose", fail)
    ended = call("doctor")
    assert ended.exit_code == code
    assert ended.stderr.startswith(says)
    assert ended.stderr.count("\n") == 1
    assert "Traceback" not in ended.output


def test_own_data_are_not_sent_under_draws_that_anybody_can_repeat(tmp_path: Path) -> None:
    result = call("join", "shapes-s1", "--client", 0, "--data", tmp_path, "--broker", "127.0.0.1:1")
    assert result.exit_code == 2
    assert "draws follow from a published key" in result.stderr
    assert "name a run without published_key" in result.stderr
