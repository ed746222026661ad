"""Nothing in the project may run code from a file it reads: no source asks for it, and no reader does it."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import names

from splitlab.core.paths import ROOT

MODULES = (
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "shelve",
    "marshal",
    "jsonpickle",
    "hickle",
    "copyreg",
)
FUNCTIONS = (
    *("torch.load", "torch.save", "torch.serialization", "torch.package", "torch.hub", "torch.jit.load"),
    *("joblib.load", "joblib.dump", "joblib.Memory", "pandas.read_pickle", "numpy.core.multiarray"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
)
WITHOUT_WEIGHTS = ("Tokenizer.from_pretrained", "Config.from_pretrained")
METHODS = ("to_pickle", "read_pickle")


def forbidden(source: str) -> list[str]:
    """Return what in `source` opens the door to code in files, by every way in which Python lets one name it."""
    tree = ast.parse(source)
    known = dict(names.bound(tree))
    problems = [f"line {line}: {name}" for name, line in names.reached(source) if _is_forbidden(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in METHODS:
            problems.append(f"line {node.lineno}: {node.attr}")
        if isinstance(node, ast.Call):
            problems += [f"line {node.lineno}: {problem}" for problem in _in_call(node, known)]
    return problems


def _is_forbidden(name: str) -> bool:
    return any(name == word or name.startswith(f"{word}.") for word in (*MODULES, *FUNCTIONS))


def _in_call(call: ast.Call, known: dict[str, str]) -> Iterator[str]:
    options = {option.arg: option.value for option in call.keywords}
    for option, only in (("allow_pickle", False), ("use_safetensors", True), ("trust_remote_code", False)):
        value = options.get(option)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is only):
            yield f"{option} is not {only}"
    called = names.dotted(call.func, known) or ast.unparse(call.func)
    weights = called.endswith(".from_pretrained") and not called.endswith((*WITHOUT_WEIGHTS,))
    if weights and "use_safetensors" not in options and None not in options:  # None: ** that says so, see `load_model`
        yield f"{called} opens a pickle where there is nothing else; say use_safetensors=True"
    if names.dotted(call.func, known) == "numpy.load" and len(call.args) > 2:
        yield "numpy.load's third argument is allow_pickle; give it by name"


def code_of(path: Path) -> str:
    """Return the Python of a source file or of a notebook's code cells, without the lines that are IPython's."""
    if path.suffix == ".py":
        return path.read_text()
    cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell) for cell in cells).splitlines()
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


SOURCES = sorted(
    path
    for folder in ("splitlab", "notebooks", "benchmarks", "pipeline")
    for pattern in ("*.py", "*.ipynb")
    for path in (ROOT / folder).rglob(pattern)
    if ".ipynb_checkpoints" not in path.parts and path.name != "cases.py"  # which makes such files, to be refused
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_opens_the_door_to_code_in_files(path):
    assert not forbidden(code_of(path))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "import pickle, json",
        "import json, pickle as p",
        "from pickle import loads",
        "import os\ndef f():\n    import dill",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "import torch\nread = torch.load",
        "from torch import load",
        "from torch import load as read, nn",
        "import torch.serialization",
        "from torch.serialization import load as read",
        "from torch import serialization",
        "import torch\ngetattr(torch, 'load')(path)",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module as bring\nbring('cloudpickle')",
        "__import__('pickle')",
        "import torch\ntorch.save(x, path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=trusted)",
        "import numpy as np\nnp.load(path, None, True)",
        "from numpy import load\nload(path, None, True)",
        "import joblib\njoblib.load(path)",
        "from joblib import Parallel, dump",
        "from joblib import Memory",
        "import pandas as pd\npd.read_pickle(path)",
        "frame.to_pickle(path)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "eval(text)",
        "Model.from_pretrained(path, use_safetensors=False)",
        "Model.from_pretrained(path)",
        "CLASSES[kind].from_pretrained(path)",
        "Model.from_pretrained(path, use_safetensors=safe)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_search_sees_every_form(source: str):
    assert forbidden(source)


@pytest.mark.parametrize(
    "source",
    [
        "from joblib import Parallel, delayed, parallel_config",  # processes, no files
        "from safetensors.torch import load, save, save_file",
        "import re\nre.compile('pickle')",
        "message = 'a pickle, as torch.save writes: torch.load(path)'",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "Model.from_pretrained(path, use_safetensors=True)",
        "CLIPTokenizer.from_pretrained(path)",
        "from splitlab.data.image_set import load\nload(path)",
        "import torch\ntorch.hub_is_not_here",
    ],
)
def test_the_search_takes_nothing_harmless_for_it(source: str):
    assert not forbidden(source)


READERS = """
import pickle, sys, zipfile, io
from pathlib import Path
import numpy as np, torch
from splitlab.core import checkpoint
from splitlab.split import wire
from splitlab.split.artefacts import load_reconstruction
from splitlab.core.tables import read_table
from splitlab.data.image_set import load as load_data
from splitlab.core.errors import InputError
from splitlab.core.formats import describe_file
from splitlab.federated.saved import load_inversion
from splitlab.federated.update import read_update, read_update_truth

class Payload:
    def __reduce__(self):
        return exec, ("import builtins; builtins.OWNED = True",)

folder = Path(sys.argv[1])
torch.save({"a": Payload()}, folder / "new.pt")
torch.save({"a": Payload()}, folder / "old.pt", _use_new_zipfile_serialization=False)
np.savez(folder / "x.npz", a=np.array([Payload()], dtype=object))
np.save(folder / "x.npy", np.array([Payload()], dtype=object))
(folder / "x.bin").write_bytes(pickle.dumps(Payload()))
sys.addaudithook(lambda event, args: print(event) if event.startswith("pickle.") else None)
readers = (
    checkpoint.load, checkpoint.load_json, describe_file, load_reconstruction, read_table, load_data, load_inversion,
    read_update, read_update_truth, wire.read_transcript, wire.read_truth,
    wire.read_server, lambda path: wire.from_bytes(path.read_bytes()),
)
count = 0
for path in sorted(folder.iterdir()):
    for reader in readers:
        try:
            reader(path)
        except InputError:
            pass
        count += 1
import builtins
print("owned" if hasattr(builtins, "OWNED") else "clean", count)
pickle.loads((folder / "x.bin").read_bytes())
print("owned" if hasattr(builtins, "OWNED") else "clean")
"""


def test_no_reader_unpickles_what_it_is_given(tmp_path: Path):
    out = subprocess.run(
        [sys.executable, "-c", READERS, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    # the last two lines show that the hook and the payload would have been seen
    assert out.stdout.split("\n") == ["clean 65", "pickle.find_class", "owned", ""], out.stdout + out.stderr


def test_sources_are_found():
    assert len(SOURCES) > 100
    assert {path.suffix for path in SOURCES} == {".py", ".ipynb"}
