"""Folders, zips and Parquet files as people have them, read by options alone."""

import csv
import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from world import tiny

from splitlab.core.errors import InputError
from splitlab.data.annotators import canny
from splitlab.data.image_set import ImageSet, _to_uint8, load

N = 4
DATA = tiny.small_set(N)
CAPTIONS = [f"a thing, number {i}" for i in range(N)]


def picture(index: int, kind: str = "images") -> Image.Image:
    return Image.fromarray(_to_uint8(getattr(DATA, kind))[index])


def save(path: Path, index: int, kind: str = "images") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(index, kind).save(path)
    return path.name


def table(folder: Path, rows: list[dict], name: str = "metadata.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def imagefolder(folder: Path, image: str = "file_name", hint: str = "conditioning_image_file_name") -> Path:
    rows = []
    for i in range(N):
        rows.append({image: f"images/{i}.png", hint: f"edges/{i}.png", "text": CAPTIONS[i]})
        save(folder / "images" / f"{i}.png", i)
        save(folder / "edges" / f"{i}.png", i, "hints")
    return table(folder, rows)


def fill50k(folder: Path) -> Path:
    rows = []
    for i in range(N):
        rows.append({"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": CAPTIONS[i]})
        save(folder / "target" / f"{i}.png", i)
        save(folder / "source" / f"{i}.png", i, "hints")
    return table(folder, rows, "prompt.json")


def sidecars(folder: Path) -> Path:
    for i in range(N):
        save(folder / f"{i}.PNG", i)
        (folder / f"{i}.txt").write_text(f"\ufeff{CAPTIONS[i]}\r\n", encoding="utf-8")
    return folder


def classes(folder: Path) -> Path:
    for i in range(N):
        save(folder / ("cat", "dog")[i // 2] / f"{i}.png", i)
    return folder


FEATURES = datasets.Features(
    {"img": datasets.Image(), "hint": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
)


def rows_of_the_hub() -> datasets.Dataset:
    columns = {"img": [picture(i) for i in range(N)], "hint": [picture(i, "hints") for i in range(N)]}
    return datasets.Dataset.from_dict(columns | {"label": [i // 2 for i in range(N)]}, features=FEATURES)


def parquet(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of_the_hub()
    for part in range(2):
        rows.select(range(part * 2, part * 2 + 2)).to_parquet(str(folder / f"train-0000{part}-of-00002.parquet"))
    return folder


HUB = {"columns": {"image": "img", "conditioning_image": "hint"}, "prompts": "a {label}"}
LABELS = ("a cat", "a cat", "a dog", "a dog")
LAYOUTS: dict[str, tuple[Callable[[Path], Path], dict, tuple[str, ...], bool]] = {
    "imagefolder": (imagefolder, {}, tuple(CAPTIONS), True),
    "imagefolder, plain columns": (lambda f: imagefolder(f, "image", "conditioning_image"), {}, tuple(CAPTIONS), True),
    "imagefolder, own columns": (
        lambda f: imagefolder(f, "picture", "outline"),
        {"columns": {"image": "picture", "conditioning_image": "outline"}},
        tuple(CAPTIONS),
        True,
    ),
    "fill50k": (fill50k, {}, tuple(CAPTIONS), True),
    "sidecars": (sidecars, {}, tuple(CAPTIONS), False),
    "classes": (classes, {"prompts": "a {label}"}, LABELS, False),
    "parquet": (parquet, HUB, LABELS, True),
}


def packed(folder: Path, path: Path, *, top: str = "", junk: bool = False) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, top + file.relative_to(folder).as_posix())
                if junk:
                    archive.writestr(f"__MACOSX/{top}._{file.relative_to(folder)}", b"\0\5\26\7")
        if junk:
            archive.writestr(f"{top}.DS_Store", b"\0\0\0\1Bud1")
    return path


@pytest.mark.parametrize("kind", ["folder", "top folder", "zip", "zip with a top folder", "zip from a Mac"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str, kind: str):
    make, options, prompts, hinted = LAYOUTS[layout]
    folder = make(tmp_path / "top" / "mine")
    source = {
        "folder": lambda: folder,
        "top folder": lambda: folder.parent,
        "zip": lambda: packed(folder, tmp_path / "x.zip"),
        "zip with a top folder": lambda: packed(folder, tmp_path / "x.zip", top="mine/"),
        "zip from a Mac": lambda: packed(folder, tmp_path / "x.zip", top="mine/", junk=True),
    }[kind]()
    found = load(source, **options)
    assert found.prompts == prompts
    assert np.array_equal(_to_uint8(found.images), _to_uint8(DATA.images))
    assert (found.hints is not None) == hinted
    if found.hints is not None:
        assert np.array_equal(_to_uint8(found.hints), _to_uint8(DATA.hints))


def test_a_set_that_datasets_saved_to_disk_is_read(tmp_path: Path):
    rows_of_the_hub().save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved", **HUB).prompts == LABELS


def test_the_hubs_rows_are_read_by_options_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows_of_the_hub())
    found = load("hub:someone/pets@test", **HUB)
    assert found.prompts == LABELS
    assert np.array_equal(_to_uint8(found.images), _to_uint8(DATA.images))


@pytest.mark.parametrize("layout", ["imagefolder", "sidecars", "classes", "fill50k"])
def test_what_has_several_splits_is_asked_for_one(tmp_path: Path, layout: str):
    make, options, prompts, _ = LAYOUTS[layout]
    for split in ("train", "test"):
        make(tmp_path / "mine" / split)
    (tmp_path / "mine" / "README.md").write_text("Where these are from.")
    with pytest.raises(InputError, match=r"it has the splits test, train; name one, as in .*mine@test"):
        load(tmp_path / "mine", **options)
    with pytest.raises(InputError, match="no split 'val'; there: test, train"):
        load(f"{tmp_path}/mine@val", **options)
    for source in (
        f"{tmp_path}/mine@train",
        tmp_path / "mine" / "train",
        f"{packed(tmp_path / 'mine', tmp_path / 'x.zip')}@train",
    ):
        assert load(source, **options).prompts == prompts


def test_parquet_splits_are_told_by_file_and_folder_names(tmp_path: Path):
    rows = rows_of_the_hub()
    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows.to_parquet(str(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"))
    rows.select([0]).to_parquet(str(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet"))
    with pytest.raises(InputError, match="it has the splits test, train; name one"):
        load(tmp_path / "hub", **HUB)
    assert [len(load(f"{tmp_path}/hub@{split}", **HUB)) for split in ("train", "test")] == [4, 1]
    with pytest.raises(InputError, match=r"no split 'val'; it has the splits test, train"):
        load(f"{tmp_path}/hub@val", **HUB)
    for split in ("train", "test"):
        (tmp_path / "converted" / "default" / split).mkdir(parents=True)
        rows.to_parquet(str(tmp_path / "converted" / "default" / split / "0000.parquet"))
    assert len(load(f"{tmp_path}/converted@train", **HUB)) == 4
    rows.to_parquet(str(tmp_path / "mine.parquet"))
    assert len(load(tmp_path / "mine.parquet", **HUB)) == 4


def test_a_parquet_file_that_is_damaged_or_of_other_columns_is_named(tmp_path: Path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"x\.parquet cannot be read"):
        load(tmp_path / "x.parquet")
    datasets.Dataset.from_dict({"img": ["a", "b"]}).to_parquet(str(tmp_path / "y.parquet"))
    with pytest.raises(
        InputError, match="no column file_name or image_file_name or image among img; say which holds it"
    ):
        load(tmp_path / "y.parquet")
    with pytest.raises(InputError, match="row 0: column img: a is missing; restore the file"):
        load(tmp_path / "y.parquet", columns={"image": "img"})
    datasets.Dataset.from_dict({"img": [1, 2]}).to_parquet(str(tmp_path / "y.parquet"))
    with pytest.raises(InputError, match="row 0: column img: it holds no image, but '1'; name an image column"):
        load(tmp_path / "y.parquet", columns={"image": "img"})


def test_parquet_files_may_name_pictures_beside_them(tmp_path: Path):
    save(tmp_path / "images" / "0.png", 0)
    rows = datasets.Dataset.from_dict({"file_name": ["images/0.png"], "text": ["x"]})
    rows.to_parquet(str(tmp_path / "metadata.parquet"))
    assert load(tmp_path).prompts == ("x",)
    datasets.Dataset.from_dict({"file_name": ["../secret.png"]}).to_parquet(str(tmp_path / "metadata.parquet"))
    with pytest.raises(InputError, match=r"'\.\./secret\.png' leads out of the data set"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["metadata.tsv", "Metadata.csv", "metadata.csv.txt", "metadata.json", "metadata.xlsx"])
def test_a_table_of_another_name_is_not_passed_over(tmp_path: Path, name: str):
    (imagefolder(tmp_path) / "metadata.csv").rename(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is not read; the table is called metadata.csv or metadata.jsonl"):
        load(tmp_path)


def test_a_column_may_be_left_out_by_name(tmp_path: Path):
    folder = imagefolder(tmp_path)
    found = load(folder, columns={"text": "", "conditioning_image": ""})
    assert found.prompts == ("",) * N
    assert found.hints is None


def test_hints_are_made_by_an_annotator_or_left_out_on_demand(tmp_path: Path):
    folder = imagefolder(tmp_path)
    made = load(folder, hints="canny")
    assert made.hints is not None
    assert np.array_equal(_to_uint8(made.hints)[0, ..., 0], canny(_to_uint8(DATA.images)[0]))
    assert load(folder, hints="none").hints is None
    assert len({load(folder, hints=kind).digest for kind in ("auto", "canny", "none")}) == 3
    with pytest.raises(InputError, match="no column conditioning_image_file_name or conditioning_image among"):
        load(classes(tmp_path / "classes"), hints="column")


@pytest.mark.parametrize(
    ("label", "labels", "expected"),
    [
        (1, (), "1"),
        ("dog", (), "dog"),
        (1, ["cat", "dog"], "dog"),
        ("1", ["cat", "dog"], "dog"),
        ("dog", ["cat", "dog"], "dog"),
        (7, {7: "dog"}, "dog"),
        ("d", {"d": "dog"}, "dog"),
    ],
)
def test_labels_get_the_names_that_are_given(tmp_path: Path, label: object, labels: object, expected: str):
    save(tmp_path / "0.png", 0)
    table(tmp_path, [{"file_name": "0.png", "label": label}], "metadata.jsonl")
    assert load(tmp_path, prompts="a {label}!", labels=labels).prompts == (f"a {expected}!",)


@pytest.mark.parametrize("label", [2, -1, "mouse", None, 1.0, True, ["cat"], ""])
def test_a_label_without_a_name_is_refused(tmp_path: Path, label: object):
    save(tmp_path / "0.png", 0)
    table(tmp_path, [{"file_name": "0.png", "label": label}], "metadata.jsonl")
    with pytest.raises(InputError, match=r"row 0 \(line 1 of metadata\.jsonl\): column label: "):
        load(tmp_path, prompts="a {label}", labels=["cat", "dog"])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["a", "b"], "a list of 2 captions; choose one, a text is needed"),
        (3, "3 is a int; a text is needed"),
        (float("nan"), "nan is a float; a text is needed"),
        (None, "no caption; write one, or say columns: .text: ''. if the set has none"),
        ("", "no caption"),
        (" \t", "no caption"),
        ({"en": "a"}, "is a dict; a text is needed"),
        (True, "True is a bool"),
        ("\ud800", "half a surrogate pair"),
        ("a\0b", "a NUL character"),
    ],
)
def test_a_caption_that_is_no_text_names_row_and_column(tmp_path: Path, value: object, says: str):
    folder = imagefolder(tmp_path)
    rows = [{"file_name": f"images/{i}.png", "caption": value if i == 2 else "ok"} for i in range(N)]
    (folder / "metadata.csv").unlink()
    table(folder, rows, "metadata.jsonl")
    with pytest.raises(InputError, match=rf"row 2 \(line 3 of metadata\.jsonl\): column caption: .*{says}"):
        load(folder, columns={"text": "caption"})
    assert load(folder).prompts == ("",) * N  # the column was not asked for


def test_a_set_without_captions_or_hints_says_so_where_they_are_needed(tmp_path: Path):
    found = load(classes(tmp_path))
    assert found.subset([1, 2]).hints is None
    with pytest.raises(InputError, match=r"no hints, which a ControlNet needs: name their column .* \(hints: canny\)"):
        found.need_hints()
    with pytest.raises(InputError, match="no prompts, which this needs: name their column"):
        found.need_prompts()


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "images/../../secret.png", "C:\\secret.png", ".."]
)
@pytest.mark.parametrize("column", ["file_name", "conditioning_image_file_name"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_no_name_leads_out_of_the_data_set(tmp_path: Path, name: str, column: str, kind: str):
    folder = imagefolder(tmp_path / "mine")
    save(tmp_path / "secret.png", 0)
    row = {"file_name": "images/0.png", "conditioning_image_file_name": "edges/0.png", "text": "x"} | {column: name}
    table(folder, [row])
    source = folder if kind == "folder" else packed(folder, tmp_path / "x.zip")
    with pytest.raises(InputError, match=rf"row 0 .*column {column}: .* leads out of the data set"):
        load(source)


@pytest.mark.parametrize(
    ("stored", "named"),
    [("0.png", "./0.png"), ("deep/0.png", "deep\\0.png"), ("e\u0301.png", "é.png"), ("é.png", "e\u0301.png")],
)
def test_names_are_taken_as_other_systems_write_them(tmp_path: Path, stored: str, named: str):
    save(tmp_path / stored, 0)
    assert len(load(table(tmp_path, [{"file_name": named, "text": "x"}]))) == 1


def test_names_that_differ_in_case_are_not_taken_for_each_other(tmp_path: Path):
    save(tmp_path / "a.png", 0)
    folder = table(tmp_path, [{"file_name": "A.png", "text": "x"}])
    with pytest.raises(
        InputError, match=r"A\.png is missing; but a\.png is there: names must agree in upper and lower"
    ):
        load(folder)
    save(tmp_path / "A.png", 1)  # where both are there, each is itself
    assert np.array_equal(_to_uint8(load(folder).images)[0], np.asarray(picture(1)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda f: table(f, [{"file_name": "x"}], "metadata.jsonl"),
            "both metadata.csv and metadata.jsonl, which need",
        ),
        (lambda f: shutil.rmtree(f / "images"), r"images/0\.png is missing; restore the file"),
        (lambda f: table(f, [{"file_name": "", "text": "x"}]), "row 0 .*: no file_name; give the row its picture"),
        (lambda f: table(f, [{"file_name": "images", "text": "x"}]), "images is missing"),
        (lambda f: (f / "metadata.csv").write_text("file_name,text\n"), "the data set is empty"),
        (
            lambda f: (f / "images/0.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            r"row 0 .*images/0\.png is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`",
        ),
        (
            lambda f: (f / "images/0.png").write_bytes(b""),
            r"row 0 .*column file_name: image images/0\.png cannot be read",
        ),
        (
            lambda f: picture(0).resize((20, 16)).save(f / "images/0.png"),
            "hint edges/0.png is 16x16 pixels, image .* 20x16",
        ),
        (
            lambda f: [picture(0).resize((20, 16)).save(f / name) for name in ("images/0.png", "edges/0.png")],
            r"image images/0\.png is 20x16 pixels, not square; let the data set's entry say size",
        ),
        (lambda f: picture(0).resize((8, 8)).save(f / "edges/1.png"), "hint edges/1.png is 8x8 pixels, image .* 16x16"),
    ],
)
def test_a_folder_with_a_fault_names_it(tmp_path: Path, change: Callable[[Path], object], says: str):
    folder = imagefolder(tmp_path)
    change(folder)
    with pytest.raises(InputError, match=says):
        load(folder)


@pytest.mark.parametrize("size", [8, 32])
def test_images_and_hints_come_to_one_size_by_option(tmp_path: Path, size: int):
    folder = imagefolder(tmp_path)
    for i in range(N):  # hints at half the size, images not square
        image = Image.new("RGB", (20, 16))
        image.paste(picture(i), (2, 0))
        image.save(folder / f"images/{i}.png")
        hint = Image.new("RGB", (20, 16))
        hint.paste(picture(i, "hints"), (2, 0))
        hint.resize((10, 8)).save(folder / f"edges/{i}.png")
    with pytest.raises(
        InputError, match=r"hint edges/0.png is 10x8 pixels, image images/0.png 20x16; give both one size"
    ):
        load(folder, size=size)
    found = load(folder, size=size, resize="shortest", crop="centre")
    assert found.images.shape == found.need_hints().shape == (N, 3, size, size)
    expected = load(imagefolder(tmp_path / "square"), size=size, resize="stretch")
    assert (found.images - expected.images).abs().mean() < 0.02
    with pytest.raises(InputError, match=r"image images/0.png is 20x16 pixels, expected"):
        load(folder, size=size, resize="shortest")


def test_the_hint_must_show_the_same_part_of_the_picture(tmp_path: Path):
    folder = imagefolder(tmp_path)
    picture(0, "hints").resize((16, 8)).save(folder / "edges/0.png")
    with pytest.raises(InputError, match=r"hint edges/0.png is 16x8 pixels, image images/0.png 16x16"):
        load(folder, size=16, resize="stretch")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resize": "shortest"}, "resize and crop lead to a size: give size too"),
        ({"crop": "centre"}, "give size too"),
        ({"size": 8, "resize": "stretch", "crop": "centre"}, "stretch leaves nothing to crop"),
        ({"resize": "squeeze"}, "resize 'squeeze' is unknown; choose one of none, stretch, shortest"),
        ({"resampling": "cubic"}, "resampling 'cubic' is unknown"),
        ({"hints": "depth"}, "hints 'depth' is unknown; choose one of auto, column, none, canny"),
        ({"background": "transparent grey"}, "background 'transparent grey' is no colour"),
        ({"prompts": "a {lable}"}, r"prompts: '\{lable\}' cannot be filled in; only \{label\} can"),
        ({"columns": {"img": "image"}}, "columns: 'img' is none of image, conditioning_image, text, label, source"),
        ({"labels": "cat"}, "labels: expected a list or a mapping of names, got 'cat'"),
        ({"size": -8}, "size must be 0 or more"),
        ({"colour": "red"}, "unknown key colour"),
        (
            {"columns": {"text": "caption"}},
            "no column caption among file_name, conditioning_image_file_name, text; say which",
        ),
        ({"prompts": "a {label}"}, "no column label among"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path: Path, options: dict, says: str):
    with pytest.raises(InputError, match=says):
        load(imagefolder(tmp_path), **options)


def test_captions_in_files_are_all_there_or_none(tmp_path: Path):
    folder = sidecars(tmp_path)
    (folder / "2.txt").unlink()
    with pytest.raises(
        InputError, match=r"3 pictures have a caption in a text file beside them, 1 have none, the first 2\.PNG"
    ):
        load(folder)
    (folder / "2.txt").write_bytes(b"\xff\xfea\0")
    with pytest.raises(InputError, match=r"the caption 2\.txt: it is UTF-16"):
        load(folder)
    (folder / "2.txt").write_text("\n")
    with pytest.raises(InputError, match="row 2: column text: no caption"):
        load(folder)


def test_pictures_that_are_not_read_are_not_passed_over(tmp_path: Path):
    classes(tmp_path)
    (tmp_path / "cat" / "IMG_1.HEIC").write_bytes(b"ftypheic")
    with pytest.raises(
        InputError, match=r"cat/IMG_1\.HEIC is of a kind that is not read here; convert it to PNG or JPEG"
    ):
        load(tmp_path)


def test_one_class_alone_is_no_label(tmp_path: Path):
    save(tmp_path / "mine" / "cat" / "0.png", 0)
    assert load(tmp_path, prompts="a cat").prompts == ("a cat",)
    with pytest.raises(InputError, match="no column label among image"):
        load(tmp_path, prompts="a {label}")


def test_a_zip_with_hostile_or_doubtful_names_is_refused(tmp_path: Path):
    for names, says in (
        (("../a.png",), "outside of it"),
        (("/a.png",), "outside of it"),
        (("a.png", "./a.png"), "given twice"),
    ):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
        with pytest.raises(InputError, match=f"it holds .*, {says}; pack it again"):
            load(tmp_path / "x.zip")


def test_a_zip_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("splitlab.data.files.LARGEST", 10_000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.csv", "file_name,text\na.png,x\n")
        archive.writestr("a.png", bytes(10_001))
    with pytest.raises(InputError, match=r"row 0 .*a\.png has 10001 bytes unpacked, more than 10000"):
        load(tmp_path / "x.zip")


def test_links_to_folders_are_followed_once(tmp_path: Path):
    imagefolder(tmp_path / "elsewhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.csv").write_bytes((tmp_path / "elsewhere" / "metadata.csv").read_bytes())
    for name in ("images", "edges"):
        (tmp_path / "mine" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "mine" / "loop").symlink_to(tmp_path / "mine")
    assert load(tmp_path / "mine").digest == load(tmp_path / "elsewhere").digest


def test_what_a_sample_stems_from_is_kept(tmp_path: Path):
    folder = imagefolder(tmp_path)
    assert load(folder).sources == tuple(f"images/{i}.png" for i in range(N))
    rows = [{"file_name": f"images/{i}.png", "patient": f"p{i // 2}"} for i in range(N)]
    found: ImageSet = load(table(folder, rows), columns={"source": "patient"})
    assert found.sources == ("p0", "p0", "p1", "p1")


def test_the_files_of_a_folder_that_cannot_be_opened_are_named(tmp_path: Path):
    folder = imagefolder(tmp_path)
    (folder / "images/0.png").unlink()
    (folder / "images/0.png").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"row 0 .*0\.png is no file that can be read"):
        load(folder)


def test_a_zip_may_be_damaged_in_any_part(tmp_path: Path):
    content = packed(imagefolder(tmp_path / "mine"), tmp_path / "x.zip").read_bytes()
    archive = io.BytesIO(content)
    assert zipfile.is_zipfile(archive)
    for end in (0, 10, len(content) // 2, len(content) - 3):
        (tmp_path / "x.zip").write_bytes(content[:end])
        with pytest.raises(InputError, match="not a zip file"):
            load(tmp_path / "x.zip")


def parquet(path: Path, *rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows_of_the_hub().select(rows).to_parquet(str(path))


@pytest.mark.parametrize(
    ("first", "second", "splits"),
    [
        ("train_0.parquet", "test_0.parquet", ("test", "train")),
        ("mnist_train.parquet", "mnist_test.parquet", ("test", "train")),
        ("Train.parquet", "Test.parquet", ("test", "train")),
        ("train.parquet", "dev.parquet", ("dev", "train")),
        ("labelled-00000-of-00001.parquet", "unlabelled-00000-of-00001.parquet", ("labelled", "unlabelled")),
        ("data/train-00000-of-00001.parquet", "data/extra-00000-of-00001.parquet", ("extra", "train")),
        ("train.parquet", "rest.parquet", ("train", "rest")),
    ],
)
def test_no_two_splits_are_taken_for_one(tmp_path: Path, first: str, second: str, splits: tuple[str, str]):
    parquet(tmp_path / first, 0)
    parquet(tmp_path / second, 1, 2)
    with pytest.raises(InputError, match=f"it has the splits {', '.join(splits)}; name one"):
        load(tmp_path, **HUB)
    assert {len(load(f"{tmp_path}@{split}", **HUB)) for split in splits} == {1, 2}


@pytest.mark.parametrize("other", ["dev", "eval", "Validation"])
def test_no_two_folders_of_splits_are_taken_for_one(tmp_path: Path, other: str):
    for number, split in enumerate(("train", other)):
        save(tmp_path / split / f"{number}.png", number)
    with pytest.raises(InputError, match=f"it has the splits .*{other}"):
        load(tmp_path)


def test_a_split_that_files_do_not_name_is_not_made_up(tmp_path: Path):
    parquet(tmp_path / "x.parquet", 0)
    rows_of_the_hub().save_to_disk(str(tmp_path / "saved"))
    for name in ("x.parquet", "saved"):
        with pytest.raises(InputError, match="no split 'train': its files name no splits; leave @train out"):
            load(f"{tmp_path}/{name}@train", **HUB)


def test_the_only_split_is_not_taken_for_another(tmp_path: Path):
    save(tmp_path / "train" / "0.png", 0)
    for split in ("train", "Train"):
        assert len(load(f"{tmp_path}@{split}")) == 1
    with pytest.raises(InputError, match="no split 'test'; there: train"):
        load(f"{tmp_path}@test")


def test_a_picture_that_left_the_hubs_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = datasets.Dataset.from_dict({"img": [str(tmp_path / "gone.png")]}).cast_column("img", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: rows)
    with pytest.raises(InputError, match=r"row 0: column img: .*gone\.png cannot be read .No such file"):
        load("hub:someone/pets", columns={"image": "img"})


def test_a_lost_shard_is_named(tmp_path: Path):
    parquet(tmp_path / "data" / "train-00000-of-00003.parquet", 0)
    parquet(tmp_path / "data" / "train-00002-of-00003.parquet", 1)
    with pytest.raises(InputError, match="1 of the 3 shards of train are missing, the first train-00001-of-00003"):
        load(tmp_path, **HUB)
    assert len(load(tmp_path / "data" / "train-00002-of-00003.parquet", **HUB)) == 1
    parquet(tmp_path / "data" / "train-00001-of-00003.parquet", 2)
    assert len(load(tmp_path, **HUB)) == 3


def test_a_dictionary_of_sets_that_datasets_saved_is_asked_for_one(tmp_path: Path):
    rows = rows_of_the_hub()
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(InputError, match="it has the splits train, test; name one"):
        load(tmp_path / "two", **HUB)
    assert [len(load(f"{tmp_path}/two@{split}", **HUB)) for split in ("train", "test")] == [4, 1]
    assert len(load(tmp_path / "one", **HUB)) == 4
    with pytest.raises(InputError, match="no split 'val'; it has the splits train"):
        load(f"{tmp_path}/one@val", **HUB)


@pytest.mark.parametrize("beside", ["README.md", "README.txt", "LICENSE", "dataset_infos.json"])
def test_what_explains_a_set_does_not_hide_its_table(tmp_path: Path, beside: str):
    imagefolder(tmp_path / "train")
    (tmp_path / beside).write_text("{}")
    assert load(tmp_path).prompts == load(tmp_path / "train").prompts


def test_a_table_further_down_is_not_passed_over(tmp_path: Path):
    imagefolder(tmp_path / "one")
    save(tmp_path / "0.png", 0)
    with pytest.raises(InputError, match=r"its table one/metadata\.csv is further down: name the folder, as in .*one"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["captions.csv", "0.caption", "0.png.txt", "1.txt", "more.zip", "text/0.txt"])
def test_what_is_not_read_is_named(tmp_path: Path, name: str):
    save(tmp_path / "0.png", 0)
    for explaining in ("README.md", "LICENSE", "docs/how.md"):
        (tmp_path / explaining).parent.mkdir(exist_ok=True)
        (tmp_path / explaining).write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.warns(UserWarning, match=f"of no use here and not read: {name};"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["@eaDir/0.png/thumb.jpg", "$RECYCLE.BIN/1.png", "a/__MACOSX/1.png", "ehthumbs.db"])
def test_what_systems_put_beside_files_is_no_part_of_a_set(tmp_path: Path, name: str):
    save(tmp_path / "0.png", 0)
    save(tmp_path / name.replace(".db", ".png"), 1)
    (tmp_path / name.replace(".db", ".png")).rename(tmp_path / name)
    assert load(tmp_path).sources == ("0.png",)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".apng", ".pnm", ".j2k"])
def test_less_common_suffixes_are_pictures_too(tmp_path: Path, suffix: str):
    save(tmp_path / "0.png", 0)
    save(tmp_path / "1.png", 1)
    (tmp_path / "1.png").rename(tmp_path / f"1{suffix}")
    assert len(load(tmp_path)) == 2


def test_an_address_in_place_of_a_picture_is_said_to_be_one(tmp_path: Path):
    table(tmp_path, [{"image": "https://example.org/0.png", "text": "x"}])
    with pytest.raises(InputError, match=r"column image: https.* is missing; addresses are not fetched"):
        load(tmp_path)
    table(tmp_path, [{"image": "iVBORw0KGgo" * 999, "text": "x"}])
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("source", ["", "  ", "hub:", "hub:/x"])
def test_nothing_is_no_name(source: str):
    with pytest.raises(InputError, match=r"no data set is named|no hub id"):
        load(source)


def test_the_table_alone_is_no_source(tmp_path: Path):
    with pytest.raises(InputError, match=r"metadata\.csv: one file of a data set; name the folder that holds it"):
        load(imagefolder(tmp_path) / "metadata.csv")


def test_a_configuration_of_the_hub_may_be_named(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, split: (asked.append((*names, split)), rows_of_the_hub())[1]
    )
    for source in ("hub:someone/pets", "hub:someone/pets/cats@test", "hub:pets"):
        load(source, **HUB)
    assert asked == [("someone/pets", "train"), ("someone/pets", "cats", "test"), ("pets", "train")]


def test_a_size_that_no_memory_holds_is_refused(tmp_path: Path):
    save(tmp_path / "0.png", 0)
    with pytest.raises(InputError, match="size is the side of a picture in pixels, 8192 at most, got 1000000"):
        load(tmp_path, size=10**6, resize="stretch")
