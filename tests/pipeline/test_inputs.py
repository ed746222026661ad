"""The stage `inputs`: what notebooks say and data sets hold, by digest; DVC notices changes and copies nothing."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import inputs
from splitlab.core.config import parse
from splitlab.core.paths import ROOT
from splitlab.diffusion.pretrain import PretrainConfig
from splitlab.params import load_params
from splitlab.split.config import TrainConfig
from splitlab.study.dp_survey import DPSurveyConfig
from splitlab.study.survey import SurveyConfig
from splitlab.study.update_grid import UpdateConfig

Run = Callable[..., int]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two runs on data that lie outside it, and two notebooks."""
    root = tmp_path / "project"
    (root / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks/figures.ipynb", root / "notebooks/figures.ipynb")
    shutil.copy(ROOT / "notebooks/explore.ipynb", root / "notebooks/explore.ipynb")  # no stage
    (root / "dvc.yaml").write_text("stages: {figures: {cmd: papermill notebooks/figures.ipynb}}\n")
    for name in ("mine", "other"):
        for split in ("private", "public", "heldout"):
            folder = tmp_path / name / split
            folder.mkdir(parents=True)
            (folder / "metadata.csv").write_text(f"file_name\n{name}-{split}.png\n")
            (folder / f"{name}-{split}.png").write_bytes(name.encode() * 10)
    entry = {split: str(tmp_path / "mine" / split) for split in ("private", "public", "heldout")}
    params = {
        "base": {"source": "models/base"},
        "datasets": {"mine": entry},
        "pretrain": {"shares": {}},
        "runs": {"mine": {"dataset": "mine"}, "path": {"dataset": str(tmp_path / "other")}},
        "attacks": {"mine": []},
        "survey": {"datasets": []},
        "updates": {},
        "dp": {},
        "evaluate": {},
    }
    (root / "params.yaml").write_text(json.dumps(params))
    monkeypatch.setattr(inputs, "ROOT", root)
    return root


def written(project: Path) -> dict[str, str]:
    assert inputs.main() == 0
    folder = project / "inputs"
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.json"))}


def changed(project: Path, before: dict[str, str]) -> set[str]:
    after = written(project)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def set_params(project: Path, change: Callable[[dict[str, Any]], object]) -> None:
    params = json.loads((project / "params.yaml").read_text())
    change(params)
    (project / "params.yaml").write_text(json.dumps(params))


def test_what_is_right_is_not_touched_and_what_is_stale_goes(project: Path) -> None:
    before = written(project)
    assert [name for name in before if name.startswith("notebooks/")] == ["notebooks/figures.json"]
    times = {path: path.stat().st_mtime_ns for path in (project / "inputs").rglob("*.json")}
    assert changed(project, before) == set()
    assert {path: path.stat().st_mtime_ns for path in (project / "inputs").rglob("*.json")} == times
    set_params(project, lambda params: params["runs"].pop("path"))
    assert changed(project, before) == {"data/record-split.json", "data/evaluate-split.json", "data/figures.json"}


@pytest.mark.parametrize("content", ['{"image": "a.png"}', "[]", "{", '{"n": 1}'])
def test_files_of_others_stay_where_they_are(project: Path, content: str) -> None:
    written(project)
    mine = project / "inputs" / "prompt.json"
    mine.write_text(content)
    assert written(project)["prompt.json"] == content


def test_a_change_of_private_data_concerns_their_runs_alone_and_no_attack(project: Path, tmp_path: Path) -> None:
    before = written(project)
    (tmp_path / "mine/private/mine-private.png").write_bytes(b"other pixels of " * 2)
    assert changed(project, before) == {"data/record-split.json", "data/evaluate-split.json", "data/figures.json"}
    before = written(project)
    (tmp_path / "mine/public/more.png").write_bytes(b"more")
    assert changed(project, before) == {"data/record-split.json", "data/attack-split.json", "data/evaluate-split.json"}
    before = written(project)
    (tmp_path / "other/heldout/other-heldout.png").unlink()
    assert changed(project, before) == {"data/record-split.json", "data/evaluate-split.json"}


def test_a_file_that_is_replaced_by_one_of_equal_size_and_time_is_noticed(project: Path, tmp_path: Path) -> None:
    before = written(project)
    path = tmp_path / "mine/private/mine-private.png"
    (tmp_path / "new").write_bytes(path.read_bytes()[::-1])
    shutil.copystat(path, tmp_path / "new")
    (tmp_path / "new").rename(path)
    assert "data/record-split.json" in changed(project, before)


def test_links_are_followed_and_what_a_system_adds_does_not_count(project: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/more.png").write_bytes(b"1")
    (tmp_path / "mine/private/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/private/round").symlink_to(tmp_path / "mine/private")
    before = written(project)
    (tmp_path / "mine/private/.DS_Store").write_bytes(b"1")
    assert changed(project, before) == set()
    (tmp_path / "elsewhere/more.png").write_bytes(b"2")
    assert "data/record-split.json" in changed(project, before)


def test_options_of_an_entry_count_and_places_do_not(project: Path, tmp_path: Path) -> None:
    before = written(project)
    set_params(project, lambda params: params["datasets"]["mine"].update(size=16))
    assert "data/record-split.json" in changed(project, before)
    before = written(project)
    (tmp_path / "mine").rename(tmp_path / "moved")
    moved = {split: str(tmp_path / "moved" / split) for split in ("private", "public", "heldout")}
    set_params(project, lambda params: params["datasets"]["mine"].update(moved))
    assert changed(project, before) == set()


def test_a_split_of_a_source_counts_and_so_does_its_name(project: Path, tmp_path: Path) -> None:
    def part_of(name: str) -> Callable[[dict[str, Any]], object]:
        return lambda params: params["datasets"]["mine"].update(private=f"{tmp_path}/mine@{name}")

    set_params(project, part_of("train"))
    before = written(project)
    set_params(project, part_of("test"))
    assert "data/record-split.json" in changed(project, before)
    before = written(project)
    (tmp_path / "mine/private/mine-private.png").write_bytes(b"changed")
    assert "data/record-split.json" in changed(project, before)


def test_one_source_and_the_hub_have_digests_too(project: Path, tmp_path: Path) -> None:
    def one_source(params: dict[str, Any]) -> None:
        params["datasets"]["mine"] = {"source": str(tmp_path / "mine/private"), "fractions": {"private": 0.5}}
        params["runs"]["path"]["dataset"] = "hub:somebody/something"

    set_params(project, one_source)
    before = written(project)
    sources, splits = ("hub:somebody/something", "mine"), ("private", "public", "heldout")
    assert set(json.loads(before["data/record-split.json"])) == {f"{s}/{split}" for s in sources for split in splits}
    (tmp_path / "mine/private/mine-private.png").write_bytes(b"changed")
    assert {"data/record-split.json", "data/attack-split.json"} <= changed(project, before)


def test_no_path_and_no_content_gets_into_a_digest(project: Path, tmp_path: Path) -> None:
    for name, text in written(project).items():
        assert all(part not in text for part in (str(tmp_path / "mine"), "mine-private", ".png")), name
        values = [value for value in json.loads(text).values() if value != "models/base"]
        assert all(len(value) == 64 for value in values), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["datasets"]["mine"].update(private="/nowhere/mine"), "data set mine: private is /nowhere/mine"),
        (lambda p: p["runs"]["path"].update(dataset="faces"), "no data set 'faces'"),
    ],
)
def test_data_that_are_gone_are_one_error_and_delete_nothing(
    project: Path, change: Callable[[dict[str, Any]], object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(project)
    set_params(project, change)
    assert inputs.main() == 1
    told = capsys.readouterr().out
    assert says in told
    assert "nothing was deleted" in told
    assert told.count("\n") == 1
    folder = project / "inputs"
    assert {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.json")} == before


def test_data_that_git_would_take_up_are_warned_of(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = project / "my faces"
    shutil.copytree(tmp_path / "mine" / "private", inside)
    set_params(project, lambda params: params["datasets"]["mine"].update(private="my faces"))
    written(project)
    assert not capsys.readouterr().out  # there is no git
    subprocess.run(["git", "init", "-q", project], check=True)
    written(project)
    assert capsys.readouterr().out.startswith(f"warning: {inside.resolve()} is in the checkout, and `git add` would")
    (project / ".git/info/exclude").write_text("/my faces\n")
    written(project)
    assert not capsys.readouterr().out


def test_outputs_of_a_notebook_do_not_count_and_its_cells_do(project: Path) -> None:
    before, path = written(project), project / "notebooks/figures.ipynb"
    notebook = json.loads(path.read_text())
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        cell |= {"execution_count": number, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["seen"]}]}
        cell["metadata"]["execution"] = {"iopub.execute_input": "2024-01-01"}
    notebook["metadata"]["language_info"]["version"] = "3.12.1"
    path.write_text(json.dumps(notebook))
    assert changed(project, before) == set()
    notebook["cells"][-1]["source"] += ["\n1 + 1"]
    path.write_text(json.dumps(notebook))
    assert changed(project, before) == {"notebooks/figures.json"}


def test_an_own_base_model_is_a_digest_of_its_files(project: Path, tmp_path: Path) -> None:
    before = written(project)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"1")
    set_params(project, lambda params: params["base"].update(source=str(tmp_path / "model")))
    assert changed(project, before) == {"base.json"}
    before = written(project)
    (tmp_path / "model/weights").write_bytes(b"2")
    assert changed(project, before) == {"base.json"}


def test_what_a_defence_costs_depends_on_how_it_is_trained_not_on_attacks(project: Path) -> None:
    before = written(project)
    set_params(project, lambda params: params["survey"].update(attacks=[{"attack": "mean_public"}], messages=3))
    assert changed(project, before) == set()
    for key in ({"settings": {"none": {}}}, {"steps": 3}, {"published_key": 1}, {"batch_size": 8}):
        before = written(project)
        set_params(project, lambda params, key=key: params["survey"].update(key))
        assert changed(project, before) == {"data/cost.json"}, key


def test_an_own_model_that_federated_clients_train_counts(project: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    models = {"own": {"kind": "pixel", "source": str(tmp_path / "unet")}}
    models["run"] = {"kind": "controlnet", "source": "runs/mine/controlnet"}
    set_params(project, lambda params: params["updates"].update(models=models))
    before = written(project)
    (tmp_path / "unet/weights").write_bytes(b"1")
    (project / "runs/mine/controlnet").mkdir(parents=True)
    assert changed(project, before) == {"data/record-federated.json", "data/attack-federated.json"}


def test_stages_read_what_their_sections_name() -> None:
    """The stage knows sections as plain values; the package's defaults must be the same."""
    params, read = load_params(), inputs.reads(load_params())
    named = {stage: {name for name, _ in splits} for stage, splits in read.items()}
    runs = {parse(TrainConfig, section, where=run).dataset for run, section in params["runs"].items()}
    assert named["pretrain"] == set(parse(PretrainConfig, params["pretrain"], where="pretrain").shares)
    survey = parse(SurveyConfig, params["survey"] | {"grid": "full"}, where="survey")
    assert named["cost"] == {name for name, _ in survey.cells} | set(survey.default)
    assert named["record-split"] == named["evaluate-split"] == runs | named["cost"]
    updates = parse(UpdateConfig, params["updates"] | {"grid": "full"}, where="updates")
    assert named["attack-federated"] >= {cell.dataset for cell, _, _ in updates.cells}
    for grid, section in params["dp"].items():
        assert named[f"dp/{grid}"] == {parse(DPSurveyConfig, section, where=grid).common.dataset}
    some: dict[str, dict[str, Any]] = {"runs": {"run": {}}, "dp": {"grid": {}}, "updates": {"cases": [{}]}}
    bare = inputs.reads({name: some.get(name, {}) for name in params})
    recorded = {TrainConfig().dataset, *SurveyConfig().datasets}
    assert bare["record-split"] == {(name, split) for name in recorded for split in ("private", "public", "heldout")}
    assert {name for name, _ in bare["dp/grid"]} == {DPSurveyConfig().common.dataset}
    assert {name for name, _ in bare["attack-split"]} == set(SurveyConfig().datasets)
    assert {name for name, _ in bare["pretrain"]} == set(PretrainConfig().shares)


def test_the_tracked_digests_are_those_of_the_notebooks_and_the_shipped_data() -> None:
    """So that a fresh clone knows that what is shipped is up to date."""
    digests = inputs.Digests(ROOT / ".cache" / "inputs.json")
    shipped = {"pretrain", "cost", "dp/digits", "dp/photos", "dp/shapes"}
    for name, content in inputs.written(load_params(), digests).items():
        if name.startswith("notebooks/") or name.removeprefix("data/").removesuffix(".json") in shipped:
            path = ROOT / "inputs" / name
            assert json.loads(path.read_text()) == content, f"{path}: run `dvc repro inputs`"
