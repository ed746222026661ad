"""What the documents name is there: test files, benchmarks, modules and folders."""

import re

import pytest

from splitlab.core.paths import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/design.md", "docs/measurements.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_names_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    paths = set(re.findall(r"\b((?:tests|benchmarks|splitlab|notebooks|pipeline|docs)/[\w/*.-]*[\w*])", text))
    assert paths, "a document that names no path is not read as this test reads it"
    missing = sorted(path for path in paths if not list(ROOT.glob(path)) and not list(ROOT.glob(f"{path}.*")))
    assert not missing, f"{document} names what is not there"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_that_a_document_names_is_there(document: str) -> None:
    names = set(re.findall(r"\bsplitlab(?:\.\w+)+", (ROOT / document).read_text())) - {"splitlab.json"}
    missing = sorted(name for name in names if not _exists(name))
    assert not missing, f"{document} names what is not there"


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or what a module of the package defines."""
    *parents, last = name.split(".")
    module = ROOT.joinpath(*parents, last)
    if module.is_dir() or module.with_suffix(".py").is_file():
        return True
    home = ROOT.joinpath(*parents)
    texts = [
        path.read_text()
        for path in (home.with_suffix(".py"), home / "__init__.py", home / "__init__.pyi")
        if path.is_file()
    ]
    return any(re.search(rf"\b{last}\b", text) for text in texts)


def test_a_name_that_is_not_there_is_missed() -> None:
    assert not _exists("splitlab.split.nowhere")
    assert _exists("splitlab.split.wire.to_bytes")
