import io
import json
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from world import tiny

from splitlab.core.errors import InputError
from splitlab.data import generate
from splitlab.data.image_set import ImageSet, image_set, load, partition


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "private" / "tiny.zip"
    generate.write_split(path, tiny.samples(3))
    return path


@pytest.fixture
def folder(zipped: Path, tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(path)
    return path


def rezip(folder: Path, path: Path) -> Path:
    """Zip a (damaged) folder, so that every fault is tried in both kinds of source."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    return path


@pytest.fixture(params=["folder", "zip"])
def damage(request: pytest.FixtureRequest, folder: Path, tmp_path: Path):
    """Return a function that turns the damaged folder into the source to load."""
    return (lambda: folder) if request.param == "folder" else (lambda: rezip(folder, tmp_path / "damaged.zip"))


def same(one: ImageSet, other: ImageSet) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.hints, other.hints)
        and (one.prompts, one.sources, one.digest) == (other.prompts, other.sources, other.digest)
    )


def test_a_zip_and_its_unpacked_folder_are_the_same_data(zipped: Path, folder: Path):
    assert same(load(zipped), load(folder))


def test_pixels_prompts_and_sources_survive_exactly(zipped: Path):
    written, read = tiny.samples(3), load(zipped)
    for index, sample in enumerate(written):
        expected = torch.from_numpy(sample.image.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1)
        torch.testing.assert_close(read.images[index], expected)
        grey = torch.from_numpy(sample.hint.astype(np.float32) / 127.5 - 1.0)
        torch.testing.assert_close(read.hints[index], grey.expand(3, -1, -1))
    assert read.prompts == tuple(sample.text for sample in written)
    assert read.sources == ("tiny0", "tiny1", "tiny2")


def test_jsonl_metadata_is_read_like_csv(folder: Path):
    expected = load(folder)
    rows = [
        {
            "file_name": f"{i:05d}.png",
            "conditioning_image_file_name": f"{i:05d}_hint.png",
            "text": expected.prompts[i],
            "source": expected.sources[i],
        }
        for i in range(3)
    ]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert same(load(folder), expected)


def test_limit_reads_the_first_samples_only(folder: Path):
    (folder / "00002.png").write_bytes(b"damaged, but behind the limit")
    assert load(folder, limit=2).sources == ("tiny0", "tiny1")


def test_a_missing_image_is_named(folder: Path, damage):
    (folder / "00001_hint.png").unlink()
    with pytest.raises(
        InputError,
        match=r"row 1 \(line 3 of metadata\.csv\): column conditioning_image_file_name: 00001_hint\.png is missing",
    ):
        load(damage())


def test_a_truncated_image_is_named(folder: Path, damage):
    content = (folder / "00001.png").read_bytes()
    (folder / "00001.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"row 1 .*: image 00001\.png cannot be read .*restore or convert it"):
        load(damage())


def test_a_file_that_is_no_image_is_named(folder: Path, damage):
    (folder / "00002.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"image 00002\.png cannot be read"):
        load(damage())


def test_an_image_of_another_size_is_named(folder: Path, damage):
    for name in ("00001.png", "00001_hint.png"):
        Image.new("RGB", (20, 16)).save(folder / name)
    with pytest.raises(
        InputError,
        match=r"row 1 .*: image 00001\.png is 20x16 pixels, expected 16x16; let the data set's entry say size, resize",
    ):
        load(damage())


def test_a_size_that_is_asked_for_is_held_to(zipped: Path):
    assert load(zipped, size=16).size == 16
    with pytest.raises(InputError, match=r"tiny\.zip: row 0 .*: image 00000\.png is 16x16 pixels, expected 32x32"):
        load(zipped, size=32)


def test_a_hint_must_have_the_image_size_too(folder: Path, damage):
    Image.new("L", (8, 8)).save(folder / "00000_hint.png")
    with pytest.raises(
        InputError, match=r"hint 00000_hint\.png is 8x8 pixels, image 00000\.png 16x16; give both one size"
    ):
        load(damage())


def test_missing_columns_are_named(folder: Path, damage):
    (folder / "metadata.csv").write_text("name,text\n00000.png,red\n")
    with pytest.raises(InputError, match=r"metadata\.csv: the first line, 'name,text', names no column file_name or"):
        load(damage())


def test_a_row_cut_short_is_named(folder: Path, damage):
    table = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join([table[0], table[1], "00001.png,00001_hint.png"]))
    with pytest.raises(InputError, match=r"metadata\.csv: row 1 \(line 3\) has 2 fields, fewer than the header's 4"):
        load(damage())


def test_an_empty_data_set_is_refused(folder: Path, damage):
    (folder / "metadata.csv").write_text("file_name,conditioning_image_file_name,text\n")
    with pytest.raises(InputError, match="the data set is empty"):
        load(damage())


def test_no_metadata_at_all_is_refused(folder: Path, damage):
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(
        InputError, match=r"no pictures and no metadata \(it is empty\); expected metadata\.csv or metadata\.jsonl with"
    ):
        load(damage())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", b'{"file_name": "00000.png", '),
        ("metadata.jsonl", b'"a string"'),
        ("metadata.csv", b"\xff\xfe\x00 not text"),
    ],
)
def test_metadata_that_cannot_be_parsed_is_named(folder: Path, damage, name: str, content: bytes):
    (folder / "metadata.csv").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: (line 1 is no JSON|it is UTF-16 or UTF-32; save it as UTF-8)"):
        load(damage())


def test_a_zip_with_damaged_bytes_is_named(zipped: Path):
    content = bytearray(zipped.read_bytes())
    content[content.find(b"file_name") if b"file_name" in content else 60] ^= 0xFF  # within the first member's data
    zipped.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"tiny\.zip: .* cannot be read"):
        load(zipped)


def test_a_file_that_is_no_zip_is_refused(tmp_path: Path):
    (tmp_path / "bad.zip").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"bad\.zip: not a zip file .*dvc pull"):
        load(tmp_path / "bad.zip")


def test_a_missing_path_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere\.zip: no such data set"):
        load(tmp_path / "nowhere.zip")


def hub_rows(columns: dict) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, 0, 255))


def test_the_hub_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        features = datasets.Features(
            {"image": datasets.Image(), "conditioning_image": datasets.Image(), "text": datasets.Value("string")}
        )
        rows = {"image": [picture(0), picture(255)], "conditioning_image": [picture(1)] * 2, "text": ["a", "b"]}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = load("hub:someone/fill50k@public")
    assert asked == [("someone/fill50k", "public")]
    assert read.prompts == ("a", "b")
    assert read.images[:, 0, 0, 0].tolist() == [-1.0, 1.0]
    load("hub:someone/fill50k")
    assert asked[1] == ("someone/fill50k", "train")


def test_hub_columns_that_hold_no_images_are_refused(monkeypatch: pytest.MonkeyPatch):
    rows = hub_rows({"image": ["x.png"], "conditioning_image": ["y.png"], "text": ["z"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    with pytest.raises(InputError, match=r"hub:a/b: row 0: column image: it holds no image, but 'x\.png'"):
        load("hub:a/b")
    with pytest.raises(
        InputError, match="hub:a/b: no column img among image, conditioning_image, text; say which holds"
    ):
        load("hub:a/b", columns={"image": "img"})


def test_a_hub_that_cannot_be_reached_is_an_input_error(monkeypatch: pytest.MonkeyPatch):
    def unreachable(name: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"hub:a/b@x: cannot be loaded \(no network\); check the name"):
        load("hub:a/b@x")


def test_datasets_imagefolder_opens_a_generated_zip_with_the_three_columns(zipped: Path, tmp_path: Path):
    rows = datasets.load_dataset(
        "imagefolder", data_files={"train": str(zipped)}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert {"image", "conditioning_image", "text"} <= set(rows.column_names)
    row, expected = rows[0], tiny.samples(1)[0]
    assert np.array_equal(np.asarray(row["image"]), expected.image)
    assert np.array_equal(np.asarray(row["conditioning_image"]), expected.hint)
    assert row["text"] == expected.text


def test_the_digest_sees_every_pixel_and_prompt_and_nothing_else():
    images, hints = np.zeros((2, 4, 4, 3), np.uint8), np.ones((2, 4, 4, 3), np.uint8)
    plain = image_set(images, hints, ["a", "b"]).digest
    other_images, other_hints = images.copy(), hints.copy()
    other_images[1, 3, 3, 2], other_hints[1, 3, 3, 2] = 1, 2
    changed = [
        image_set(other_images, hints, ["a", "b"]).digest,
        image_set(images, other_hints, ["a", "b"]).digest,
        image_set(images, hints, ["a", "c"]).digest,
        image_set(images, hints, ["b", "a"]).digest,
    ]
    assert len({plain, *changed}) == 5
    assert image_set(images.copy(), hints, ["a", "b"], ["s", "t"]).digest == plain


def test_a_subset_is_what_loading_only_those_samples_gives():
    whole = tiny.small_set(4)
    part = whole.subset([2, 0])
    assert torch.equal(part.images, whole.images[[2, 0]])
    assert part.prompts == (whole.prompts[2], whole.prompts[0])
    assert part.sources == ("tiny2", "tiny0")
    assert whole.subset(range(4)).digest == whole.digest


def test_image_hashes_find_a_shared_image_and_only_that():
    one, other = tiny.small_set(4), tiny.small_set(4, seed=9)
    assert not set(one.image_hashes()) & set(other.image_hashes())
    mixed = image_set(
        *(np.concatenate([a[:1], b[1:]]) for a, b in ((pixels(one), pixels(other)), (pixels(one), pixels(other)))),
        other.prompts,
    )
    assert [place for place, content in enumerate(mixed.image_hashes()) if content in one.image_hashes()] == [0]


def pixels(data: ImageSet) -> np.ndarray:
    return ((data.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@pytest.mark.parametrize(("n", "n_clients"), [(1, 1), (10, 3), (12, 12), (1000, 7), (17, 4)])
def test_partition_shares_everything_once_and_nearly_evenly(n: int, n_clients: int):
    shares = partition(n, n_clients)
    assert [i for share in shares for i in share] == list(range(n))
    sizes = [len(share) for share in shares]
    assert len(sizes) == n_clients
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("n", "n_clients"), [(3, 4), (3, 0), (0, 1)])
def test_partition_refuses_what_cannot_be_shared(n: int, n_clients: int):
    with pytest.raises(InputError, match=f"cannot share {n} samples among {n_clients} clients"):
        partition(n, n_clients)


def test_grey_and_palette_images_become_rgb(folder: Path):
    Image.new("L", (16, 16), 255).save(folder / "00000.png")
    buffer = io.BytesIO()
    Image.new("P", (16, 16)).save(buffer, "PNG")
    (folder / "00001.png").write_bytes(buffer.getvalue())
    read = load(folder)
    assert read.images.shape == (3, 3, 16, 16)
    assert (read.images[0] == 1.0).all()
