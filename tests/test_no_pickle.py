"""Data and models are safetensors only: nothing in the package or the notebooks may run code from a file it reads."""

import re

import pytest

from splitlab.paths import ROOT

FORBIDDEN = re.compile(
    r"pickle|torch\.load\(|torch\.save\(|allow_pickle\s*=\s*True"
    r"|joblib\.(load|dump|Memory)|joblib import .*\b(load|dump|Memory)\b",
    re.IGNORECASE,
)
SOURCES = sorted(
    path
    for folder, pattern in (("splitlab", "*.py"), ("notebooks", "*.ipynb"), ("notebooks", "*.py"))
    for path in (ROOT / folder).rglob(pattern)
    if ".ipynb_checkpoints" not in path.parts
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_or_writes_pickles(path):
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not found


def test_the_search_finds_what_it_is_for():
    assert len(SOURCES) > 15
    for line in (
        "import pickle",
        "torch.load(path)",
        "torch.save(x, p)",
        "np.load(p, allow_pickle=True)",
        "joblib.load(path)",
        "from joblib import Parallel, dump",
        "from joblib import Memory",
    ):
        assert FORBIDDEN.search(line)
    assert not FORBIDDEN.search("from joblib import Parallel, delayed, parallel_config")  # processes, no files
