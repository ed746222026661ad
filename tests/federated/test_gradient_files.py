"""Gradients and facts are read as people have them: files, lists, vectors, per-sample gradients; or refused once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from world.foreign import TOLD, attacked, gradient, images, psnr_db, run
from world.tiny import ALPHAS

from splitlab import attack_gradient
from splitlab.core.errors import InputError


def npz(path: Path, *arrays: np.ndarray, **named: np.ndarray) -> Path:
    np.savez(path, *arrays, **named)
    return path


def arrays(shared: dict[str, Tensor]) -> list[np.ndarray]:
    return [value.numpy() for value in shared.values()]


def safetensors(shared: dict[str, Tensor], path: Path) -> Path:
    save_file(shared, path)
    return path


KINDS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "safetensors": safetensors,
    "npz by name": lambda g, path: npz(path, **{name: value.numpy() for name, value in g.items()}),
    "npz in order": lambda g, path: npz(path, *arrays(g)),
    "a path as text": lambda g, path: str(npz(path, *arrays(g))),
    "Flower's list": lambda g, _: arrays(g),
    "autograd's tuple": lambda g, _: tuple(g.values()),
    "one vector": lambda g, _: torch.cat([value.flatten() for value in g.values()]),
    "a vector of numpy": lambda g, _: np.concatenate([value.ravel() for value in arrays(g)]),
    "float64": lambda g, _: {name: value.double() for name, value in g.items()},
    "big-endian": lambda g, _: {name: value.numpy().astype(">f4") for name, value in g.items()},
    "on the tape": lambda g, _: {name: value.clone().requires_grad_(True) for name, value in g.items()},
    "sparse": lambda g, _: {name: value.to_sparse() for name, value in g.items()},
    "parameters": lambda g, _: {name: nn.Parameter(value) for name, value in g.items()},
    "None for some": lambda g, _: g | {"embed.2.weight": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_image(kind: str, model: nn.Module, shared: dict[str, Tensor], tmp_path: Path) -> None:
    suffix = "safetensors" if kind == "safetensors" else "npz"
    found, words = attacked(KINDS[kind](shared, tmp_path / f"gradient.{suffix}"), model)
    assert psnr_db(found.images, images(1)) > 60
    assert ("order" in words) == any(word in kind for word in ("order", "text", "list", "tuple", "vector"))


@pytest.mark.parametrize(("dtype", "least_db"), [(torch.float16, 60), (torch.bfloat16, 40)])
def test_gradients_of_16_bits(dtype: torch.dtype, least_db: float, model: nn.Module, shared: dict[str, Tensor]) -> None:
    found, words = attacked({name: value.to(dtype) for name, value in shared.items()}, model)
    assert psnr_db(found.images, images(1)) > least_db
    assert not words


def test_gradients_of_samples_are_attacked_one_by_one(model: nn.Module) -> None:
    clean = images(2)
    each = [gradient(model, clean[[k]], [t], run)[0] for k, t in enumerate((137, 400))]
    stacked = {name: torch.stack([part[name] for part in each]) for name in each[0]}
    found, words = attacked(stacked, model)
    assert found.timesteps.tolist() == [137, 400]
    assert psnr_db(found.images[:1], clean[:1]) > 60
    assert psnr_db(found.images[1:], clean[1:]) > 60
    assert "gradients of 2 samples" in words
    steps, _ = attacked(stacked, model, attack="timesteps")
    assert [part.timesteps.tolist() for part in steps] == [[137], [400]]


def test_what_is_no_gradient_is_refused_once(model: nn.Module, shared: dict[str, Tensor], tmp_path: Path) -> None:
    def refused(source: Any) -> str:
        with pytest.raises(InputError) as caught:
            attack_gradient(source, model=model, **TOLD)
        message = str(caught.value)
        assert "delete" not in message
        assert "\n" not in message
        return message

    values, name = list(shared.values()), "embed.0.weight"
    objects = tmp_path / "objects.npz"
    np.savez(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "Python objects, which are never opened" in refused(objects)
    torch.save(shared, tmp_path / "gradient.pt")
    before = (tmp_path / "gradient.pt").read_bytes()
    assert "safetensors" in refused(tmp_path / "gradient.pt")
    assert (tmp_path / "gradient.pt").read_bytes() == before
    (tmp_path / "half.npz").write_bytes(objects.read_bytes()[:100])
    assert "half.npz" in refused(tmp_path / "half.npz")
    assert "no such file" in refused(tmp_path / "none.safetensors")
    assert "a int is no gradient" in refused(3)
    assert "it holds no gradients" in refused({})
    assert "4 arrays without names" in refused(values[:4])
    assert "instead of" in refused(values[::-1])
    assert "holds names itself" in refused({"grads": shared})
    assert f"{name} is on the meta device" in refused(shared | {name: shared[name].to("meta")})
    assert "not of a floating-point type" in refused(shared | {name: shared[name].int()})
    assert f"{name} holds NaN or infinity" in refused(shared | {name: shared[name] * torch.nan})
    assert "every gradient is zero" in refused({key: 0 * value for key, value in shared.items()})
    assert "no number" in refused(shared | {name: np.array(["a"])})
    assert "as TensorFlow and Flax keep weights" in refused(
        shared | {key: shared[key].permute(2, 3, 1, 0) for key in ("enter.weight", "middle.weight", "leave.weight")}
    )


@pytest.mark.parametrize("value", [137, [137], (137,), 137.0, np.int64(137), np.array([137]), torch.tensor(137)])
def test_timesteps_are_granted_in_any_form(value: Any, model: nn.Module, shared: dict[str, Tensor]) -> None:
    found, _ = attacked(shared, model, timesteps=value)
    assert found.timesteps.tolist() == [137]
    assert psnr_db(found.images, images(1)) > 60


def test_facts_and_arguments_of_no_use_are_refused(model: nn.Module, shared: dict[str, Tensor]) -> None:
    def refused(**told: Any) -> str:
        with pytest.raises(InputError) as caught:
            attack_gradient(shared, model=model, **(TOLD | told))
        return str(caught.value)

    assert "timesteps: expected numbers from 0 to 999, got 1000" in refused(timesteps=1000)
    assert "timesteps: expected whole numbers, got 0.5" in refused(timesteps=0.5)
    assert "timesteps: expected numbers, got True" in refused(timesteps=True)
    assert "timesteps: expected numbers, got '137'" in refused(timesteps="137")
    assert "noise: expected [b, 3, 8, 8], got [1, 3, 4, 4]" in refused(noise=np.zeros((3, 4, 4)))
    assert "noise: it holds NaN" in refused(noise=torch.full((1, 3, 8, 8), torch.nan))
    assert "class_labels: a ConvTimeNet takes none" in refused(class_labels=1)
    assert "batch_size: expected 1 or more, got 0" in refused(batch_size=0)
    assert "alphas_cumprod: expected [T] numbers that fall" in refused(alphas_cumprod=1 - ALPHAS)
    assert "steps: expected a whole number of 1 or more, got 0" in refused(kind="weight_difference", steps=0)
    assert "scale: expected a positive number" in refused(scale=-2.0)
    assert "sign: expected 1, -1 or None, got 0" in refused(sign=0)
    assert "lr and steps are of a weight difference" in refused(lr=0.1)
    assert "kind 'delta' is unknown" in refused(kind="delta")
    assert "objective 'x0' is unknown" in refused(objective="x0")
    assert "seed: expected a whole number of 0 or more, got -1" in refused(seed=-1)
    assert "start 'here' is unknown" in refused(start="here")
    assert "stages: expected a whole number of 1 or more, got 0" in refused(stages=0)
    assert "n_starts: expected a whole number of 1 or more, got '4'" in refused(n_starts="4")


def test_a_scheduler_may_stand_for_its_alphas(model: nn.Module, shared: dict[str, Tensor]) -> None:
    found, _ = attacked(shared, model, alphas_cumprod=DDPMScheduler())
    assert psnr_db(found.images, images(1)) > 60


def test_what_the_caller_set_in_torch_is_put_aside_and_back(model: nn.Module, shared: dict[str, Tensor]) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        made_there = {name: value.clone() for name, value in shared.items()}
        found, _ = attacked(made_there, model, timesteps=torch.tensor([137]))
    assert psnr_db(found.images, images(1)) > 60
    torch.set_default_dtype(torch.float64)
    try:
        found, _ = attacked(shared, model)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert psnr_db(found.images, images(1)) > 60
    assert not any(parameter.grad is not None for parameter in model.parameters())
