"""Splits that share an image are refused before anything is trained; look-alikes are reported in one line."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from world import tiny

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet, _to_uint8, image_set
from splitlab.data.overlap import refuse_overlap
from splitlab.diffusion.base import Base
from splitlab.dp.finetune import DPConfig, finetune
from splitlab.split.config import Defences
from splitlab.split.train import train
from splitlab.study.dp_survey import DPSurveyConfig, dp_survey
from splitlab.study.survey import SurveyConfig, record_survey
from splitlab.study.update_grid import Case, InversionSpec, ModelSpec, UpdateConfig
from splitlab.study.update_survey import record_updates

ONE, OTHER = tiny.small_set(6), tiny.small_set(5, seed=1)


def joined(data: ImageSet, more: np.ndarray) -> ImageSet:
    """Return `data` with further images behind it."""
    pixels = np.concatenate([_to_uint8(data.images), more])
    return image_set(pixels, None, ("",) * len(pixels), [f"b{i}.png" for i in range(len(pixels))])


def jpeg(pixels: np.ndarray, quality: int = 75) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_a_shared_image_is_refused_and_named():
    other = joined(OTHER, _to_uint8(ONE.images)[2:4])
    for splits, first in (
        ({"private": ONE, "public": other}, r"tiny2 \(public: b5\.png\)"),
        ({"public": other, "private": ONE}, r"b5\.png \(private: tiny2\)"),
    ):
        with pytest.raises(InputError, match=rf"mine: 2 of the .* images too, the first {first}; keep each in one"):
            refuse_overlap(splits, dataset="mine")


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (jpeg, "b5.png"),
        (lambda p: np.clip(p.astype(int) + 1, 0, 255).astype(np.uint8), "b5.png"),
        (lambda p: np.asarray(Image.fromarray(p).resize((24, 24)).resize((16, 16))), "b5.png"),
        (lambda p: p[:, ::-1], "b5.png, mirrored"),
        (lambda p: jpeg(p[:, ::-1]), "b5.png, mirrored"),
    ],
)
def test_a_changed_copy_is_reported_with_count_and_name(change: Callable[[np.ndarray], np.ndarray], how: str):
    other = joined(OTHER, change(_to_uint8(ONE.images)[2])[None])
    with pytest.warns(UserWarning, match=f"mine: look-alikes.*: 1 of the 6 private images .* closest tiny2 and {how}$"):
        refuse_overlap({"private": ONE, "public": other}, dataset="mine")


def test_different_images_raise_no_word():
    flat = [image_set(np.full((50, 8, 8, 3), shade, np.uint8), None, ("",) * 50) for shade in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_overlap({"private": ONE, "public": OTHER, "heldout": tiny.small_set(3, seed=2)}, dataset="mine")
        refuse_overlap(dict(zip("ab", flat, strict=True)), dataset="flat")  # what shows nothing resembles nothing


def test_splits_of_different_sizes_are_refused():
    with pytest.raises(InputError, match=r"the private images have 16x16 pixels, the public ones 24x24; .* say size"):
        refuse_overlap({"private": ONE, "public": tiny.small_set(2, size=24, seed=1)}, dataset="mine")


def test_repeats_are_counted(base: Base, tmp_path: Path):
    repeated = ONE.subset([0, 1, 0, 2, 0, 1])
    said = "data set mine: 2 private images are there more than once, tiny0 3 times: an epsilon"
    with pytest.warns(UserWarning, match=said):
        refuse_overlap({"private": repeated, "public": OTHER}, dataset="mine")
    config = DPConfig("mine", "none", from_block=0, batch_size=2, steps=1, noise_multiplier=1.0, delta=0.01)
    with pytest.warns(UserWarning, match=said):
        finetune("x", config, base, repeated, out=tmp_path / "out", cache=tmp_path / "cache")


def test_many_look_alikes_are_one_line():
    noise = np.random.default_rng(0).integers(256, size=(50, 8, 8, 3), dtype=np.uint8)
    splits = {name: image_set(noise ^ change, None, ("",) * 50) for name, change in (("a", 0), ("b", 1), ("c", 2))}
    with pytest.warns(UserWarning, match="50 of the 50 a images have one among the b images.*; 50 of") as caught:
        refuse_overlap(splits, dataset="many")
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 500


def same(dataset: str, split: str) -> ImageSet:
    return ONE


@pytest.mark.parametrize("shared", ["heldout", "public"])
def test_no_run_trains_on_overlapping_splits(base: Base, tmp_path: Path, shared: str):
    splits = {"heldout": OTHER, "public": tiny.small_set(4, seed=3)} | {shared: ONE.subset(range(len(ONE)))}
    places = {"out": tmp_path / "out", "cache": tmp_path / "cache"}
    with pytest.raises(InputError, match=f"data set tiny: 6 of the 6 .* images are {shared} images too"):
        train("x", tiny.config(), base, ONE, splits["heldout"], public=splits["public"], **places)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_one_set_passed_twice_is_trained_on_and_said(base: Base, tmp_path: Path):
    with pytest.warns(UserWarning, match="scores on training data"):
        train("x", tiny.config(), base, ONE, ONE, out=tmp_path / "out", cache=tmp_path / "cache")


def test_nothing_is_recorded_or_fine_tuned_on_overlapping_splits(base: Base, tmp_path: Path):
    survey = SurveyConfig(settings={"none": Defences()}, default={"mine": ("none",)})
    cases = (Case("pixel", attacks=(InversionSpec("timesteps"),), dataset="mine"),)
    updates = UpdateConfig(models={"pixel": ModelSpec("pixel", size=8, channels=(32, 32))}, cases=cases)
    private = DPSurveyConfig(common=DPConfig(dataset="mine", conditioning="none"))
    for begin in (
        lambda: record_survey(survey, base, same, seen=tmp_path / "seen", hidden=tmp_path / "hidden"),
        lambda: record_updates(updates, base, same, out=tmp_path),
        lambda: dp_survey(private, base, same, cache=tmp_path),
    ):
        with pytest.raises(InputError, match="data set mine: 6 of the 6 private images are public images too"):
            begin()
    assert not list(tmp_path.iterdir())
