"""The pipeline as files: who may read what, parameters that parse, notebooks without outputs."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import closure
import pytest
import yaml
from closure import code

from pipeline.inputs import reads
from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.diffusion.pretrain import PretrainConfig
from splitlab.params import load_params, load_split, section
from splitlab.split.attacks import ATTACKS
from splitlab.split.config import SENDING, AttackSpec, TrainConfig
from splitlab.study.config import EvaluateConfig
from splitlab.study.dp_survey import DPSurveyConfig
from splitlab.study.survey import SurveyConfig
from splitlab.study.update_grid import UpdateConfig

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRIVATE = re.compile(
    r"(^|/)(data/?$|data/private|data/heldout|runs/?$|survey/?$|updates/?$|scores)|truth|record\.json|timing|samples\."
)


def stage(name: str) -> dict:
    return STAGES[name].get("do", STAGES[name])


def test_attack_stages_depend_on_what_the_server_has_and_public_data_only() -> None:
    for name, sent in (
        ("attack-split", ["runs/sent.json", "survey/transcripts"]),
        ("attack-federated", ["updates/sent", "updates/granted"]),
    ):
        deps = [dep for dep in stage(name)["deps"] if not dep.startswith(("splitlab/", "inputs/notebooks/"))]
        assert deps == [f"inputs/data/{name}.json", "inputs/base.json", *sent], name
        assert {split for _, split in reads(load_params())[name]} == {"public"}


def test_the_pretrain_stage_depends_on_public_data_only() -> None:
    assert not [dep for dep in stage("pretrain")["deps"] if PRIVATE.search(dep)]
    assert {split for _, split in reads(load_params())["pretrain"]} == {"public"}


def test_the_check_for_private_files_can_fail() -> None:
    leaks = ["data", "data/private", "runs", "runs/${key}/truth.safetensors", "data/private/shapes.zip", "scores"]
    leaks += ["survey", "survey/truth", "updates", "updates/truth"]
    assert all(PRIVATE.search(dep) for dep in leaks)


def test_every_stage_depends_on_all_modules_that_its_notebook_imports() -> None:
    text = (ROOT / "dvc.yaml").read_text()
    assert closure.rewritten(text) == text, "run `python tests/closure.py --write`"
    for name in (name for name in STAGES if name != "inputs"):
        (notebook,) = re.findall(r"notebooks/(\w+)\.ipynb", stage(name)["cmd"])
        deps = set(stage(name)["deps"])
        assert f"inputs/notebooks/{notebook}.json" in deps, name
        for module in closure.closure(code(ROOT / f"notebooks/{notebook}.ipynb")):
            assert deps & {path.as_posix() for path in (module, *module.parents)}, f"{name}: {module}"
        assert all((ROOT / dep).exists() for dep in deps if dep.startswith("splitlab")), name


def test_imports_are_found_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "splitlab"
    for name, source in {
        "__init__": "",
        "a": "def renamed():\n    import splitlab.sub.lazy",
        "plain": "",
        "sub/__init__": "from splitlab import plain",
        "sub/lazy": "from . import near",
        "sub/near": "from ..far import thing",
        "far": "",
        "unused": "",
    }.items():
        (package / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(source)
    (package / "__init__.pyi").write_text("from .a import renamed as renamed")
    monkeypatch.setattr(closure, "ROOT", tmp_path)
    for cached in (closure.file_of, closure.exporter):
        cached.cache_clear()
    found = {path.as_posix() for path in closure.closure("import json\nfrom splitlab import renamed")}
    for cached in (closure.file_of, closure.exporter):
        cached.cache_clear()
    names = ("a", "plain", "sub/__init__", "sub/lazy", "sub/near", "far")
    assert found == {f"splitlab/{name}.py" for name in names}


def test_no_output_is_pushed_and_none_of_private_data_is_copied_to_the_cache() -> None:
    for name in STAGES:
        for out in (*stage(name)["outs"], *stage(name).get("metrics", ())):
            ((path, options),) = out.items()
            assert options["push"] is False, path
            assert path == "models/base" or options["cache"] is False, path
    assert all(out["push"] is False for out in yaml.safe_load((ROOT / "data.dvc").read_text())["outs"])


def test_what_own_runs_leave_is_not_seen_by_git() -> None:
    own = ["data/private/mine", "models/base", "runs/mine/truth.safetensors"]
    own += ["reports/metrics/dp/mine.csv", "reports/figures-dp/samples-mine.png"]
    own += ["inputs/data/record-split.json", "inputs/data/dp/mine.json", "reports/executed/dp-mine.ipynb"]
    for name in STAGES:
        for out in stage(name)["outs"]:
            ((path, _),) = out.items()
            own += [path.replace("${key}", "mine")] if not path.startswith(("reports/metrics/", "inputs")) else []
    own.remove("reports/figures-dp/curve.png")
    for path in own:
        found = subprocess.run(["git", "check-ignore", "--no-index", "-q", path], cwd=ROOT, check=False)
        assert found.returncode in (0, 128), f"git would track {path}"  # 128: there is no git here


def test_every_section_of_the_parameter_file_parses() -> None:
    params = load_params()
    parse(PretrainConfig, params["pretrain"], where="pretrain")
    parse(EvaluateConfig, params["evaluate"], where="evaluate")
    survey = parse(SurveyConfig, params["survey"], where="survey")
    assert all(spec.attack in ATTACKS for spec in survey.attacks)
    assert len({spec.adversary for spec in survey.attacks}) == len(survey.attacks), (
        "two attacks would write the same file"
    )
    updates = parse(UpdateConfig, params["updates"], where="updates")
    assert updates.cells
    assert replace(updates, grid="full").cells
    private = {name: parse(DPSurveyConfig, grid, where=f"dp.{name}") for name, grid in params["dp"].items()}
    assert all(grid.common.dataset == name and grid.runs for name, grid in private.items())
    assert len(replace(private["digits"], grid="full").runs) > len(private["digits"].runs)
    runs = {name: parse(TrainConfig, run, where=name) for name, run in params["runs"].items()}
    for run, specs in params["attacks"].items():
        assert runs[run].scheme in SENDING
        names = [parse(AttackSpec, spec, where=run).adversary.name for spec in specs]
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
    written = [
        value
        for name in ("out", "scores", "metrics")
        for value in re.findall(rf"^{name} = \"(.*)\"", code(path), re.M)
        if path.stem not in ("figures", "explore", "report") or name == "out"
    ]
    assert written or path.stem in ("explore", "report")
    assert all(value.startswith("scratch/") for value in written), written
