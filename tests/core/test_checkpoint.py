import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn
from world import tiny

from splitlab.core import checkpoint, storage
from splitlab.core.errors import InputError

TENSORS = {"a": torch.arange(3), "b/c": torch.randn(2, 2, generator=tiny.draw()).t()}


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path):
    checkpoint.save(tmp_path / "new" / "x.safetensors", TENSORS, {"step": 3, "names": ["ᾱ", None]})
    tensors, meta = checkpoint.load(tmp_path / "new" / "x.safetensors")
    assert meta == {"step": 3, "names": ["ᾱ", None]}
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_a_full_disk_leaves_the_earlier_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, TENSORS, {"step": 1})
    before = path.read_bytes()

    def full(tensors: dict, target: Path, metadata: dict) -> None:
        target.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"x\.safetensors: cannot be written .*No space left.*free some disk space"):
        checkpoint.save(path, TENSORS, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        checkpoint.save(tmp_path / "file" / "x.safetensors", TENSORS, {})


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_damaged_file_says_so(tmp_path: Path, keep: int):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"x\.safetensors: damaged, or not safetensors .*it is"):
        checkpoint.load(path)


def test_a_missing_file_says_so(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.safetensors: no such file"):
        checkpoint.load(tmp_path / "gone.safetensors")


def net_and_optimizer(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(torch.randn(5, 3, generator=tiny.draw(step))).square().mean().backward()
        optimizer.step()


def test_training_state_restores_weights_and_optimizer_bit_for_bit(tmp_path: Path):
    net, optimizer = net_and_optimizer(0)
    train(net, optimizer, range(3))
    state = checkpoint.training_state({"net": net}, {"adam": optimizer})
    checkpoint.save(tmp_path / "s", state, {})
    train(net, optimizer, range(3, 6))

    again, again_optimizer = net_and_optimizer(1)
    checkpoint.restore_training_state(checkpoint.load(tmp_path / "s")[0], {"net": again}, {"adam": again_optimizer})
    train(again, again_optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_training_state_is_a_copy():
    net, optimizer = net_and_optimizer(0)
    train(net, optimizer, range(1))
    state = checkpoint.training_state({"net": net}, {"adam": optimizer})
    before = {name: value.clone() for name, value in state.items()}
    train(net, optimizer, range(1, 3))
    assert all(torch.equal(before[name], value) for name, value in state.items())
    checkpoint.restore_training_state(state, {"net": net}, {"adam": optimizer})
    train(net, optimizer, range(1, 3))  # must not train the saved tensors in place either
    assert all(torch.equal(before[name], value) for name, value in state.items())


@pytest.mark.parametrize(("private", "mode"), [(False, 0o640), (True, 0o600)])
def test_private_files_are_their_owners_alone_and_others_follow_the_umask(tmp_path: Path, private: bool, mode: int):
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "x.safetensors", TENSORS, {}, private=private)
        checkpoint.save_json(tmp_path / "x.json", {"a": 1}, private=private)
    finally:
        os.umask(before)
    files = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x.safetensors", "x.json")]
    assert files == [mode, mode]


def test_a_private_file_is_closed_to_others_while_it_is_written(tmp_path: Path):
    with storage.whole_file(tmp_path / "x", private=True) as partial:
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600
        partial.write_text("secret")
