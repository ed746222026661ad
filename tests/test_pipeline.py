"""The pipeline as files: who may read what, parameters that parse, notebooks without outputs."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from splitlab.attacks import ATTACKS
from splitlab.config import SENDING, AttackSpec, EvaluateConfig, TrainConfig, parse
from splitlab.dp.survey import DPSurveyConfig
from splitlab.errors import InputError
from splitlab.params import load_params, load_split, section
from splitlab.paths import ROOT
from splitlab.pretrain import PretrainConfig
from splitlab.survey import SurveyConfig
from splitlab.update_survey import UpdateConfig

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRIVATE = re.compile(
    r"(^|/)(data/?$|data/private|data/heldout|runs/?$|survey/?$|updates/?$|scores)|truth|record\.json|timing|samples\."
)


def stage(name: str) -> dict:
    return STAGES[name].get("do", STAGES[name])


def code(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_attack_stages_depend_on_what_the_server_has_and_public_data_only() -> None:
    public = ["data/public", "models/base"]
    for name, own in {
        "attack": ["runs/${key}/transcript.safetensors", "runs/${key}/server.safetensors"],
        "survey-attack": ["survey/transcripts"],
        "updates-attack": ["updates/sent", "updates/granted", "runs/shapes-federated/controlnet"],
    }.items():
        deps = [dep for dep in stage(name)["deps"] if not dep.startswith(("splitlab/", "notebooks/"))]
        assert deps == own + public, name


def test_the_pretrain_stage_depends_on_public_data_only() -> None:
    assert not [dep for dep in stage("pretrain")["deps"] if PRIVATE.search(dep)]


def test_the_check_for_private_files_can_fail() -> None:
    leaks = ["data", "data/private", "runs", "runs/${key}/truth.safetensors", "data/private/shapes.zip", "scores"]
    leaks += ["survey", "survey/truth", "updates", "updates/truth"]
    assert all(PRIVATE.search(dep) for dep in leaks)


def test_the_attack_notebook_reads_nothing_private() -> None:
    for name in ("attack", "survey_attack", "updates_attack"):
        source = code(ROOT / f"notebooks/{name}.ipynb")
        assert re.search(r'load_split\((transcript\.header\.)?dataset, "public", params\)', source)
        assert not re.search(r"truth|\"private\"|\"heldout\"|record\.json|evaluate", source)


def test_attack_modules_import_neither_truth_nor_evaluation() -> None:
    for path in (*(ROOT / "splitlab/attacks").glob("*.py"), *(ROOT / "splitlab/inversion").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                assert not names & {"Truth", "UpdateTruth", "read_truth", "read_update_truth", "load_split", "load"}, (
                    path
                )
                assert node.module not in ("splitlab.evaluate", "splitlab.train"), path


def test_truth_is_read_on_the_evaluators_side_only() -> None:
    readers = {p.name for p in (ROOT / "splitlab").rglob("*.py") if re.search(r"\bread_truth\(", p.read_text())}
    assert readers <= {"evaluate.py", "figures.py", "explore.py", "wire.py"}


def test_the_truth_of_updates_is_read_on_the_evaluators_side_only() -> None:
    readers = {p.name for p in (ROOT / "splitlab").rglob("*.py") if re.search(r"\bread_update_truth\(", p.read_text())}
    assert readers <= {"update_scores.py", "update_figures.py", "update_explore.py", "updates.py"}


def test_every_stage_names_modules_and_notebooks_that_exist() -> None:
    for name in STAGES:
        for dep in stage(name)["deps"]:
            if dep.startswith(("splitlab/", "notebooks/")):
                assert (ROOT / dep).exists(), f"{name}: {dep}"


def test_every_section_of_the_parameter_file_parses() -> None:
    params = load_params()
    parse(PretrainConfig, params["pretrain"], where="pretrain")
    parse(EvaluateConfig, params["evaluate"], where="evaluate")
    survey = parse(SurveyConfig, params["survey"], where="survey")
    assert all(spec.attack in ATTACKS for spec in survey.attacks)
    assert len({spec.name for spec in survey.attacks}) == len(survey.attacks), "two attacks would write the same file"
    updates = parse(UpdateConfig, params["updates"], where="updates")
    assert updates.cells
    assert replace(updates, grid="full").cells
    private = {name: parse(DPSurveyConfig, grid, where=f"dp.{name}") for name, grid in params["dp"].items()}
    assert all(grid.common.dataset == name and grid.runs for name, grid in private.items())
    assert len(replace(private["digits"], grid="full").runs) > len(private["digits"].runs)
    runs = {name: parse(TrainConfig, run, where=name) for name, run in params["runs"].items()}
    for run, specs in params["attacks"].items():
        assert runs[run].scheme in SENDING
        names = [parse(AttackSpec, spec, where=run).name for spec in specs]
        assert len(set(names)) == len(names), "two attacks would write the same file"
        assert "mean_public" in names, "no table without its no-information row"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "expected sections"),
        ("a: [", "not valid YAML"),
        ("{base: 1, datasets: 1, pretrain: 1, runs: 1, attacks: 1, evaluate: 1, sweep: 1}", "unknown section sweep"),
        ("{base: 1}", "no section attacks, datasets"),
    ],
)
def test_a_bad_parameter_file_is_one_clear_error(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        load_params(path)
    with pytest.raises(InputError, match="no such parameter file"):
        load_params(tmp_path / "other.yaml")


def test_a_run_that_is_not_there_names_those_that_are() -> None:
    params = load_params()
    with pytest.raises(InputError, match="nothing called 'shapes-s9' in runs; there: shapes-central"):
        section(params, "runs", "shapes-s9")
    with pytest.raises(InputError, match="no data set 'faces'"):
        load_split("faces", "public", params)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs_and_write_to_scratch_by_default(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert not re.search(r"^\s*(def|class) ", code(path), re.M), "a notebook defines nothing: put it in the package"
    for name in ("out", "scores", "metrics"):
        for value in re.findall(rf"^{name} = \"(.*)\"", code(path), re.M):
            if path.stem not in ("figures", "explore", "report") or name == "out":
                assert value.startswith("scratch/"), f"{path.stem}: {name} = {value}"
