"""Whole or not at all, and never in place of what splitlab did not write."""

import ast
import multiprocessing
import os
import re
import resource
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from splitlab.core import checkpoint, storage
from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT

FORK = multiprocessing.get_context("fork")  # another process at once: importing torch anew takes seconds


def write(path: Path | str, text: str = "new", maker: str = "train") -> None:
    """Write an output of two files, as a run would."""
    with storage.whole_folder(path, maker) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text(text)
        (folder / "record.json").write_text("{}")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(path: Path | str, says: str, maker: str = "train") -> None:
    """Assert that nothing happens within the block, nor to what is there."""
    with pytest.raises(InputError, match=says), storage.whole_folder(path, maker):
        pytest.fail("the work began")


def test_an_output_appears_whole_and_the_next_takes_its_place(tmp_path: Path):
    with storage.whole_folder(tmp_path / "a" / "out", "train") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert entries(tmp_path / "a") == ["out"]
    write(tmp_path / "a" / "out", "second")
    assert sorted(everything(tmp_path / "a" / "out")) == [".splitlab.json", "part/weights", "record.json"]
    assert entries(tmp_path / "a") == ["out"]


def test_an_error_within_leaves_the_earlier_output(tmp_path: Path):
    write(tmp_path / "out")
    before = everything(tmp_path)

    def fails() -> None:
        with storage.whole_folder(tmp_path / "out", "train") as folder:
            (folder / "half").write_text("of it")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "part/notes.txt", "deeper/notes.txt", ".hidden"])
@pytest.mark.parametrize("own", [True, False])
def test_a_folder_with_other_files_is_refused_before_the_work_begins(tmp_path: Path, name: str, own: bool):
    if own:
        write(tmp_path / "out")
    note = tmp_path / "out" / name
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text("three years of work")
    before = everything(tmp_path)
    refused(tmp_path / "out", f"{name}.* splitlab .*name another folder for the output, or move this one")
    assert everything(tmp_path) == before


def test_a_file_of_ours_that_was_changed_is_refused(tmp_path: Path):
    write(tmp_path / "out")
    (tmp_path / "out" / "part" / "weights").write_text("trained further by hand")
    refused(tmp_path / "out", "part/weights was added or changed after splitlab wrote")


def test_a_link_to_a_folder_inside_is_not_followed_and_refused(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("work")
    write(tmp_path / "out")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "out", "link was added")
    assert (tmp_path / "elsewhere" / "notes.txt").exists()


def test_the_output_of_another_maker_is_refused(tmp_path: Path):
    write(tmp_path / "out", maker="finetune")
    refused(tmp_path / "out", "it is an output of finetune; it stays")


@pytest.mark.parametrize("marker", [None, '{"maker": "train", "sha256": {}}', '{"maker": "Train", "sha256": {}}', "{"])
def test_names_as_splitlab_gives_them_do_not_make_a_folder_its_own(tmp_path: Path, marker: str | None):
    write(tmp_path / "out", "theirs")
    (tmp_path / "out" / storage.MARKER).unlink()
    if marker:
        (tmp_path / "out" / storage.MARKER).write_text(marker)
    before = everything(tmp_path)
    refused(tmp_path / "out", "(part/weights|an output of Train).*it stays as it is")
    assert everything(tmp_path) == before


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "out")
    closed = tmp_path / "out" / "closed"
    closed.mkdir()
    (closed / "notes.txt").write_text("work")
    listed = os.scandir

    def scandir(path: str | Path | int):
        if not isinstance(path, int) and Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(tmp_path / "out", "closed.*permission is missing")
    assert (closed / "notes.txt").read_text() == "work"


def test_a_pipeline_that_took_the_files_away_and_left_the_marker_is_no_hindrance(tmp_path: Path):
    write(tmp_path / "out")
    (tmp_path / "out" / "part" / "weights").unlink()
    (tmp_path / "out" / "record.json").unlink()
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "part" / "weights").read_text() == "new"


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"maker": "train", "sha256": 3}', "[" * 100_000, "\0"])
def test_a_damaged_marker_vouches_for_nothing(tmp_path: Path, marker: str):
    write(tmp_path / "out")
    (tmp_path / "out" / storage.MARKER).write_text(marker)
    (tmp_path / "out" / "notes.txt").write_text("work")
    refused(tmp_path / "out", "which splitlab did not write")


def test_an_empty_folder_is_filled_and_stays_as_closed_as_it_was(tmp_path: Path):
    (tmp_path / "out").mkdir(mode=0o700)
    write(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_a_file_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "out").write_text("work")
    refused(tmp_path / "out", "this is a file, and it stays; name a folder")
    refused(tmp_path / "out" / "deeper", "a part of its path is a file")
    assert (tmp_path / "out").read_text() == "work"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path):
    (tmp_path / "big disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big disk")
    write(tmp_path / "out")
    write(tmp_path / "out", "again")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "big disk" / "part" / "weights").read_text() == "again"


def test_a_link_in_a_circle_is_refused(tmp_path: Path):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    refused(tmp_path / "out", "out: .*give another|links lead in a circle")


def test_paths_with_a_slash_behind_from_here_or_from_home_name_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in (f"{tmp_path}/slash/", "relative", "../beside/", "~/at home"):
        write(path)
    assert entries(tmp_path) == ["beside", "here", "home", "slash"]
    assert entries(tmp_path / "here") == ["relative"]
    assert entries(tmp_path / "home") == ["at home"]


def test_home_checkout_working_directory_and_what_they_lie_in_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "home" / "work").mkdir(parents=True)  # all empty: nothing in them would hold anybody back
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home" / "work")
    for path in ("~", tmp_path / "home", tmp_path, "/"):
        refused(path, "the home is here, and it stays")
    for path in (".", ""):
        refused(path, r"^\.: the working directory is here")
    refused(ROOT, "the checkout is here")


def test_what_is_read_may_not_lie_in_what_is_replaced(tmp_path: Path):
    apart = {"cache": tmp_path / "out" / "cache"}
    with pytest.raises(InputError, match=r"cache \(.*\) lies in the folder to be written; name a place outside"):
        storage.whole_folder(tmp_path / "out", "train", apart=apart).__enter__()
    assert entries(tmp_path) == []


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    refused(tmp_path / "out", "mount point, which cannot be replaced whole; name a folder in it")


@pytest.mark.parametrize(
    ("name", "says"), [("x" * 300, "the name is too long"), ("a\0b", "nothing can have this name")]
)
def test_names_that_no_system_takes_are_refused(tmp_path: Path, name: str, says: str):
    refused(tmp_path / name, says)
    with pytest.raises(InputError, match=r"give"):
        checkpoint.save_json(tmp_path / name, {})
    with pytest.raises(InputError, match=r"give"), storage.alone(tmp_path / name, tmp_path / name, "a run"):
        pytest.fail("there is no such lock")
    assert entries(tmp_path) == []


def test_the_longest_name_is_written(tmp_path: Path):
    write(tmp_path / ("x" * 255))
    checkpoint.save_json(tmp_path / ("y" * 255), {})
    assert entries(tmp_path) == ["x" * 255, "y" * 255]


def test_what_others_put_into_the_folder_meanwhile_is_kept_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path / "out", "old")
    with storage.whole_folder(tmp_path / "out", "train") as folder:
        (folder / "x").write_text("hours of work")
        (tmp_path / "out" / "notes.txt").write_text("theirs")
        (tmp_path / "out" / "part" / "weights").write_text("changed")
    assert (tmp_path / "out" / "x").read_text() == "hours of work"
    (kept,) = (path for path in tmp_path.iterdir() if path.name != "out")
    assert everything(kept) | {storage.MARKER: b""} == {
        "notes.txt": b"theirs",
        "part/weights": b"changed",
        storage.MARKER: b"",
    }
    assert f"notes.txt, part/weights: added or changed during the run, now in {kept}" in capsys.readouterr().out


def test_what_other_tools_leave_everywhere_goes_on_in_the_new_folder(tmp_path: Path):
    write(tmp_path / "out")
    (tmp_path / "out" / ".gitignore").write_text("/part")
    (tmp_path / "out" / "part" / ".DS_Store").write_text("")
    write(tmp_path / "out", "new")
    assert sorted(everything(tmp_path / "out")) == [
        ".gitignore",
        ".splitlab.json",
        "part/.DS_Store",
        "part/weights",
        "record.json",
    ]
    assert entries(tmp_path) == ["out"]


def test_what_other_tools_leave_where_nothing_new_is_written_is_kept_beside_it(tmp_path: Path):
    write(tmp_path / "out")
    (tmp_path / "out" / "mine").mkdir()
    (tmp_path / "out" / "mine" / ".gitignore").write_text("written by hand")
    write(tmp_path / "out", "new")
    assert "written by hand" in {path.read_text() for path in tmp_path.rglob(".gitignore")}


def test_discard_removes_what_was_written_and_nothing_else(tmp_path: Path):
    write(tmp_path / "out", maker="finetune")
    (tmp_path / "out" / "notes.txt").write_text("work")
    with pytest.raises(InputError, match=r"notes\.txt"):
        storage.discard(tmp_path / "out", "finetune")
    (tmp_path / "out" / "notes.txt").unlink()
    storage.discard(tmp_path / "out", "finetune")
    assert entries(tmp_path) == []


def child(work: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    """Start `work` in a process of its own, with a pipe to it."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=work, args=(there,), daemon=True)
    process.start()
    there.close()
    return process, here


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[BaseProcess, Connection]]:
    """Another process that is at work on `tmp_path`/out until it is told to end."""

    def hold(pipe: Connection) -> None:
        with storage.whole_folder(tmp_path / "out", "train") as folder:
            (folder / "half").write_text("of it")
            pipe.send("working")
            pipe.recv()

    process, pipe = child(hold)
    assert pipe.recv() == "working"
    yield process, pipe
    process.kill()
    process.join()


def test_the_second_of_two_runs_is_told_and_harms_nothing(tmp_path: Path, holder: tuple[BaseProcess, Connection]):
    process, pipe = holder
    refused(tmp_path / "out", "a run that writes it is in progress; wait until it has ended, or give another name")
    pipe.send("end")
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "out" / "half").read_text() == "of it"
    assert entries(tmp_path) == ["out"]


def test_a_killed_process_leaves_no_lock_that_holds(tmp_path: Path, holder: tuple[BaseProcess, Connection]):
    holder[0].kill()
    holder[0].join()
    write(tmp_path / "out")
    assert entries(tmp_path) == ["out"]
    assert "half" not in everything(tmp_path / "out")


def test_two_threads_are_as_two_processes(tmp_path: Path):
    said = []

    def second() -> None:
        try:
            write(tmp_path / "out")
        except InputError as error:
            said.append(str(error))

    with storage.whole_folder(tmp_path / "out", "train") as folder:
        (folder / "x").write_text("first")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert "in progress" in said[0]


def test_an_output_that_a_killed_process_had_moved_aside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "out", "first")
    (tmp_path / "notes.txt").write_text("")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "second")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyError), storage.whole_folder(tmp_path / "out", "train"):
        raise KeyError
    assert (tmp_path / "out" / "part" / "weights").read_text() == "first"
    assert entries(tmp_path) == ["notes.txt", "out"]


def test_what_a_killed_process_left_half_written_goes_after_a_day(tmp_path: Path):
    names = (f".partial-{'a' * 16}.file", f".partial-{'b' * 16}.file", f".partial-{'c' * 16}")
    stale, fresh, other = (tmp_path / name for name in names)
    for path in (stale, fresh, other):
        path.write_text("half of it")
    for path in (stale, other):
        os.utime(path, (0, 0))
    checkpoint.save_json(tmp_path / "x.json", {})
    assert entries(tmp_path) == [fresh.name, other.name, "x.json"]


TENSORS = {"weights": torch.arange(100_000)}


def errors_of(prepare: Callable[[], None], *writes: Callable[[], None]) -> list[str]:
    """Return what each write says, in a process of its own that was prepared for it; "written" if nothing."""

    def work(pipe: Connection) -> None:
        prepare()
        for write in writes:
            try:
                write()
                pipe.send("written")
            except InputError as error:
                pipe.send(str(error))

    process, pipe = child(work)
    said = [pipe.recv() for _ in writes]
    process.join()
    return said


def fill(out: Path, size: int) -> None:
    with storage.whole_folder(out, "train") as folder, storage.writing(folder):
        (folder / "x").write_bytes(bytes(size))


def test_a_write_that_the_system_stops_leaves_the_earlier_files_and_no_rubbish(tmp_path: Path):
    checkpoint.save(tmp_path / "x.safetensors", TENSORS, {})
    checkpoint.save_json(tmp_path / "x.json", {"a": 1})
    write(tmp_path / "out")
    before = everything(tmp_path)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    said = errors_of(
        limit,
        lambda: checkpoint.save(tmp_path / "x.safetensors", TENSORS, {}),
        lambda: checkpoint.save_json(tmp_path / "x.json", {"long": "x" * 100_000}),
        lambda: fill(tmp_path / "out", 100_000),
    )
    assert all("cannot be written" in words and "a file may not be that large here" in words for words in said)
    assert said[2].startswith(f"{tmp_path / 'out'}: cannot be written")  # not where it was in the making
    assert everything(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB; only the system's administrator may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_error_and_leaves_everything(small_disk: Path):
    checkpoint.save_json(small_disk / "x.json", {"a": 1})
    write(small_disk / "out")
    before = everything(small_disk)
    full = "cannot be written .*the disk is full: free some disk space and run again; what was there before is intact"
    with pytest.raises(InputError, match=full):
        checkpoint.save(small_disk / "x.safetensors", TENSORS, {})
    with pytest.raises(InputError, match=full):
        checkpoint.save_json(small_disk / "x.json", {"long": "x" * 300_000})
    with pytest.raises(InputError, match=full):
        fill(small_disk / "out", 300_000)
    assert everything(small_disk) == before


def test_a_disk_that_is_read_only_is_one_error(small_disk: Path):
    checkpoint.save_json(small_disk / "x.json", {"a": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for path in (small_disk / "x.json", small_disk / "deeper" / "x.json"):
        with pytest.raises(InputError, match="the disk is read-only: name another place; what was there before is"):
            checkpoint.save_json(path, {})
    refused(small_disk / "out", "the disk is read-only")
    assert (small_disk / "x.json").read_text() == '{\n "a": 1\n}\n'


def test_a_folder_without_permission_is_one_error(tmp_path: Path):
    (tmp_path / "closed" / "empty").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o555)

    def somebody() -> None:  # where these tests run as root, whom no permission stops
        os.chdir(tmp_path / "closed")
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    said = errors_of(
        somebody,
        lambda: checkpoint.save_json(Path("x.json"), {}),
        lambda: checkpoint.save(Path("x.safetensors"), TENSORS, {}),
        lambda: write("out"),
        lambda: write("empty"),
    )
    assert all("permission is missing" in words and "name a place that you may write to" in words for words in said)
    assert entries(tmp_path / "closed") == ["empty"]


WRITERS = re.compile(
    r"(^|\.)(write_bytes|to_csv|to_parquet|to_json|savefig|imsave|save_file|save_pretrained|savez\w*|unlink|rename|rmdir)$"
    r"|^shutil\.|^os\.(replace|rename|remove|unlink|makedirs)$|(?<!storage)\.write_text$|^torch\.save$"
)

ALLOWED = {
    "report/figures/style.py": {"figure.savefig"},  # these write to what `whole_file` gave them
    "core/checkpoint.py": {"save_file", "partial.write_text"},
    "privacy/draws.py": {
        "partial.write_bytes",
        "state.unlink",
        "path.unlink",
    },  # the checkpoint and key of a run that has ended
    "data/generate.py": {"zipfile.ZipFile"},
    "core/tables.py": {"content.to_csv"},
    "dp/conditioning.py": {"embedder.save_pretrained", "embedder.text_encoder.save_pretrained"},  # or `whole_folder`
    "dp/finetune.py": {"state.model.unet.save_pretrained"},
    "diffusion/pretrain.py": {"models.save_pretrained"},
    "split/train.py": {"controlnet.save_pretrained"},
    "split/remote/trainer.py": {"self._model.eval().save_pretrained"},
    "split/remote/keys.py": {"partial.write_bytes"},  # in `whole_file`
    "study/kept.py": {"target.unlink", "shutil.copy2"},  # a stage's own output, put anew where the same was made before
    "study/record_runs.py": {"shutil.copytree", "shutil.ignore_patterns"},  # into what `whole_folder` gave
    "doctor.py": {"shutil.which", "shutil.disk_usage"},  # these only look
}


def test_every_write_and_every_removal_is_storages_or_known_here():
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "splitlab").rglob("*.py")):
        name = path.relative_to(ROOT / "splitlab").as_posix()
        for call in ast.walk(ast.parse(path.read_text())) if name != "core/storage.py" else ():
            if isinstance(call, ast.Call):
                called = ast.unparse(call.func)
                modes = {str(word.value)[:1] for word in call.args if isinstance(word, ast.Constant)}
                opens = called.rpartition(".")[2] in ("open", "ZipFile") and modes & {"w", "a", "x"}
                if opens or WRITERS.search(called):
                    found.setdefault(name, set()).add(called)
    assert found == ALLOWED
