import csv
import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.data import annotators, generate
from splitlab.data.colours import COLOURS, rgb, split_prompt
from splitlab.data.image_set import load

SHIPPED = ROOT / "data"
shipped = pytest.mark.skipif(not SHIPPED.exists(), reason="the shipped data are not here; `dvc pull` fetches them")

FEW = {
    "SHAPE_SPLITS": {"public": 6, "heldout": 4, "private": 5},
    "PHOTO_SPLITS": {"public": 24, "heldout": 4, "private": 104},  # of the private ones, 100 are the faces
    "PHOTO64_SPLITS": {"public": 12, "heldout": 4, "private": 102},
    "GLYPH_SPLITS": {"public": 20, "heldout": 11},
}


def written(path: Path, seed: int, n: int = 4) -> bytes:
    generate.write_split(path, generate.shapes(n, np.random.default_rng(seed), "x"))
    return path.read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path):
    assert written(tmp_path / "a.zip", 0) == written(tmp_path / "b" / "c.zip", 0)
    assert written(tmp_path / "a.zip", 0) != written(tmp_path / "a.zip", 1)


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path: Path):
    before = written(tmp_path / "a.zip", 0)

    def broken():
        yield tiny.samples(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate.write_split(tmp_path / "a.zip", broken())
    assert (tmp_path / "a.zip").read_bytes() == before


def test_metadata_are_in_imagefolder_layout(tmp_path: Path):
    written(tmp_path / "a.zip", 0, n=2)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        table = list(csv.reader(io.StringIO(archive.read("metadata.csv").decode())))
        assert set(archive.namelist()) == {"metadata.csv", *(name for row in table[1:] for name in row[:2])}
    assert table[0] == ["file_name", "conditioning_image_file_name", "text", "source"]
    assert table[1][0] == "00000.png"


def test_shapes_have_the_colours_their_prompts_name():
    for sample in generate.shapes(20, np.random.default_rng(3), "x"):
        disc, ground = (np.round(255 * np.array(rgb(name))) for name in split_prompt(sample.text))
        found = {tuple(pixel) for pixel in sample.image.reshape(-1, 3)}
        assert {tuple(disc), tuple(ground)} <= found
        # a quarter of the RGB cube's diagonal, so that the disc can be found again
        assert np.linalg.norm(disc - ground) >= 0.25 * np.sqrt(3) * 255 - 1


def test_the_hint_is_the_outline_of_the_disc_and_holds_no_colour():
    for sample in generate.shapes(20, np.random.default_rng(4), "x"):
        disc = np.round(255 * np.array(rgb(split_prompt(sample.text)[0])))
        inside = np.abs(sample.image.astype(int) - disc).max(2) <= 1
        assert sample.hint.shape == (32, 32)
        assert sample.hint[inside].mean() > sample.hint[~inside].mean()  # the line is drawn inwards
        assert 0 < (sample.hint > 127).sum() < inside.sum()


def test_prompts_of_shapes_are_parsed_back_and_others_refused():
    assert split_prompt("dark red circle with sea green background") == ("dark red", "sea green")
    for wrong in ("a photograph of a cat", "mauve circle with red background", "red circle with red background, big"):
        with pytest.raises(ValueError, match="not a shapes prompt"):
            split_prompt(wrong)


def test_colour_names_are_colours_of_css():
    # Golden: CSS Color Module Level 4, section 6.1, "rebeccapurple" #663399 and "lightslategray" #778899.
    assert rgb("rebecca purple") == pytest.approx((0x66 / 255, 0x33 / 255, 0x99 / 255))
    assert rgb("light slate gray") == pytest.approx((0x77 / 255, 0x88 / 255, 0x99 / 255))
    assert len(set(COLOURS.values())) == len(COLOURS)  # no aliases: a name is a colour


def sources(splits: dict) -> dict[str, set[str]]:
    return {split: {sample.source for sample in samples()} for split, samples in splits.items()}


@pytest.mark.parametrize("name", ["shapes", "photos", "photos64", "digits"])
def test_splits_of_the_shipped_recipe_share_no_source(monkeypatch: pytest.MonkeyPatch, name: str):
    for constant, few in FEW.items():
        monkeypatch.setattr(generate, constant, few)
    found = sources(generate.datasets()[name])
    assert {"public", "heldout", "private"} <= set(found)
    for (one, left), (other, right) in itertools.combinations(found.items(), 2):
        assert left, one
        assert not left & right, f"{name}: {one} and {other} share {left & right}"


def test_all_faces_are_private(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate, "PHOTO_SPLITS", FEW["PHOTO_SPLITS"])
    found = sources(generate.datasets()["photos"])
    assert sum(source.startswith("lfw") for source in found["private"]) == 100
    assert {"astronaut", "chelsea"} <= found["private"]
    assert found["public"] == set(generate.PUBLIC_PHOTOS)
    assert found["heldout"] == set(generate.HELDOUT_PHOTOS)


def test_photos_and_digits_are_deterministic_and_of_the_asked_size():
    def photos() -> list[generate.Sample]:
        return list(generate.photos(4, np.random.default_rng(0), generate.HELDOUT_PHOTOS, 64))

    def digits() -> list[generate.Sample]:
        return list(generate.rendered_digits(4, np.random.default_rng(0), "x"))

    for draw, size in ((photos, 64), (digits, 32)):
        for one, other in zip(draw(), draw(), strict=True):
            assert one.image.shape == (size, size, 3)
            assert one.hint.shape == (size, size)
            assert np.array_equal(one.image, other.image)
            assert one.text == other.text


def test_digit_prompts_name_the_digit():
    drawn = list(generate.rendered_digits(10, np.random.default_rng(0), "x"))
    assert [sample.text.removeprefix("the digit ") for sample in drawn] == list(generate.DIGIT_WORDS)
    first = next(generate.handwritten_digits(0, 1))
    assert first.text == "the digit zero"  # scikit-learn's first handwritten digit is a 0


def test_canny_marks_an_edge_where_there_is_one():
    step = np.zeros((32, 32, 3), np.uint8)
    step[:, 16:] = 255
    edges = annotators.canny(step)
    assert set(np.unique(edges)) == {0, 255}
    assert set(np.flatnonzero(edges[16])) <= {15, 16}  # the step lies between these two columns
    assert not annotators.canny(np.full((32, 32, 3), 90, np.uint8)).any()


@shipped
@pytest.mark.parametrize("name", ["shapes", "photos", "photos64", "digits"])
def test_the_shipped_splits_share_no_source(name: str):
    found = {}
    for path in SHIPPED.glob(f"*/{name}.zip"):
        with zipfile.ZipFile(path) as archive:
            rows = csv.DictReader(io.StringIO(archive.read("metadata.csv").decode()))
            found[path.parent.name] = {row["source"] for row in rows}
    assert {"public", "heldout", "private"} <= set(found)
    for left, right in itertools.combinations(found.values(), 2):
        assert not left & right


@shipped
def test_the_shipped_shapes_are_what_the_recipe_makes(tmp_path: Path):
    # pixels are compared, not bytes: builds of zlib differ in how they compress
    generate.write_split(tmp_path / "again.zip", generate.datasets()["shapes"]["heldout"]())
    assert load(tmp_path / "again.zip").digest == load(SHIPPED / "heldout" / "shapes.zip").digest


@pytest.mark.parametrize("kind", ["notes", "zip", "pictures", "empty"])
def test_files_of_others_are_not_replaced(tmp_path: Path, kind: str):
    path = tmp_path / "private" / "shapes.zip"
    path.parent.mkdir()
    if kind in ("notes", "empty"):
        path.write_text("three years of work" * (kind == "notes"))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("00000.png" if kind == "pictures" else "notes.txt", "work")
            archive.writestr("metadata.csv", "file_name,text\n00000.png,mine\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"shapes\.zip: splitlab\.data\.generate did not write this, and it stays"):
        generate.write_split(path, generate.shapes(1, np.random.default_rng(0), "x"))
    assert generate.main([str(tmp_path)]) == 1  # at once, before the first split is drawn
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
    assert path.read_bytes() == before


def test_a_split_takes_the_place_of_an_earlier_one(tmp_path: Path):
    for seed in (0, 1):
        generate.write_split(tmp_path / "a.zip", generate.shapes(2, np.random.default_rng(seed), "x"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]
