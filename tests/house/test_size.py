"""The package stays thin: files that fit a sitting, functions that fit a screen."""

import ast
from pathlib import Path

import pytest

from splitlab.core.paths import ROOT

MODULES = sorted((ROOT / "splitlab").rglob("*.py"))
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 50


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_file_and_no_function_is_long(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINES_OF_A_FILE
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
    assert not {name: n for name, n in lengths.items() if n > LINES_OF_A_FUNCTION}
