from pathlib import Path

import pytest
import tiny

from splitlab import generate
from splitlab.data import load
from splitlab.datasets import SPLITS, content_digest, load_split
from splitlab.errors import InputError
from splitlab.params import load_params

SHIPPED = {  # SHA-256 over pixels and prompts, from before data sets had a section of their own
    ("shapes", "private"): "43569860d54afeb9",
    ("shapes", "heldout"): "dc32449a18b86dd5",
    ("photos", "private"): "ed18cf6dad79afaf",
    ("photos64", "heldout"): "889c0ae5a2b281dc",
    ("digits", "heldout"): "e4b46fcce81cca7f",
    ("digits", "private-test"): "67a6b4893bca7345",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with the three parts of a data set, as zips."""
    for seed, split in enumerate(SPLITS):
        generate.write_split(tmp_path / "mine" / f"{split}.zip", tiny.samples(3, seed=seed))
    return tmp_path / "mine"


def entry(root: Path, **options: object) -> dict:
    return {"datasets": {"mine": {split: str(root / f"{split}.zip") for split in SPLITS} | options}}


@pytest.mark.parametrize(("name", "split"), SHIPPED)
def test_shipped_data_are_what_they_were(name: str, split: str):
    assert load_split(name, split, load_params()).digest.startswith(SHIPPED[name, split])


def test_every_shipped_split_is_where_the_section_says():
    params = load_params()
    assert set(params["datasets"]) == {"shapes", "photos", "photos64", "digits"}
    for name in params["datasets"]:
        assert len({content_digest(name, split, params) for split in SPLITS}) == 3


def test_a_name_and_the_path_of_a_folder_with_three_parts_are_the_same_data(root: Path):
    for split in SPLITS:
        expected = load(root / f"{split}.zip").digest
        assert load_split("mine", split, entry(root)).digest == expected
        assert load_split(str(root), split, {}).digest == expected


def test_an_entry_may_limit_what_is_read_and_so_may_the_caller(root: Path):
    params = entry(root, limit=2)
    assert [len(load_split("mine", "private", params, limit=n)) for n in (None, 1, 3)] == [2, 1, 2]


def test_one_imagefolder_does_not_stand_for_three_splits(root: Path):
    for split in SPLITS:
        with pytest.raises(
            InputError, match=r"no private, public, heldout in it.*needs an entry in the section datasets"
        ):
            load_split(str(root / "private.zip"), split, {})
    (root / "public.zip").unlink()
    with pytest.raises(InputError, match="mine: no public in it"):
        load_split(str(root), "private", {})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"public": ""}, r"datasets\.mine: no public: a data set needs a source for each of private, public, heldout"),
        ({"pubilc": "x"}, r"datasets\.mine: unknown key pubilc"),
        ({"limit": -1}, "limit must be 0 or more, got -1"),
        ({"size": "big"}, r"datasets\.mine\.size: expected int"),
    ],
)
def test_an_entry_that_says_nothing_sensible_is_refused(root: Path, options: dict, says: str):
    with pytest.raises(InputError, match=says):
        load_split("mine", "private", entry(root, **options))


def test_two_splits_of_one_source_are_refused(root: Path):
    (root / "link.zip").symlink_to(root / "private.zip")
    for same in ("private.zip", "../mine/private.zip", "link.zip"):
        with pytest.raises(InputError, match=r"the private and the public split are both .*private\.zip"):
            load_split("mine", "private", entry(root, public=str(root / same)))


def test_unknown_names_and_splits_say_what_there_is(root: Path):
    with pytest.raises(InputError, match=r"no data set 'yours': it is neither a path nor in the section.*there: mine"):
        load_split("yours", "private", entry(root))
    with pytest.raises(InputError, match="no split 'private-test'; there: private, public, heldout"):
        load_split("mine", "private-test", entry(root))
    with pytest.raises(InputError, match="no split 'train'"):
        load_split("mine", "train", entry(root))


def test_the_content_digest_sees_bytes_names_and_options_and_no_path(root: Path, tmp_path: Path):
    before = content_digest("mine", "private", entry(root))
    assert content_digest("mine", "private", entry(root, limit=2)) != before
    moved = root.rename(tmp_path / "elsewhere")
    assert content_digest("mine", "private", entry(moved)) == before
    assert content_digest(str(moved), "private", {}) == before
    content = (moved / "private.zip").read_bytes()
    (moved / "private.zip").write_bytes(content + b"!")
    assert content_digest("mine", "private", entry(moved)) != before


def test_the_content_digest_of_a_folder_sees_every_file_but_hidden_ones(tmp_path: Path):
    sources = {split: str(tmp_path / split) for split in SPLITS}
    for split in SPLITS:
        (tmp_path / split / "deep").mkdir(parents=True)
        (tmp_path / split / "deep" / "a.png").write_bytes(split.encode())
    params = {"datasets": {"mine": sources}}
    before = content_digest("mine", "private", params)
    (tmp_path / "private" / ".DS_Store").write_bytes(b"x")
    assert content_digest("mine", "private", params) == before
    (tmp_path / "private" / "deep" / "a.png").rename(tmp_path / "private" / "deep" / "b.png")
    assert content_digest("mine", "private", params) != before
