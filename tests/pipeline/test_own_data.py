"""Own data through the pipeline of a checkout of its own, pushed: nothing of them is where nobody asked for it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from world import scratch

from splitlab.core.paths import ROOT
from splitlab.params import load_params

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's list of the files"),
]

SECRET = "kvxqz"[::-1]
"""A word of every private prompt; nowhere else, not even here."""

OWN_PLACES = ("runs", "reconstructions", "survey", "updates", "scores", ".cache", "reports/figures", "reports/executed")
"""Where a run leaves what it makes of private data, pictures included; `.cache` has its encodings."""

STAGES = ("record-split", "attack-split", "record-federated", "evaluate-split", "figures")


def data_set(folder: Path) -> dict[str, str]:
    """Write three imagefolders of noise, which nothing else can hold by chance; return their entry."""
    draw = np.random.default_rng(7)
    for split, n in {"private": 12, "public": 8, "heldout": 4}.items():
        (folder / split).mkdir(parents=True)
        rows = ["file_name,conditioning_image_file_name,text"]
        for i in range(n):
            for name in (f"{i}.png", f"{i}-hint.png"):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / split / name)
            rows.append(f"{i}.png,{i}-hint.png,{SECRET if split == 'private' else 'other'} {i}")
        (folder / split / "metadata.csv").write_text("\n".join(rows) + "\n")
    return {split: str(folder / split) for split in ("private", "public", "heldout")}


def own_params(entry: dict[str, str]) -> dict[str, Any]:
    """Return parameters that run everything on the own data alone, in little time."""
    few = {"dataset": "mine", "steps": 2, "batch_size": 4, "record_messages": 2, "eval_samples": 2}
    attacks = [{"attack": "mean_public", "seeds": 1}, {"attack": "closed_form", "seeds": 1}]
    params = load_params()
    params["datasets"]["mine"] = entry
    params["runs"] = {"mine": few | {"scheme": "split"}}
    params["attacks"] = {"mine": attacks}
    params["survey"] |= {"default": {}, "datasets": ["mine"], "accumulate": []}
    cases = [{"model": "latent", "dataset": "mine", "timesteps": [250], "attacks": [{"attack": "timesteps"}]}]
    params["updates"] |= {"cases": cases, "images": 1}
    params["evaluate"] |= {"candidates": 4, "samples": 4}
    return params


def traces(folder: Path) -> Iterator[bytes]:
    """Yield what private images may look like in a file: their own files, their pixels in any usual order and type."""
    for path in sorted((folder / "private").glob("*.png"))[:8]:
        pixels = np.asarray(Image.open(path))
        yield path.read_bytes()
        yield base64.b64encode(path.read_bytes())
        for order in (pixels, pixels.transpose(2, 0, 1)):
            unit = order.astype(np.float32) / np.float32(127.5) - np.float32(1)
            for values in (order, unit, order.astype(np.float32) / np.float32(255), unit.astype(np.float16)):
                yield np.ascontiguousarray(values).tobytes()[:512]


def is_own(name: str) -> bool:
    return name.split("/")[0] in OWN_PLACES or "/".join(name.split("/")[:2]) in OWN_PLACES


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkout`, through which `mine`, beside it, has gone; then pushed, and all is offered to git."""
    root = tmp_path_factory.mktemp("own")
    checkout = scratch.checkout(root / "checkout")
    own = own_params(data_set(root / "mine"))
    for path in (checkout / "params.yaml", *(checkout / "params").glob("*.yaml")):
        YAML().dump({name: own[name] for name in YAML(typ="safe").load(path.read_text())}, path)
    (checkout / "runs/shapes-federated/controlnet").mkdir(parents=True)  # of a run that is not trained here
    (root / "tmp").mkdir()
    commands = ["dvc pull -q data.dvc pretrain", "dvc repro inputs"]
    commands += [f"dvc repro --single-item {stage}" for stage in STAGES]
    log = "".join(succeed(checkout, command) for command in (*commands, "dvc push"))
    (root / "log").write_text(log)
    subprocess.run(["git", "add", "-A"], cwd=checkout, check=True)
    return root


def succeed(checkout: Path, command: str) -> str:
    """Run a command that must succeed; return what it said."""
    ran = scratch.run(checkout, *command.split(), TMPDIR=str(checkout.parent / "tmp"))
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout + ran.stderr


def test_nothing_private_is_anywhere_but_where_runs_put_it(own: Path) -> None:
    shipped = {path.name for path in (ROOT / "dvcstore").rglob("*")}
    looked_for = [*traces(own / "mine"), SECRET.encode()]
    files = [path for folder in ("checkout", "tmp", "dvc", "home of checkout") for path in (own / folder).rglob("*")]
    searched = 0
    for path in files:
        inside = path.is_relative_to(own / "checkout") and is_own(path.relative_to(own / "checkout").as_posix())
        if path.is_file() and not inside and path.name not in shipped:
            content = path.read_bytes()
            assert not any(trace in content for trace in looked_for), path
            searched += 1
    assert searched > 200


def test_the_search_would_find_what_it_looks_for(own: Path) -> None:
    found = [path.read_bytes() for path in (own / "checkout").rglob("*.safetensors")]
    assert any(trace in content for trace in traces(own / "mine") for content in found), "no output holds a pixel"


def test_dvc_keeps_and_pushes_no_output(own: Path) -> None:
    checkout = own / "checkout"
    stores = (checkout / ".dvc/cache", checkout / "dvcstore")
    kept = {path.parent.name + path.name for store in stores for path in store.rglob("*")}
    made = [path for path in checkout.rglob("*") if path.is_file() and is_own(path.relative_to(checkout).as_posix())]
    assert {"truth.safetensors", "transcript.safetensors", "record.json"} <= {path.name for path in made}
    for path in made:
        assert hashlib.md5(path.read_bytes()).hexdigest() not in kept, path
    assert set(scratch.tree(checkout / "dvcstore")) == set(scratch.tree(ROOT / "dvcstore"))


def test_git_is_offered_tables_and_digests_alone(own: Path) -> None:
    changed = scratch.changed(own / "checkout")
    assert not [name for name in changed if is_own(name) or name.startswith("data")], changed
    assert {
        "params.yaml",
        "params/split.yaml",
        "reports/metrics/training.csv",
        "reports/metrics/split_attacks.csv",
    } <= changed
    numbers = re.compile(
        r"reports/metrics/(\w+\.csv|summary\.json)|inputs/data/cost\.json|params\.yaml|params/\w+\.yaml"
    )
    assert all(numbers.fullmatch(name) for name in changed), changed


def test_neither_notebooks_nor_logs_tell_what_the_images_show(own: Path) -> None:
    executed = sorted((own / "checkout/reports/executed").glob("*.ipynb"))
    assert [path.stem for path in executed] == sorted(STAGES)
    for text in [(own / "log").read_text(), *(path.read_text() for path in executed)]:
        assert SECRET not in text
        assert str(own / "mine") not in text
    for path in executed:  # reconstructions and figures are what the user asked to see
        pictures = [
            output
            for cell in json.loads(path.read_text())["cells"]
            for output in cell.get("outputs", ())
            if "image/png" in output.get("data", {})
        ]
        assert path.stem == "figures" or not pictures, path


def test_a_run_that_fails_leaves_the_earlier_one_whole_and_one_that_succeeds_replaces_it(own: Path) -> None:
    checkout, image = own / "checkout", own / "mine/private/0.png"
    assert "didn't change, skipping" in succeed(checkout, "dvc repro --single-item record-split")
    before, content = scratch.tree(checkout / "runs/mine"), image.read_bytes()
    image.write_bytes(content[:100])
    succeed(checkout, "dvc repro inputs")
    stale = succeed(checkout, "dvc status --json record-split attack-split record-federated").splitlines()[0]
    assert set(json.loads(stale)) == {"record-split", "record-federated"}, "the attack reads no private data"
    ran = scratch.run(checkout, "dvc", "repro", "--single-item", "record-split")
    assert ran.returncode != 0
    assert "0.png" in ran.stderr
    assert scratch.tree(checkout / "runs/mine") == before
    image.write_bytes(content)
    succeed(checkout, "dvc repro --force --single-item record-split")
    assert scratch.tree(checkout / "runs/mine") == before, "what was trained before is not trained again"
    shutil.rmtree(checkout / ".cache/runs")
    succeed(checkout, "dvc repro --force --single-item record-split")
    after = scratch.tree(checkout / "runs/mine")
    assert after.keys() == before.keys()
    assert after["record.json"] == before["record.json"] or "randomness" in json.loads(after["record.json"])["privacy"]
