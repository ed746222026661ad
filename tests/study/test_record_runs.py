"""Runs are trained once, each for itself; attacks follow from what was sent; what is kept is handed out again."""

import json
import shutil
from pathlib import Path

import pytest
from world import tiny

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.split import train as training
from splitlab.split.config import AttackSpec
from splitlab.study import record_runs as recording
from splitlab.study import survey_attack
from splitlab.study.kept import PACKAGE, code_digest, file_digest, hand_out
from splitlab.study.record_runs import record_runs
from splitlab.study.survey_attack import attack_runs

FEW = {"dataset": "shapes", "scheme": "split", "steps": 2, "batch_size": 4, "record_messages": 1, "eval_samples": 2}
RUNS = {"a": FEW | {"published_key": 0}, "b": FEW}
"""`b` draws from a secret key: it would be another run if it were trained again."""


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(dataset: str, split: str) -> ImageSet:
    return tiny.small_set(8, seed={"private": 1, "heldout": 2, "public": 3}[split])


def test_what_was_trained_is_not_trained_again_and_a_further_run_is(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def counted(run: str, *args: object, **options: object) -> object:
        trained.append(run)
        return training.train(run, *args, **options)

    monkeypatch.setattr(recording, "train", counted)
    places = {"out": tmp_path / "runs", "cache": tmp_path / "cache"}
    assert record_runs({"b": RUNS["b"]}, base, load, **places) == ["b"]
    before = content(tmp_path / "runs/b")
    shutil.rmtree(tmp_path / "runs")
    assert record_runs(RUNS, base, load, **places) == ["a", "b"]
    assert trained == ["b", "a"]
    assert content(tmp_path / "runs/b") == before
    sent = json.loads((tmp_path / "runs/sent.json").read_text())
    assert sent["a"]["transcript.safetensors"] == file_digest(tmp_path / "runs/a/transcript.safetensors")
    assert {tuple(files) for files in sent.values()} == {("server.safetensors", "transcript.safetensors")}
    monkeypatch.setattr(recording, "code_digest", lambda *rooms: "other code")
    record_runs({"a": RUNS["a"]}, base, load, **places)
    assert trained == ["b", "a", "a"]


def test_a_run_that_fails_is_named_after_the_others_have_ended(base: Base, tmp_path: Path) -> None:
    runs = {"broken": FEW | {"batch_size": 1000}, "a": RUNS["a"]}
    with pytest.raises(InputError, match=r"^run broken: .*batch_size"):
        record_runs(runs, base, load, out=tmp_path / "runs", cache=tmp_path / "cache")
    assert (tmp_path / "runs/a/record.json").exists()
    assert not (tmp_path / "runs/broken").exists()
    assert not (tmp_path / "runs/sent.json").exists()


def test_files_of_others_in_the_place_of_a_run_stay_and_nothing_is_trained(base: Base, tmp_path: Path) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"run a: .*mine\.txt, which splitlab did not write"):
        record_runs({"a": RUNS["a"]}, base, load, out=tmp_path / "runs", cache=tmp_path / "cache")
    assert content(tmp_path / "runs/a") == {"mine.txt": b"mine"}
    assert not (tmp_path / "cache/runs").exists()


def test_attacks_that_ended_are_handed_out_again(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_runs({"a": RUNS["a"]}, base, load, out=tmp_path / "runs", cache=tmp_path / "cache")
    options = {"runs": tmp_path / "runs", "out": tmp_path / "out", "cache": tmp_path / "cache"}
    specs = [AttackSpec("mean_public", seeds=1), AttackSpec("closed_form", seeds=1, ignore=("noisy_latents",))]
    attack_runs({"a": specs}, base, load, **options)
    before = content(tmp_path / "out/a")
    assert [name for name in before if name.endswith((".safetensors", ".refused.json"))]
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(survey_attack, "attack_and_save", lambda *_, **__: pytest.fail("it ran again"))
    attack_runs({"a": specs}, base, load, **options)
    assert content(tmp_path / "out/a") == before
    with pytest.raises(pytest.fail.Exception, match="it ran again"):
        attack_runs({"a": [AttackSpec("mean_public", seeds=2)]}, base, load, **options)


def test_the_code_of_a_room_and_of_those_below_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = code_digest("split")
    assert whole == code_digest("split") != code_digest("federated")
    copy = tmp_path / "splitlab"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("splitlab.study.kept.PACKAGE", copy)
    for changed, counts in (("dp/sample.py", False), ("split/client.py", True), ("core/seeds.py", True)):
        code_digest.cache_clear()
        before = code_digest("split")
        (copy / changed).write_text((copy / changed).read_text() + "\n")
        code_digest.cache_clear()
        assert (code_digest("split") != before) == counts, changed
    code_digest.cache_clear()


def test_what_is_handed_out_replaces_a_file_and_leaves_the_kept_one(tmp_path: Path) -> None:
    (tmp_path / "kept/deep").mkdir(parents=True)
    (tmp_path / "kept/deep/a").write_text("kept")
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/deep/a").write_text("older")
    hand_out(tmp_path / "kept", tmp_path / "out")
    assert (tmp_path / "out/deep/a").read_text() == "kept"
    (tmp_path / "out/deep/a").unlink()
    assert (tmp_path / "kept/deep/a").read_text() == "kept"
