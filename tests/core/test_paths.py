"""Where the project is, when nobody says so; and what importing the package costs."""

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_root_is_the_checkout_that_the_package_lies_in(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "SPLITLAB_ROOT"}
    command = [sys.executable, "-c", "from splitlab import ROOT; print(ROOT)"]
    environment["PYTHONPATH"] = str(CHECKOUT)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == CHECKOUT
    assert (CHECKOUT / "params.yaml").exists()


def test_importing_the_package_loads_no_large_library() -> None:
    said = "import sys, splitlab; print([name for name in ('torch', 'diffusers', 'pandas') if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
