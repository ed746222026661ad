"""Which names a source reaches, written out in full, by every way in which Python lets one name something.

`import a.b`, `import a.b as c`, `from a import b`, `from a.b import c`, relative imports, all of them inside functions
too; attributes of what was imported; `importlib.import_module`, `__import__` and `getattr` with words in the source.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

IMPORTERS = ("importlib.import_module", "import_module", "__import__", "builtins.__import__")


def package_of(path: Path, root: Path) -> str:
    """Return the package in which a source file's relative imports start."""
    return ".".join(path.relative_to(root).parent.parts)


def reached(source: str, package: str = "") -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of everything that `source`, a module of `package`, imports or uses."""
    tree = ast.parse(source)
    known = dict(bound(tree, package))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{_origin(node, package)}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute | ast.Name):
            name = dotted(node, known)
            if name is not None:
                yield name, node.lineno
        elif isinstance(node, ast.Call):
            yield from ((name, node.lineno) for name in _spelled(node, known))


def bound(tree: ast.AST, package: str = "") -> Iterator[tuple[str, str]]:
    """Yield each local name that an import makes, and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield alias.asname or first, alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{_origin(node, package)}.{alias.name}"


def dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    """Write a name or an attribute of one out in full; None where it belongs to something computed."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, known)
        return None if before is None else f"{before}.{node.attr}"
    if isinstance(node, ast.Call) and dotted(node.func, known) in IMPORTERS:
        return next(_spelled(node, known), None)
    return None


def _spelled(call: ast.Call, known: dict[str, str]) -> Iterator[str]:
    """Yield what a call names by words in the source."""
    name = dotted(call.func, known)
    words = [value.value for value in call.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    if name in IMPORTERS:
        yield from words[:1]
    if name in ("getattr", "builtins.getattr") and words:
        owner = dotted(call.args[0], known)
        yield words[0] if owner is None else f"{owner}.{words[0]}"


def _origin(node: ast.ImportFrom, package: str) -> str:
    """Return the module that `from ... import` takes from, relative ones written out."""
    parents = package.split(".") if package else []
    above = parents[: len(parents) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])
