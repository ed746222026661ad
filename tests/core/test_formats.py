"""Files that people bring in place of safetensors are named for what they are, and none of them is unpickled."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from splitlab.core import checkpoint
from splitlab.core.errors import InputError
from splitlab.core.formats import describe_file, file_kind


def torch_saved(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, buffer, **options)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    return buffer.getvalue()


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


GOOD = safetensors_bytes({"weight": torch.zeros(30)}, metadata={"meta": "{}"})

FILES = {
    "torch": (torch_saved(), "weights_only=True"),
    "pickle": (torch_saved(_use_new_zipfile_serialization=False), "weights_only=True"),
    "npz": (npz(weight=np.zeros(3)), r"safetensors\.numpy\.save_file"),
    "npy": (npy(), r"safetensors\.numpy\.save_file"),
    "zip": (zipped("weights.safetensors"), "unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "h5py"),
    "gzip": (gzip.compress(GOOD), "unpack it"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "annex pointer": (b"/annex/objects/SHA256E-s5--00.safetensors\n", "git annex get"),
    "json": (json.dumps({"weight_map": {}}).encode(), "folder it is in"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "download the file itself"),
    "png": (picture("PNG"), "image"),
    "jpeg": (picture("JPEG"), "image"),
    "text": ("läuft nicht\n".encode() * 100, "plain text"),
    "empty": (b"", "download it again"),
    "safetensors": (GOOD[:60], "cut short"),
    "unknown": (bytes(range(128, 256)) * 3, "no kind that is known"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named_and_its_conversion_told(kind: str, tmp_path: Path):
    content, words = FILES[kind]
    path = tmp_path / "gradient.safetensors"
    path.write_bytes(content)
    assert file_kind(path) == kind
    with pytest.raises(InputError, match=rf"gradient\.safetensors: damaged, or not safetensors .*it is .*{words}"):
        checkpoint.load(path)
    assert path.read_bytes() == content


def test_a_good_file_is_told_and_so_is_a_folder(tmp_path: Path):
    (tmp_path / "good").write_bytes(GOOD)
    assert file_kind(tmp_path / "good") == "safetensors"
    assert file_kind(tmp_path) == "folder"
    with pytest.raises(InputError, match="a folder; name a file in it"):
        checkpoint.load(tmp_path)


def test_a_safetensors_header_is_not_taken_for_a_pickle_by_its_length(tmp_path: Path):
    # a header of 640 bytes starts with 0x80 0x02, as a pickle of protocol 2 does; one of 0x8b1f bytes as gzip
    for length in (0x280, 0x8B1F):
        header = b"{" + b" " * (length - 2) + b"}"
        (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + header)
        assert file_kind(tmp_path / "x") == "safetensors"


def test_text_whose_sample_ends_within_a_character_is_text(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"a" * 511 + "ä".encode())
    assert file_kind(tmp_path / "x") == "text"
    assert "plain text" in describe_file(tmp_path / "x")
