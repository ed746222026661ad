"""Notebooks that are opened, run and saved: nothing of what they showed stays in them, and no stage becomes stale."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_server.serverapp import ServerApp

from pipeline.inputs import notebook_digest
from splitlab.core.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with notebooks and with the configuration where `make setup` puts it."""
    folder = tmp_path / "my checkout"
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(ROOT / "pipeline", folder / "pipeline")
    (folder / ".venv/etc/jupyter").mkdir(parents=True)
    link = next(line.split()[-2] for line in (ROOT / "Makefile").read_text().splitlines() if "ln -sfn" in line)
    (folder / ".venv/etc/jupyter/jupyter_server_config.py").symlink_to(link)
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(folder / ".venv/etc/jupyter"))  # of a running environment: sys.prefix
    for name in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(tmp_path / name))
    return folder


@pytest.fixture(params=["started in the checkout", "started elsewhere"])
def contents(
    request: pytest.FixtureRequest, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """The contents manager of a server, as `jupyter lab` makes it, by which every save goes."""
    root = checkout if request.param == "started in the checkout" else tmp_path
    monkeypatch.chdir(root)
    app = ServerApp()
    app.initialize(argv=[f"--ServerApp.root_dir={root}"], find_extensions=False, new_httpserver=False)
    yield app.contents_manager
    ServerApp.clear_instance()


def save(contents: Any, path: Path, notebook: Any) -> None:
    inside = path.relative_to(contents.root_dir).as_posix()
    model = {"type": "notebook", "format": "json", "content": notebook}
    asyncio.run(contents.save(model, inside))


def executed(path: Path) -> Any:
    """Return the notebook as it is after a run, in JupyterLab and with another kernel."""
    notebook = nbformat.read(path, as_version=4)
    png = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("display_data", data=png)]
        cell.metadata |= {"execution": {"iopub.execute_input": "2024-01-01"}, "scrolled": True}
    notebook.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "other"}
    notebook.metadata.language_info = {"name": "python", "version": "3.12.9", "mimetype": "text/x-python"}
    notebook.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {"state": {"secret": 1}}}
    return notebook


def test_every_notebook_is_saved_byte_for_byte_as_it_was(contents: Any, checkout: Path) -> None:
    for path in NOTEBOOKS:
        copy = checkout / "notebooks" / path.name
        save(contents, copy, executed(copy))
        assert copy.read_bytes() == path.read_bytes(), path.name


def test_what_is_written_into_a_cell_is_saved(contents: Any, checkout: Path) -> None:
    path = checkout / "notebooks" / "record_split.ipynb"
    before, notebook = notebook_digest(path), executed(path)
    notebook.cells[-1].source += "\n1 + 1"
    save(contents, path, notebook)
    saved = json.loads(path.read_text())
    assert saved["cells"][-1]["source"][-1] == "1 + 1"
    assert not saved["cells"][-1]["outputs"]
    assert notebook_digest(path) != before


def test_notebooks_elsewhere_are_saved_as_they_are(contents: Any, checkout: Path) -> None:
    path = checkout / "mine.ipynb"
    save(contents, path, executed(checkout / "notebooks" / "record_split.ipynb"))
    assert "image/png" in path.read_text()


def test_a_copy_in_the_notebooks_folder_has_no_outputs_either(contents: Any, checkout: Path) -> None:
    path = checkout / "notebooks" / "copy.ipynb"
    save(contents, path, executed(checkout / "notebooks" / "record_split.ipynb"))
    assert "image/png" not in path.read_text()
    assert "secret" not in path.read_text()


def test_other_programs_may_save_outputs_and_make_nothing_stale(checkout: Path) -> None:
    for path in NOTEBOOKS:
        copy = checkout / "notebooks" / path.name
        nbformat.write(executed(copy), copy)
        assert "image/png" in copy.read_text()
        assert notebook_digest(copy) == notebook_digest(path), path.name
