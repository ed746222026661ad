"""No message, page or command of the project tells anybody to destroy what may be the only copy of their work."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT

DESTROYS = re.compile(
    r"\b(delet|eras|wip|purg|trash|shredd|scrapp)(e|es|ing)\b|\b(must|should|can|may|to) be (delet|eras|remov|wip)ed\b"
    r"|\b(remove|removing|unlink\w*|rmtree|shred|nuke|destroy|discard|discarding|recreate|overwrite)\b"
    r"|\b(by|after|try) overwriting\b|\bempty (it|the|that|this)\b|\bthrow\w* \w* ?away\b|\bget(ting)? rid\b"
    r"|\b(clear|clean)(ing|ed)? (it|them|out|up|the|that|this|your)\b|\bdispose of\b|\bdrop the (file|folder|cache)"
    r"|\bwrite (a new one )?over\b|\breplace (it|them|the (file|folder))\b|\bstart (over|from scratch)\b"
    r"|\brm -|\b(mv|cp) -f|\bmake clean\b|\btruncate -|\bforce=true\b|--(overwrite|hard)\b"
    r"|\bgit (checkout|restore|reset|clean|stash|rm)\b|\b(git|dvc) (?!commit)\w+\b[^\n]*(--force|-f\b)"
    r"|\bdvc (remove|gc|destroy)\b",
    re.IGNORECASE,
)


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every string of a source that is no docstring, whole sentences of f-strings included."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    if any(isinstance(node, ast.Name) and node.id == "__doc__" for node in ast.walk(tree)):
        yield 1, ast.get_docstring(tree) or ""  # a script's usage
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield node.lineno, "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def notebook_text(path: Path) -> Iterator[tuple[int, str]]:
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        yield number, "".join(cell["source"])


def pages(path: Path) -> Iterator[tuple[int, str]]:
    yield from enumerate(path.read_text().splitlines(), 1)


def echoed(path: Path) -> Iterator[tuple[int, str]]:
    """Yield what a Makefile says: its echoes and the descriptions of its targets, not its own commands."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if "echo" in line or "##" in line or line.startswith("#"):
            yield number, line


SAID = [
    *(
        (path, strings)
        for folder in ("splitlab", "benchmarks", "pipeline")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "cases.py"  # which asserts that errors say no such thing
    ),
    *((path, pages) for path in sorted((ROOT / "splitlab").rglob("templates/*.html"))),
    *((path, notebook_text) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))),
    *((path, pages) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))),
    (ROOT / "Makefile", echoed),
    (ROOT / "dvc.yaml", pages),
    *((path, pages) for path in (ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml")))),
]


@pytest.mark.parametrize(("path", "read"), SAID, ids=lambda value: value.name if isinstance(value, Path) else "")
def test_nothing_advises_to_destroy(path: Path, read):
    advice = [f"{path.name}:{where}: {text.strip()[:200]}" for where, text in read(path) if DESTROYS.search(text)]
    assert not advice


@pytest.mark.parametrize(
    "advice",
    [
        "x.pt: damaged; delete it and run the stage that makes it again",
        "git checkout reports/metrics brings them back",
        "or delete the file to give those steps up",
        "image 3 cannot be read; restore or remove it",
        "it exists; overwrite it with force=True",
        "run `dvc pull --force`",
        "dvc checkout -f",
        "rm -rf runs",
        "git reset --hard, then git clean -fd",
        "damaged; try again after removing the file",
        "it must be deleted first",
        "clear the cache and run again",
        "clean up runs/ first",
        "pass force=True to write over it",
        "start over with an empty folder: empty the old one",
        "`make clean` helps",
        "recreate the data set",
        "dvc repro -f",
        "mv -f new old",
        "Nothing was changed; delete the folder",
    ],
)
def test_the_search_sees_advice_that_destroys(advice: str):
    assert DESTROYS.search(advice)


@pytest.mark.parametrize(
    "said", ["Nothing was changed, copied or deleted. Move it", "the transcript is empty", "it stays"]
)
def test_the_search_leaves_what_did_not_happen(said: str):
    assert not DESTROYS.search(said)


def test_sources_are_found():
    assert len(SAID) > 120


def test_a_damaged_file_is_spoken_of_as_what_it_is_to_its_owner(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not tensors")
    said = {}
    for remedy in ("", checkpoint.CACHED, checkpoint.REMADE):
        with pytest.raises(InputError, match=r"x\.safetensors: damaged") as error:
            checkpoint.load(path, remedy=remedy)
        said[remedy] = str(error.value)
    assert "plain text, not tensors" in said[""]  # it may be the user's: what it is
    assert "saved work and nothing else: move it aside" in said[checkpoint.CACHED]
    assert "run the stage that makes it" in said[checkpoint.REMADE]
    assert path.exists()
