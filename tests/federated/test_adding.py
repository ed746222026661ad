"""Adding an attack on updates, or a defence, is adding a file: those that CONTRIBUTING shows serve everywhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from splitlab.core.paths import ROOT

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)

USED = """
import pytest
import test_inversion_images
import test_update_defences as defences
from world import tiny
from world.tiny import ALPHAS, update_truth

from splitlab.federated.attacks import INVERSIONS, ON_IMAGES, inversion_label
from splitlab.federated.client import pixel_unet, share
from splitlab.federated.defences import DEFENCES, defence_label, effects
from splitlab.federated.external import attack_gradient
from splitlab.study.update_grid import Case, InversionSpec

test_inversion_images.test_the_noisy_image_is_nearly_the_image_at_an_early_timestep()
assert list(INVERSIONS)[-2:] == ["noisy_image", "unknown_noise"] and "noisy_image" in ON_IMAGES
assert inversion_label("noisy_image", ["timesteps"]) == "noisy image (knows t)"
case = Case("pixel", (InversionSpec("noisy_image", ("timesteps",)),), defences=("random_k=0.1",))
update = share(pixel_unet(8, seed=0, channels=(8, 16)), update_truth(n=3), alphas_cumprod=ALPHAS)
defences.test_random_k_keeps_its_share_of_values_unchanged(update)
assert defence_label("random_k", 0.1) == "a random 0.1 of all values" and "random_k" in DEFENCES
assert effects("RandomK fraction=0.1, Clip max_norm=1") == {"sparse", "rescaled"}
with pytest.raises(ValueError, match="random_k=2.0': RandomK: fraction must be in"):
    Case("pixel", (), defences=("random_k=2.0",))
with pytest.raises(ValueError, match="n_starts: expected a whole number of 1 or more, got 0"):
    attack_gradient({}, model=pixel_unet(8, seed=0), attack="noisy_image", n_starts=0)
"""


def example(word: str) -> str:
    """Return the one block of code in CONTRIBUTING that begins with a word."""
    (text,) = (text for text in EXAMPLES if text.startswith(word))
    return text


def test_the_files_that_contributing_shows_serve_everywhere(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "splitlab", tmp_path / "splitlab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests/world", tmp_path / "world", ignore=shutil.ignore_patterns("__pycache__"))
    attacks, rooms = tmp_path / "splitlab/federated/attacks", tmp_path / "splitlab/federated/defences"
    (attacks / "noisy_image.py").write_text(example('"""The noisy image'), encoding="utf-8")
    (rooms / "random_k.py").write_text(example('"""Random values of an update'), encoding="utf-8")
    for name, line, code in (
        ("attacks/test_inversion_images.py", "attacks.noisy_image import noisy_image", "def test_the_noisy_image"),
        ("test_update_defences.py", "defences.random_k import RandomK", "def test_random_k"),
    ):
        own = (ROOT / "tests/federated" / name).read_text(encoding="utf-8")
        text = f"{own}\nfrom splitlab.federated.{line}\n\n\n{example(code)}"
        (tmp_path / Path(name).name).write_text(text, encoding="utf-8")
    paths = {"PYTHONPATH": str(tmp_path), "SPLITLAB_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", USED], cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
