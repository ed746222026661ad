"""What needs neither hints nor prompts runs without; what does need them says so before it begins."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from world import tiny

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import latent_hint_controlnet
from splitlab.dp.finetune import DPConfig, finetune
from splitlab.dp.public import warped_copies
from splitlab.split.config import Defences
from splitlab.split.train import train
from splitlab.study.dp_survey import DPCell, DPSurveyConfig, dp_survey
from splitlab.study.survey import SurveyConfig, record_survey
from splitlab.study.update_grid import Case, InversionSpec, ModelSpec, UpdateConfig
from splitlab.study.update_survey import attack_updates, record_updates

FEW = {"batch_size": 4, "steps": 2, "noise_multiplier": 1.0, "delta": 0.01, "from_block": 0}


@pytest.fixture
def bare(private: ImageSet) -> ImageSet:
    """Return images alone."""
    return replace(private, hints=None, prompts=("",) * len(private), digest="bare")


@pytest.fixture
def captioned(private: ImageSet) -> ImageSet:
    """Return images with prompts, as text-to-image training has them."""
    return replace(private, hints=None, digest="captioned")


def test_unconditional_fine_tuning_needs_images_alone(base: Base, bare: ImageSet, tmp_path: Path):
    record = finetune("x", DPConfig(conditioning="none", **FEW), base, bare, out=tmp_path / "o", cache=tmp_path / "c")
    assert record["steps"] == 2


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_conditional_fine_tuning_needs_prompts_and_no_hints(
    base: Base, bare: ImageSet, captioned: ImageSet, tmp_path: Path, conditioning: str
):
    classes = tuple(sorted(set(captioned.prompts))) if conditioning == "class" else ()
    config = DPConfig(conditioning=conditioning, classes=classes, **FEW)
    assert finetune("x", config, base, captioned, out=tmp_path / "o", cache=tmp_path / "c")["steps"] == 2
    with pytest.raises(InputError, match="no prompts, which this needs: name their column"):
        finetune("y", config, base, bare, out=tmp_path / "p", cache=tmp_path / "d")
    assert not (tmp_path / "p").exists()


def test_the_grid_of_fine_tunings_needs_images_alone(base: Base, tmp_path: Path):
    def load(dataset: str, split: str) -> ImageSet:
        data = tiny.small_set(70, seed=sum(split.encode()))
        return replace(data, hints=None, prompts=("",) * 70, digest=split)

    common = DPConfig(dataset="mine", conditioning="none", **FEW)
    few = {"seeds": 1, "n_samples": 70, "sample_steps": 2, "classifier_steps": 2, "warps": 1}
    config = DPSurveyConfig(common=common, cells=(DPCell("attention", (math.inf,)),), **few)
    table, _ = dp_survey(config, base, load, cache=tmp_path)
    assert table["frechet"].notna().all()


def test_public_data_need_no_hints(bare: ImageSet):
    assert warped_copies(bare, 2, std=0.1).hints is None


def test_pixel_updates_need_images_alone_latent_ones_prompts_and_controlnets_hints(
    base: Base, bare: ImageSet, captioned: ImageSet, private: ImageSet, tmp_path: Path
):
    latent_hint_controlnet(base).save_pretrained(tmp_path / "controlnet")
    models = {
        "pixel": ModelSpec("pixel", size=8, channels=(32, 32)),
        "latent": ModelSpec("latent"),
        "controlnet": ModelSpec("controlnet", source=str(tmp_path / "controlnet")),
    }

    def record(kind: str, data: ImageSet) -> Path:
        case = Case(kind, attacks=(InversionSpec("timesteps"),), dataset="mine")
        config, out = UpdateConfig(models=models, cases=(case,), images=1), tmp_path / kind / data.digest
        record_updates(config, base, tiny.splits(data), out=out)
        attack_updates(config, base, tiny.splits(data), recorded=out, out=out / "inversions")
        return out

    for kind, data in (("pixel", bare), ("latent", captioned), ("controlnet", private)):
        assert list(record(kind, data).rglob("timesteps-0.safetensors"))
    with pytest.raises(InputError, match="no prompts"):
        record("latent", bare)
    with pytest.raises(InputError, match="no hints, which a ControlNet needs"):
        record("controlnet", captioned)


@pytest.mark.parametrize("scheme", ["central", "federated", "split", "u_shaped", "split_gradients"])
def test_every_scheme_of_split_learning_needs_both(
    base: Base, private: ImageSet, heldout: ImageSet, bare: ImageSet, captioned: ImageSet, tmp_path: Path, scheme: str
):
    places = {"out": tmp_path / "o", "cache": tmp_path / "c"}
    hinted = replace(private, prompts=bare.prompts, digest="hinted")
    for data, says in ((captioned, "no hints, which a ControlNet needs"), (hinted, "no prompts, which this needs")):
        with pytest.raises(InputError, match=says):
            train("x", tiny.config(scheme=scheme), base, data, heldout, **places)
        assert not (tmp_path / "o").exists()
    unhinted = replace(heldout, hints=None, digest="unhinted")
    with pytest.raises(InputError, match="no hints, which a ControlNet needs"):
        train("x", tiny.config(scheme=scheme), base, private, unhinted, **places)
    assert not list(tmp_path.rglob("train-*.safetensors")), "it trained before it looked"


def test_the_survey_needs_both(base: Base, bare: ImageSet, captioned: ImageSet, tmp_path: Path):
    survey = SurveyConfig(settings={"none": Defences()}, default={"mine": ("none",)}, messages=1, batch_size=2)
    for data, says in ((captioned, "no hints"), (bare, "no hints")):
        with pytest.raises(InputError, match=says):
            record_survey(survey, base, tiny.splits(data), seen=tmp_path / "seen", hidden=tmp_path / "hidden")
    assert not list(tmp_path.rglob("*.safetensors"))
