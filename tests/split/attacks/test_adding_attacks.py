"""Adding an attack is adding a file: the one that CONTRIBUTING shows, in a copy of the package, serves everywhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from splitlab.core.paths import ROOT

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)

USED = """
import json
from pathlib import Path
import torch
from world import tiny
from splitlab.diffusion.base import load_base
from splitlab.explorer import attack_panel
from splitlab.split.attacks import ATTACKS, NO_INFORMATION, REFERENCE, attack_label
from splitlab.split.defences import Defences
from splitlab.split.messages import Knowledge, Observation
from splitlab.split.server import run_attack

{test}
test_half_of_the_public_images_are_darker(load_base(tiny.save_base(Path("base"))))
share = ATTACKS["quantile_public"].options["share"]
field = attack_panel._field("share", share)
print(json.dumps({{
    "guesses": NO_INFORMATION, "reference": REFERENCE, "label": attack_label("quantile_public"),
    "offered": [attack_panel.ATTACKS["quantile_public"].label, field.value, field.tooltip],
}}))
"""


def test_the_file_that_contributing_shows_is_all_it_takes(tmp_path: Path) -> None:
    (code,) = (example for example in EXAMPLES if "quantile_public, " in example)
    (test,) = (example for example in EXAMPLES if example.startswith("def test_half"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "splitlab", tmp_path / "splitlab", ignore=ignored)
    (tmp_path / "splitlab/split/attacks/quantile_public.py").write_text(code, encoding="utf-8")
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "SPLITLAB_ROOT": str(tmp_path)}
    command = [sys.executable, "-c", USED.format(test=test)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "guesses": ["mean_public", "random_public", "quantile_public"],
        "reference": "mean_public",
        "label": "median public image",
        "offered": ["median public image", 0.5, "of public images below the answer (from 0 to 1)"],
    }
