"""Adding a defence is adding a file: the one that CONTRIBUTING shows, in a copy of the package, serves everywhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.split.config import TrainConfig
from splitlab.split.defences import DEFENCES, Defences, read_defences, recorded, unseen, unseen_variance
from splitlab.split.defences.record import NAMED
from splitlab.split.messages import OBSERVATION_FIELDS

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)

USED = """
import json
from pathlib import Path
import test_defences
import torch
from splitlab.core.config import parse
from splitlab.core.seeds import Key
from splitlab.diffusion.base import encoded, load_base
from splitlab.explorer import panels
from splitlab.report.layout import in_words
from splitlab.split.attacks.latent_view import latent_view
from splitlab.split.client import Client, client_send
from splitlab.split.config import TrainConfig, read_defences
from splitlab.split.defences import DEFENCES, unseen
from splitlab.split.messages import Knowledge
from splitlab.split.train import record
from splitlab.split.wire import from_bytes, read_transcript
from splitlab.study.survey import SurveyConfig
from world import tiny

test_defences.test_rounded_latents_lie_on_the_grid()
(each,) = (defences for defences in test_defences.EACH if defences.round_latents)
test_defences.test_a_defence_changes_the_fields_it_declares_and_no_other(each)
survey = {"grid": "full", "datasets": ["tiny"], "settings": {"rounded": {"round_latents": 0.5}}, "attacks": []}
settings = parse(SurveyConfig, survey | {"published_key": 0, "messages": 2, "batch_size": 4}, where="survey")
(run, planned), = settings.transcripts().items()
config = planned.config
base, private = load_base(tiny.save_base(Path("base"))), tiny.small_set(12)
client = Client(0, base, encoded(base, private), torch.arange(12), config.defences, Key.published(0))
sent = from_bytes(client_send(client, 0, 4)[0])
files = {"transcript": Path("transcript.safetensors"), "truth": Path("truth.safetensors")}
record(run, config, base, private, **files)
transcript = read_transcript(files["transcript"], base=base)
header = transcript.header.defences
std = latent_view(sent, Knowledge(base, "split", header, private.size, private))[1] * base.alphas_cumprod[
    sent.need("timesteps")
].sqrt()[:, None, None, None]
print(json.dumps({
    "text": str(config.defences),
    "read back": read_defences(str(config.defences)) == config.defences == header,
    "label": header.label,
    "in the report": in_words(str(header)),
    "on the grid": all((2 * one.need("smashed")).frac().eq(0).all().item() for one in (sent, *transcript.observations)),
    "offered": panels._control(DEFENCES["round_latents"]).options,
    "unseen": [defence.name for defence in unseen(header)],
    "std": sorted({round(value, 4) for value in std.flatten().tolist()}),
}))
"""


def test_the_file_that_contributing_shows_is_all_it_takes(tmp_path: Path):
    (code,) = (example for example in EXAMPLES if "split.defences.record" in example)
    (test,) = (example for example in EXAMPLES if "def test_rounded_latents" in example)
    shutil.copytree(ROOT / "splitlab", tmp_path / "splitlab", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "splitlab/split/defences/round_latents.py").write_text(code, encoding="utf-8")
    known = (ROOT / "tests/split/test_defences.py").read_text(encoding="utf-8")
    (tmp_path / "test_defences.py").write_text(f"{known}\n\n{test}", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'tests'}", "SPLITLAB_ROOT": str(tmp_path)}
    made = subprocess.run(
        [sys.executable, "-c", USED], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1]) == {
        "text": "round_latents=0.5",
        "read back": True,
        "label": "rounded to multiples of 0.5",
        "in the report": "round latents 0.5",
        "on the grid": True,
        "offered": [0.0, 0.25, 0.5, 1.0],
        "unseen": ["round_latents"],
        "std": [round(0.5 / 12**0.5, 4)],
    }


def test_headers_name_the_first_defences_whether_on_or_off_and_no_other_that_is_off():
    assert tuple(DEFENCES) != NAMED  # clients apply them in another order
    assert tuple(field.name for field in fields(Defences)) == NAMED
    assert list(recorded(TrainConfig())["defences"]) == list(NAMED)
    assert str(Defences(half=True, hint_noise=0.5, feature_noise=1.0)) == "feature_noise=1 hint_noise=0.5 half"


def test_an_unknown_defence_is_an_error_that_names_the_known_ones():
    for make in (
        lambda: parse(Defences, {"round_latents": 0.5}, where="runs.mine.defences"),
        lambda: read_defences("round_latents=0.5"),
    ):
        with pytest.raises(InputError, match=f"unknown key round_latents; known keys: {', '.join(NAMED)}"):
            make()


@pytest.mark.parametrize("defence", DEFENCES.values(), ids=lambda defence: defence.name)
def test_a_record_is_whole(defence):
    assert not defence.off
    assert set(defence.touches) <= set(OBSERVATION_FIELDS)
    assert all(type(value) is type(defence.off) and value for value in defence.usual)
    assert defence.label.format(defence.usual[0]) != defence.name
    assert not defence.says.endswith(".")
    assert f"{defence.name}: {defence.says}" in Defences.__doc__


def test_places_are_told_apart():
    places = [defence.place for defence in DEFENCES.values()]
    assert places == sorted(set(places))


def test_what_an_attacker_cannot_see_through_is_named():
    mixed = Defences(key_mixing=4, feature_noise=1.0, fixed_noise=0.1, half=True)
    assert [defence.name for defence in unseen(mixed)] == ["key_mixing"]
    assert unseen_variance(mixed) == 0.0  # mixing adds nothing
