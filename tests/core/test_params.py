from pathlib import Path

import pytest
from dvc.utils.serialize import load_yaml

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.params import FILES, SECTIONS, load_params
from splitlab.split.config import TrainConfig

EMPTY = "base: {source: models/base}\n" + "".join(
    f"{name}: {{}}\n" for name in SECTIONS if name not in ("base", "runs")
)


def written(folder: Path, runs: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(EMPTY + f"runs:\n  mine: {runs}\n", encoding="utf-8")
    return path


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path):
    run = load_params(written(tmp_path, "{lr: 1e-4, steps: 1e3, seed: 010, samples: 0o10}"))["runs"]["mine"]
    built = parse(TrainConfig, run, where="runs.mine")
    assert (built.lr, built.steps, built.seed, built.samples) == (1e-4, 1000, 10, 8)


@pytest.mark.parametrize(
    "runs", ["{lr: 1e-4}", "{a: 1e3, b: .inf, c: 010, d: yes, e: on, f: 1:30, g: ~, h: 1_000}", "{a: &x {b: 1}, c: *x}"]
)
def test_dvc_reads_the_same(tmp_path: Path, runs: str):
    path = written(tmp_path, runs)
    assert load_params(path) == load_yaml(path)


def test_dvc_reads_the_same_of_the_shipped_files():
    files = [ROOT / "params.yaml", *(ROOT / "params" / name for name in FILES)]
    assert load_params() == {name: entries for file in files for name, entries in load_yaml(file).items()}


def test_sections_of_a_system_lie_in_its_own_file_and_each_in_one_file_only(tmp_path: Path):
    path = written(tmp_path, "{}")
    common, _, runs = path.read_text().partition("runs:")
    path.write_text(common)
    with pytest.raises(InputError, match=r"params\.yaml: no section runs; .*, in params.yaml, params/split.yaml,"):
        load_params(path)
    (tmp_path / "params").mkdir()
    own = tmp_path / "params/split.yaml"
    own.write_text(f"runs:{runs}")
    assert load_params(path)["runs"] == {"mine": {}}
    own.write_text(f"runs:{runs}dp: {{}}\n")
    with pytest.raises(InputError, match=r"params/split\.yaml: section dp is in .*params\.yaml too; keep one of them"):
        load_params(path)
    own.write_text(f"runs:{runs}runs: {{}}\n")
    with pytest.raises(InputError, match=r"params/split\.yaml, line 3: found duplicate key"):
        load_params(path)
    own.write_text("run: {}\n")
    with pytest.raises(InputError, match=r"params/split\.yaml: unknown section run; the sections are "):
        load_params(path)
    own.write_text("runs: 1\n")
    with pytest.raises(InputError, match=r"params/split\.yaml, section runs: expected names and values"):
        load_params(path)


def test_a_byte_order_mark_is_no_part_of_the_first_section(tmp_path: Path):
    path = written(tmp_path, "{}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_params(path)["runs"] == {"mine": {}}


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ("{lr: 1, steps: 2, lr: 3}", r'line 10: found duplicate key "lr".*; a key may be given once'),
        ("{a: 1}\n  mine: {a: 2}", r'line 11: found duplicate key "mine"'),
        ("{a: 1}\nruns: {}", r'line 11: found duplicate key "runs"'),
        ("{a: [}", "not valid YAML"),
        ("!!python/object:os.system x", "not valid YAML"),
        ("2001-99-99", "cannot be read .*month must be"),
        ("!!int abc", "cannot be read"),
        ("!!bool 3", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("1\n---\nb: 1", "(?s)not valid YAML .*but found another document"),
        ("1\n\x07", "not valid YAML"),
        ("1\n1: 2", "unknown section 1;"),
        ("1\nevaluate: 3", "duplicate"),
    ],
)
def test_what_cannot_be_read_is_one_error(tmp_path: Path, runs: str, says: str):
    with pytest.raises(InputError, match=says):
        load_params(written(tmp_path, runs))


@pytest.mark.parametrize("content", [b"\xff\xfea\x00:\x00", b"a: \xe4", b""])
def test_a_file_that_is_no_text_is_one_error(tmp_path: Path, content: bytes):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"params\.yaml: (cannot be read|expected sections)"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_params(tmp_path)


@pytest.mark.parametrize(
    ("section", "says"),
    [("runs: null", "section runs: expected names"), ("runs: {1: {}}", "section runs: the name 1 .* put it in quotes")],
)
def test_sections_map_names_to_settings(tmp_path: Path, section: str, says: str):
    (tmp_path / "params.yaml").write_text(EMPTY + section)
    with pytest.raises(InputError, match=says):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("base", ["{}", "{sorce: models/base}", "{source: ~}", "{source: models/base, variant: fp16}"])
def test_the_base_section_names_one_source(tmp_path: Path, base: str):
    path = written(tmp_path, "{}")
    path.write_text(path.read_text().replace("{source: models/base}", base))
    with pytest.raises(InputError, match="section base: expected source, a folder or a hub id, got "):
        load_params(path)
