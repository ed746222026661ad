"""What each stage's notebook imports, modules of modules included: the lists of modules in dvc.yaml.

`python tests/closure.py` prints the stages whose lists are wrong; with `--write` it brings dvc.yaml up to date.
"""

import ast
import difflib
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "splitlab"

CATALOGUES = ("splitlab/split/attacks", "splitlab/federated/attacks", "splitlab/federated/defences")
"""Folders that a stage depends on as a whole if it needs their list of what they hold."""


def code(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@cache
def file_of(module: str) -> Path | None:
    """Return the file of one of the package's modules; None for what is no module of it."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def imported(source: str, package: str = "") -> Iterator[str]:
    """Yield the package's modules that `source` imports, anywhere in it, in any form; `package` is its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield exporter(module, alias.name)


@cache
def exporter(module: str, name: str) -> str:
    """Return the module that `from module import name` is about: a submodule, or where the package took it from."""
    if file_of(f"{module}.{name}"):
        return f"{module}.{name}"
    if module == PACKAGE:  # it defines nothing itself
        for node in ast.parse((ROOT / PACKAGE / "__init__.pyi").read_text()).body:
            if isinstance(node, ast.ImportFrom) and any(alias.asname == name for alias in node.names):
                return exporter(f"{PACKAGE}.{node.module}", name)
    return module


def closure(source: str) -> set[Path]:
    """Return the files of the package that running `source` needs, without the package's own `__init__`."""
    found: set[Path] = set()
    waiting = list(imported(source))
    while waiting:
        module = waiting.pop()
        file = file_of(module)
        if file is None or file in found or module == PACKAGE or not module.startswith(f"{PACKAGE}."):
            continue
        found.add(file)
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        if package.replace(".", "/") in CATALOGUES:  # it imports whatever lies in its folder
            waiting += [f"{package}.{path.stem}" for path in file.parent.glob("*.py")]
        waiting += [*imported(file.read_text(), package), module.rpartition(".")[0]]
    return {file.relative_to(ROOT) for file in found}


def modules(notebook: Path) -> list[str]:
    """Return what a stage with this notebook has to depend on: modules, and `CATALOGUES` as a whole."""
    found = {path.as_posix() for path in closure(code(notebook))}
    whole = {folder for folder in CATALOGUES if f"{folder}/__init__.py" in found}
    return sorted({path for path in found if not path.startswith(tuple(f"{folder}/" for folder in whole))} | whole)


def rooms(notebook: Path) -> list[str]:
    """Return the rooms that hold what this notebook imports, and the modules that are in none."""
    return sorted({"/".join(path.parts[:2]) for path in closure(code(notebook))})


def rewritten(text: str) -> str:
    """Return the text of a dvc.yaml with the code of every stage listed behind its other dependencies.

    A stage that lists a room goes on to list rooms, one that lists the whole package goes on to do so; every other
    lists the modules.
    """
    stages, dependency = re.split(r"^(?=  \S)", text, flags=re.M), re.compile(rf"^ +- {PACKAGE}/\S*\n", re.M)
    for number, stage in enumerate(stages):
        notebook = re.search(r"notebooks/\w+\.ipynb", stage)
        if notebook and not re.search(rf"^ +- {PACKAGE}\n", stage, re.M):
            in_rooms = re.search(rf"^ +- {PACKAGE}/\w+\n", stage, re.M)
            head, rest = re.split(r"(?<=\bdeps:\n)", dependency.sub("", stage))
            listed = re.match(r"(?:( +)- .*\n)+", rest)
            paths = (rooms if in_rooms else modules)(ROOT / notebook[0])
            lines = "".join(f"{listed[1]}- {path}\n" for path in paths)
            stages[number] = head + listed[0] + lines + rest[listed.end() :]
    return "".join(stages)


def main() -> int:
    path = ROOT / "dvc.yaml"
    text = path.read_text()
    wanted = rewritten(text)
    if "--write" in sys.argv[1:]:
        path.write_text(wanted)
    elif wanted != text:
        print(
            *difflib.unified_diff(text.splitlines(), wanted.splitlines(), "dvc.yaml", "as imported", lineterm=""),
            sep="\n",
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
