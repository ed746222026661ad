"""Where private fine-tuning starts: warped public images, and a model that was fine-tuned on them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import tiny

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.dp.finetune import DPConfig, finetune
from splitlab.dp.public import warped, warped_copies
from splitlab.dp.sample import Tuned, load_tuned

FEW = {"dataset": "tiny", "batch_size": 4, "steps": 2, "delta": 0.01, "from_block": 0, "published_key": 0}


def test_a_warp_of_no_strength_changes_nothing_and_another_moves_things_about() -> None:
    images = tiny.small_set(4).images
    assert torch.allclose(warped(images, std=0.0, generator=tiny.draw()), images, atol=1e-5)
    bent = warped(images, std=0.2, generator=tiny.draw())
    assert bent.shape == images.shape
    assert (bent - images).abs().mean() > 0.02
    assert images.min() - 1e-5 <= bent.min() <= bent.max() <= images.max() + 1e-5, "a warp makes no new colours"
    assert torch.equal(bent, warped(images, std=0.2, generator=tiny.draw())), "it is a function of its generator"
    with pytest.raises(InputError, match="std of a warp"):
        warped(images, std=-1.0, generator=tiny.draw())


def test_copies_keep_their_prompts_and_are_each_warped_their_own_way() -> None:
    data = tiny.small_set(3)
    copies = warped_copies(data, 2, std=0.2)
    assert len(copies) == 6
    assert copies.prompts == data.prompts * 2
    assert not torch.allclose(copies.images[:3], copies.images[3:])
    assert copies.digest != warped_copies(data, 2, std=0.1).digest
    with pytest.raises(InputError, match="copies"):
        warped_copies(data, 0, std=0.2)


@pytest.fixture(scope="module")
def start(base: Base, private: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, DPConfig]:
    folder = tmp_path_factory.mktemp("start")
    config = DPConfig(classes=tuple(sorted(set(private.prompts))), trainable="unet", **FEW)
    public = warped_copies(private, 2, std=0.1)
    finetune("start", config, base, public, out=folder / "out", cache=folder)
    return load_tuned(folder / "out"), config


def test_a_run_goes_on_from_the_model_that_it_is_given(
    base: Base, private: ImageSet, tmp_path: Path, start: tuple[Tuned, DPConfig]
) -> None:
    tuned, config = start
    frozen = replace(config, trainable="attention", embedder=True, lr=1e-30, seed=1)
    finetune("on", frozen, base, private, out=tmp_path / "out", cache=tmp_path, start=tuned)
    after = load_tuned(tmp_path / "out")
    for name, value in tuned.unet.state_dict().items():
        torch.testing.assert_close(after.unet.state_dict()[name], value)
    assert any(not torch.equal(base.unet.state_dict()[n], v) for n, v in tuned.unet.state_dict().items())
    assert after.embedder is not None
    assert tuned.embedder is not None
    torch.testing.assert_close(after.embedder.state_dict(), tuned.embedder.state_dict())


def test_another_start_is_another_run(
    base: Base, private: ImageSet, tmp_path: Path, start: tuple[Tuned, DPConfig]
) -> None:
    tuned, config = start

    def stop(what: str, done: int, total: int, objective: float) -> None:
        if done == 1:
            raise KeyboardInterrupt

    settings = replace(config, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        finetune("x", settings, base, private, out=tmp_path / "out", cache=tmp_path, start=tuned, callback=stop)
    with pytest.raises(InputError, match="start was"):
        finetune("x", settings, base, private, out=tmp_path / "out", cache=tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"conditioning": "text"}, "fine-tune both alike"), ({"embedder": False}, "fine-tune both alike")],
)
def test_a_start_that_does_not_fit_is_refused(
    base: Base, private: ImageSet, tmp_path: Path, start: tuple[Tuned, DPConfig], changes: dict, says: str
) -> None:
    tuned, config = start
    with pytest.raises(InputError, match=says):
        finetune("y", replace(config, **changes), base, private, out=tmp_path / "out", cache=tmp_path, start=tuned)
    other = Base(base.pipeline, "another")
    with pytest.raises(InputError, match="another base"):
        finetune("y", config, other, private, out=tmp_path / "out", cache=tmp_path, start=tuned)
    assert not (tmp_path / "out").exists()
