import warnings
from pathlib import Path

import datasets
import pytest
from PIL import Image
from ruamel.yaml import YAML
from world import tiny

from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.data import generate
from splitlab.data.datasets import SPLITS, dataset_config
from splitlab.data.image_set import _to_uint8, load
from splitlab.diffusion.base import Base
from splitlab.params import load_params, load_split

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
        assert all(Path(dataset_config(name, params).place(split)).exists() for split in SPLITS)


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
        (
            {"public": ""},
            r"datasets\.mine: no public: a data set needs private, public, heldout, each",
        ),
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


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "~nobody-at-all/x", "\ud800"])
def test_what_can_be_no_path_is_one_error(root: Path, text: str):
    for begin in (
        lambda: load_split(text, "private", {}),
        lambda: load_split("mine", "private", entry(root, private=text)),
    ):
        with pytest.raises(InputError, match="can be no path") as caught:
            begin()
        assert len(str(caught.value)) < 500
    with pytest.raises(InputError, match="can be no path"):
        load(text)


def test_unknown_names_and_splits_say_what_there_is(root: Path):
    with pytest.raises(InputError, match=r"no data set 'yours': it is neither a path nor in the section.*there: mine"):
        load_split("yours", "private", entry(root))
    with pytest.raises(InputError, match="no split 'private-test'; there: private, public, heldout"):
        load_split("mine", "private-test", entry(root))
    with pytest.raises(InputError, match="no split 'train'"):
        load_split("mine", "train", entry(root))


def folder_of(path: Path, n: int, *, copies: int = 0, kind: str = "png") -> Path:
    """Write n pictures, the first `copies` of them twice."""
    path.mkdir(parents=True)
    pixels = _to_uint8(tiny.small_set(n).images)
    for i in range(n):
        Image.fromarray(pixels[i]).save(path / f"{i:03}.{kind}")
    for i in range(copies):
        (path / f"copy{i:03}.{kind}").write_bytes((path / f"{i:03}.{kind}").read_bytes())
    return path


FRACTIONS = {"private": 0.5, "public": 0.3, "heldout": 0.2}


def divided(folder: Path, **options: object) -> dict:
    return {"datasets": {"mine": {"source": str(folder), "fractions": FRACTIONS} | options}}


def names(params: dict) -> dict[str, tuple[str, ...]]:
    return {split: load_split("mine", split, params).sources for split in SPLITS}


def test_one_source_is_divided_by_seed_and_by_content(tmp_path: Path):
    source = folder_of(tmp_path / "mine", 20)
    parts = names(divided(source))
    assert [len(parts[split]) for split in SPLITS] == [10, 6, 4]
    assert len({name for part in parts.values() for name in part}) == 20
    assert all(list(part) == sorted(part) for part in parts.values())
    assert names(divided(source)) == parts != names(divided(source, seed=1))
    (source / "000.png").rename(source / "zzz.png")  # the division is of contents, not of places
    moved = names(divided(source))
    assert [{name.replace("zzz", "000") for name in moved[split]} for split in SPLITS] == [
        set(parts[s]) for s in SPLITS
    ]
    reordered = {split: FRACTIONS[split] for split in reversed(SPLITS)}
    assert names(divided(source, fractions=reordered)) == moved


def test_what_is_left_over_belongs_to_no_split_and_a_limit_comes_first(tmp_path: Path):
    source = folder_of(tmp_path / "mine", 20)
    some = names(divided(source, fractions={"private": 0.2, "public": 0.2, "heldout": 0.1, "private_test": 0.1}))
    assert [len(some[split]) for split in SPLITS] == [4, 4, 2]
    limited = names(divided(source, limit=10))
    assert sorted(name for part in limited.values() for name in part) == [f"{i:03}.png" for i in range(10)]
    assert len(load_split("mine", "private", divided(source), limit=3)) == 3


def test_equal_files_and_what_stems_from_one_original_come_into_one_split(tmp_path: Path):
    source = folder_of(tmp_path / "mine", 20, copies=20)
    parts = names(divided(source))
    for part in parts.values():
        assert {name.removeprefix("copy") for name in part if name.startswith("copy")} == {
            name for name in part if not name.startswith("copy")
        }
    rows = "".join(f"{i:03}.png,p{i % 4}\n" for i in range(20))
    (source / "metadata.csv").write_text(f"file_name,patient\n{rows}")
    quarters = {"private": 0.5, "public": 0.25, "heldout": 0.25}
    patients = names(divided(source, columns={"source": "patient"}, fractions=quarters))
    assert [len(set(patients[split])) for split in SPLITS] == [2, 1, 1]
    assert set(patients["private"]).isdisjoint(patients["public"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fractions": {"private": 0.5, "public": 0.5}}, "no heldout: a data set needs"),
        ({"fractions": FRACTIONS | {"private": 0.6}}, "fractions must be above 0 and 1 at most together"),
        ({"fractions": FRACTIONS | {"private": 0}}, "fractions must be above 0"),
        ({"fractions": FRACTIONS | {"private": ".inf"}}, "fractions.private: expected float"),
        ({"fractions": FRACTIONS | {"train": 0.1}}, "fractions: train is none of private, public, heldout"),
        ({"fractions": {}}, "source and fractions go together"),
        ({"source": "", "fractions": FRACTIONS}, "source and fractions go together"),
        ({"private": "elsewhere"}, "both source and private: give one source with fractions"),
        ({"fractions": FRACTIONS | {"heldout": 0.001}}, "20 rows leave nothing for heldout; change the fractions"),
        ({"size": [8, 8]}, r"size: expected int, got \[8, 8\]"),
        ({"columns": {"image": "img"}}, "no column img among image; say which holds it"),
    ],
)
def test_divisions_that_cannot_be_made_are_refused(tmp_path: Path, options: dict, says: str):
    with pytest.raises(InputError, match=says):
        load_split("mine", "private", divided(folder_of(tmp_path / "mine", 20), **options))


def test_parts_of_a_folder_may_be_folders_zips_and_parquet_files(tmp_path: Path):
    folder_of(tmp_path / "mine" / "private", 3)
    generate.write_split(tmp_path / "mine" / "public.zip", tiny.samples(4, seed=1))
    picture = Image.fromarray(_to_uint8(tiny.small_set(1, seed=2).images)[0])
    rows = datasets.Dataset.from_dict({"image": [picture]}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(str(tmp_path / "mine" / "heldout.parquet"))
    assert [len(load_split(str(tmp_path / "mine"), split, {})) for split in SPLITS] == [3, 4, 1]
    (tmp_path / "mine" / "heldout.parquet").rename(tmp_path / "0f1e2d")  # as the hub's cache keeps it
    (tmp_path / "mine" / "heldout.parquet").symlink_to(tmp_path / "0f1e2d")
    assert len(load_split(str(tmp_path / "mine"), "heldout", {})) == len(load(tmp_path / "0f1e2d")) == 1


def test_hub_sets_with_train_and_test_need_an_entry_only(tmp_path: Path):
    """As people have them: two Parquet files in one folder, images under another name, labels in place of captions."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for split, seed, n in (("train", 0, 10), ("test", 1, 4)):
        pixels = _to_uint8(tiny.small_set(n, size=14, seed=seed).images)
        columns = {"img": [Image.fromarray(one).convert("L") for one in pixels], "label": [i % 2 for i in range(n)]}
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    entry = {
        "source": f"{tmp_path}@train",
        "fractions": {"private": 0.5, "public": 0.3, "heldout": 0.2},
        "columns": {"image": "img"},
        "prompts": "a photograph of a {label}",
        "size": 16,
        "resize": "stretch",
        "hints": "canny",
    }
    private = load_split("pets", "private", {"datasets": {"pets": entry}})
    assert len(private) == 5
    assert set(private.prompts) == {"a photograph of a cat", "a photograph of a dog"}
    assert private.images.shape == private.need_hints().shape == (5, 3, 16, 16)
    assert (private.images == private.images[:, :1]).all()  # grey became RGB
    with pytest.raises(InputError, match="it has the splits test, train; name one"):
        load_split("pets", "private", {"datasets": {"pets": entry | {"source": str(tmp_path)}}})


def test_long_captions_are_cut_on_demand_and_counted(tmp_path: Path, base_path: Path, base: Base):
    for split in SPLITS:
        folder_of(tmp_path / split, 3)
    captions = ["red circle", "red circle with navy background " * 9 + "end", "x" * 400]
    lines = "".join(f"{i:03}.png,{caption}\n" for i, caption in enumerate(captions))
    (tmp_path / "private" / "metadata.csv").write_text(f"file_name,text\n{lines}")
    entry = {split: str(tmp_path / split) for split in SPLITS}
    params = {"base": {"source": str(base_path)}, "datasets": {"mine": entry}}
    whole = load_split("mine", "private", params)
    assert whole.prompts == tuple(captions)
    with pytest.raises(
        InputError, match=r"prompt 1, .* has \d+ tokens, the text model takes 16.*long_captions: truncate"
    ):
        base.encode_prompts(whole.prompts)
    params["datasets"]["mine"] = entry | {"long_captions": "truncate"}
    with pytest.warns(
        UserWarning, match=r"mine, private: 2 of 3 captions were cut to the 16 tokens .* that of 001\.png"
    ):
        cut = load_split("mine", "private", params)
    assert cut.prompts[0] == captions[0]
    assert all(long.startswith(short) and short for long, short in zip(captions, cut.prompts, strict=True))
    assert cut.prompts[1].endswith(("red", "circle", "with", "navy", "background"))
    assert base.encode_prompts(cut.prompts).shape[0] == 3
    assert [len(ids) for ids in base.tokenizer(list(cut.prompts)).input_ids[1:]] == [16, 16]
    params["datasets"]["mine"] = entry | {"long_captions": "shorten"}
    with pytest.raises(InputError, match="long_captions 'shorten' is unknown; choose one of refuse, truncate"):
        load_split("mine", "private", params)


def test_the_entries_that_contributing_shows_are_read():
    block = (ROOT / "CONTRIBUTING.md").read_text().partition("```yaml\ndatasets:")[2].partition("```")[0]
    entries = YAML(typ="safe").load(f"datasets:{block}")["datasets"]
    built = {name: dataset_config(name, {"datasets": entries}) for name in entries}
    assert built["mine"].place("private") == str(Path.home() / "photos" / "private")
    assert built["pets"].place("heldout") == "hub:someone/pets@train"
    assert built["pets"].prompts == "a photograph of a {label}"


def test_a_column_source_that_names_no_originals_is_said_to_decide(tmp_path: Path):
    listed = "".join(f"{i}.png,{'web' if i < 14 else 'book'}\n" for i in range(20))
    for i in range(20):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,source\n" + listed)
    whole = {"source": str(tmp_path), "fractions": {"private": 0.4, "public": 0.4, "heldout": 0.2}}
    with pytest.raises(InputError, match=r"20 rows of 2 originals .column source: .* nothing for .*heldout"):
        load_split("mine", "private", {"datasets": {"mine": whole}})
    (tmp_path / "metadata.csv").write_text("file_name,source\n" + listed.replace("19.png,book", "19.png,poster"))
    found = {}
    for split in ("private", "public", "heldout"):
        with pytest.warns(UserWarning, match="of 3 originals .* divide otherwise than asked: private "):
            found[split] = len(load_split("mine", split, {"datasets": {"mine": whole | {"seed": 7}}}))
    assert sorted(found.values()) == [1, 5, 14]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freed = whole | {"columns": {"source": ""}}
        assert len(load_split("mine", "private", {"datasets": {"mine": freed}})) == 8
