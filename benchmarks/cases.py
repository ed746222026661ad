"""Inputs as people have them, case by case: `python benchmarks/cases.py [NAME ...]`, once the data are pulled.

Every case makes a small input of a kind that has been reported to go wrong, in a scratch folder, gives it to splitlab,
and says whether what happened is right: loaded as it was meant, or refused in one `InputError` that says why. Exits
with 1 if any case is wrong. `tests/pipeline/test_cases.py` runs them as well.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from splitlab import ROOT, TrainConfig, attack_gradient, load, load_base, parse, resolve, train
from splitlab.core.errors import InputError
from splitlab.dp.finetune import DPConfig, finetune
from splitlab.params import load_params, load_split

CASES: dict[str, Callable[[Path], None]] = {}
BASE = ROOT / "models/base"
WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Register a case under its function's name; it raises AssertionError where splitlab is wrong."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


@contextmanager
def refused(*words: str, without: str = "\0") -> Iterator[None]:
    """Expect one InputError whose text names all `words`, and nothing `without`."""
    message = None
    try:
        yield
    except InputError as error:
        message = str(error)
    assert message is not None, "accepted"
    missing = [word for word in words if word.lower() not in message.lower()]
    assert not missing, f"the error does not say {missing}: {message}"
    assert without not in message, f"the error says {without!r}: {message}"


def folder(path: Path, texts: list[object], *, hints: bool = True, table: str = "jsonl", **options: str) -> Path:
    """Write an imagefolder of 32x32 images, one per text; `options` go to `Path.write_text`."""
    path.mkdir(parents=True)
    rows: list[dict[str, object]] = []
    generator = np.random.default_rng(len(str(path)))
    for i, text in enumerate(texts):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path / f"{i}.png")
        row: dict[str, object] = {"file_name": f"{i}.png"}
        if hints:
            Image.new("L", (32, 32), 40 * (i % 6)).save(path / f"{i}_edge.png")
            row["conditioning_image_file_name"] = f"{i}_edge.png"
        rows.append(row | {"text": text})
    if table == "jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    (path / f"metadata.{table}").write_text("\n".join(lines) + "\n", **options)
    return path


@case
def caption_list(scratch: Path) -> None:
    with refused("row 0", "text"):
        load(folder(scratch / "data", [["a kite", "a toy"]] * 4))


@case
def csv_bom(scratch: Path) -> None:
    data = load(folder(scratch / "data", [f"patch {i}" for i in range(4)], table="csv", encoding="utf-8-sig"))
    assert len(data) == 4, f"{len(data)} images"


@case
def csv_unquoted_commas(scratch: Path) -> None:
    with refused("row", "quote"):
        load(folder(scratch / "data", [f"a kite, on a blue sky, {i}" for i in range(4)], table="csv"))


@case
def dataset_path(scratch: Path) -> None:
    params = {**load_params(), "data": {"root": "data"}}
    splits = ("private", "public", "heldout")
    for split in splits:
        folder(scratch / "three" / split, [split] * 3)
    for split in splits:
        assert set(load_split(str(scratch / "three"), split, params).prompts) == {split}
    folder(scratch / "single", ["red circle"] * 3)
    with refused("private", "public"):
        load_split(str(scratch / "single"), "private", params)


@case
def exif_rotated(scratch: Path) -> None:
    path = folder(scratch / "data", ["a", "b"])
    picture = Image.new("RGB", (32, 32), (255, 0, 0))  # red on top, blue below
    picture.paste((0, 0, 255), (0, 16, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter clockwise
    picture.save(path / "0.png", format="JPEG", exif=exif, quality=95)
    red, _, blue = load(path).images[0, :, 0, 0]
    assert blue - red > 1.6, "the pixels are as stored, not as shown"


@case
def png_16_bit(scratch: Path) -> None:
    path = folder(scratch / "data", ["a", "b"])
    ramp = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(path / "0.png")
    image = load(path).images[0]
    assert image.unique().numel() == 256, f"{image.unique().numel()} grey levels"
    assert abs(image.mean()) < 0.01, f"mean {image.mean():.2f}"


@case
def text_to_image_folder(scratch: Path) -> None:
    data = load(folder(scratch / "data", ["red circle with blue background"] * 8, hints=False))
    base = load_base(BASE)
    config = DPConfig(conditioning="text", noise_multiplier=1.0, batch_size=2, steps=1)
    finetune("case", config, base, data, out=scratch / "out", cache=scratch / "cache")
    with refused("hint"):
        train("case", TrainConfig(steps=1, batch_size=2), base, data, data, out=scratch / "t", cache=scratch / "cache")


@case
def yaml_learning_rate(scratch: Path) -> None:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    values = yaml.safe_load("{lr: 1e-4, steps: 1e3}")  # as a reader of YAML 1.1 gives them: texts
    config = parse(TrainConfig, values, where="runs.mine")
    assert (config.lr, config.steps) == (1e-4, 1000), config
    assert content, "params.yaml is empty"


@case
def out_folder_kept(scratch: Path) -> None:
    (scratch / "out").mkdir()
    notes = scratch / "out" / "notes.txt"
    notes.write_text("three years of work")
    base, data = load_base(BASE), load("data/private/shapes.zip", limit=8)
    config = DPConfig(conditioning="text", noise_multiplier=1.0, batch_size=2, steps=1)
    with refused("out"):
        finetune("case", config, base, data, out=scratch / "out", cache=scratch / "cache")
    with refused("out"):
        train("case", TrainConfig(steps=1, batch_size=2), base, data, data, out=scratch / "out", cache=scratch / "c")
    assert notes.read_text() == "three years of work"
    assert not list((scratch / "cache").glob("dp-*")), "steps were taken before the refusal"


@case
def own_data_in_data_folder(scratch: Path) -> None:
    clone = scratch / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    mine = folder(clone / "data/private/mine", ["red circle"] * 4)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    answer = subprocess.run(["make", "-o", "setup", "data"], cwd=clone, capture_output=True, text=True, check=False)
    text = answer.stdout + answer.stderr
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before, "files were deleted"
    assert "--force" not in text, text
    assert answer.returncode, "accepted"
    assert "datasets" in text, f"it does not say where own data go: {text}"


def changed_base(scratch: Path) -> Path:
    return Path(shutil.copytree(BASE, scratch / "base"))


def edit_weights(base: Path, part: str, change: Callable[[dict], dict]) -> None:
    path = base / part / WEIGHTS[part]
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def edit_config(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def eval_loss(scratch: Path, source: Path) -> float:
    """Train two steps on a base: what it takes to say that it works."""
    data = load("data/private/shapes.zip", limit=6)
    config = TrainConfig(steps=2, batch_size=3, eval_samples=2, published_key=0)
    out, cache = scratch / f"out-{source.name}", scratch / f"cache-{source.name}"
    return float(train("case", config, load_base(source), data, data, out=out, cache=cache)["eval_loss"])


def in_fp16(base: Path) -> None:
    for part in WEIGHTS:
        edit_weights(base, part, lambda t: {k: v.half() if v.is_floating_point() else v for k, v in t.items()})
    edit_config(base / "text_encoder/config.json", dtype="float16")


@case
def base_stored_in_fp16(scratch: Path) -> None:
    base = changed_base(scratch)
    in_fp16(base)
    loss, full = eval_loss(scratch, base), eval_loss(scratch, Path(shutil.copytree(BASE, scratch / "full")))
    assert abs(loss / full - 1) < 0.02, f"eval loss {loss} against {full} of 32-bit files"


@case
def base_fp16_variant_only(scratch: Path) -> None:
    base = changed_base(scratch)
    in_fp16(base)
    for path in list(base.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert eval_loss(scratch, base) > 0


@case
def base_inpainting(scratch: Path) -> None:
    base = changed_base(scratch)

    def nine_channels(tensors: dict) -> dict:
        weight = tensors["conv_in.weight"]
        return tensors | {"conv_in.weight": torch.cat([weight, torch.zeros(weight.shape[0], 5, 3, 3)], 1)}

    edit_weights(base, "unet", nine_channels)
    edit_config(base / "unet/config.json", in_channels=9)
    with refused("9"):
        load_base(base)


@case
def base_tokenizer_without_length(scratch: Path) -> None:
    base = changed_base(scratch)
    edit_config(base / "tokenizer/tokenizer_config.json", model_max_length="absent")
    positions = json.loads((base / "text_encoder/config.json").read_text())["max_position_embeddings"]
    assert load_base(base).text_shape[0] == positions
    assert eval_loss(scratch, base) > 0


@case
def base_with_missing_tensors(scratch: Path) -> None:
    base = changed_base(scratch)
    edit_weights(base, "unet", lambda t: {k: v for k, v in t.items() if not k.startswith("mid_block.")})
    with refused("mid_block", "unet"):
        load_base(base)


@case
def hub_id_in_params(scratch: Path) -> None:
    with refused("hub id stable-diffusion-v1-5/no-such-model"):  # the hub was asked, whether it answered or not
        load_base(resolve("stable-diffusion-v1-5/no-such-model"))


def gradient_of_one_image(scratch: Path) -> tuple[UNet2DModel, dict[str, torch.Tensor], torch.Tensor]:
    """Return a random model, saved as `unet`, its gradient on an 8x8 image at t = 137, and the image."""
    torch.manual_seed(1)
    model = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    ramp = torch.linspace(-0.8, 0.8, 8)
    image = torch.stack([ramp.expand(8, 8), ramp.expand(8, 8).T, -ramp.expand(8, 8)])[None]
    t, noise = torch.tensor([137]), torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    alpha = DDPMScheduler().alphas_cumprod[t][:, None, None, None]
    loss = (model(alpha.sqrt() * image + (1 - alpha).sqrt() * noise, t).sample - noise).square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    model.save_pretrained(scratch / "unet")
    return model, {name: value.contiguous() for name, value in gradient.items()}, image


def psnr_of(path: Path, model: Path, image: torch.Tensor) -> float:
    answer = attack_gradient(path, model=model, attack="unknown_noise", n_starts=6, n_evals=150)
    assert answer.timesteps.tolist() == [137], answer.timesteps
    return float(-10 * torch.log10(((answer.images - image) / 2).square().mean()))


@case
def gradient_model_without_sample_size(scratch: Path) -> None:
    model, gradient, _ = gradient_of_one_image(scratch)
    save_file(gradient, scratch / "gradient.safetensors")
    model.register_to_config(sample_size=None)
    model.save_pretrained(scratch / "unet")
    with refused("size="):
        attack_gradient(scratch / "gradient.safetensors", model=scratch / "unet")


@case
def gradient_name_prefixes(scratch: Path) -> None:
    _, gradient, image = gradient_of_one_image(scratch)
    for prefix in ("module.", "_orig_mod.", "_module.", "unet."):
        save_file({prefix + name: value for name, value in gradient.items()}, scratch / "gradient.safetensors")
        assert psnr_of(scratch / "gradient.safetensors", scratch / "unet", image) > 60, prefix


@case
def gradient_not_safetensors(scratch: Path) -> None:
    _, gradient, image = gradient_of_one_image(scratch)
    path = scratch / "gradient.pt"
    torch.save(gradient, path)  # what other people's clients write; nothing here reads it
    with refused("safetensors", without="delete"):
        attack_gradient(path, model=scratch / "unet")
    np.savez(scratch / "gradient.npz", **{name: value.numpy() for name, value in gradient.items()})
    assert psnr_of(scratch / "gradient.npz", scratch / "unet", image) > 60


@case
def gradient_pickled_model(scratch: Path) -> None:
    model, gradient, _ = gradient_of_one_image(scratch)
    save_file(gradient, scratch / "gradient.safetensors")
    shutil.rmtree(scratch / "unet")
    model.save_pretrained(scratch / "unet", safe_serialization=False)
    with refused("safetensors"):
        attack_gradient(scratch / "gradient.safetensors", model=scratch / "unet")


@case
def gradient_scaled(scratch: Path) -> None:
    _, gradient, image = gradient_of_one_image(scratch)
    for factor in (1.0, 65536.0, 0.25, 192.0):
        save_file({name: value * factor for name, value in gradient.items()}, scratch / "gradient.safetensors")
        psnr = psnr_of(scratch / "gradient.safetensors", scratch / "unet", image)
        assert psnr > 60, f"{psnr:.1f} dB at {factor:g} times the gradient"


def run(name: str) -> str:
    """Run one case in a scratch folder; return what is wrong, "" if nothing is."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            CASES[name](Path(scratch))
        except AssertionError as error:
            return str(error) or f"it fails: {traceback.extract_tb(error.__traceback__)[-1].line}"
        except Exception as error:  # whatever else escapes is what this script is there to find
            return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), help="cases to run; all, if none is named")
    names = parser.parse_args().names
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"no case is called {', '.join(unknown)}; there: {', '.join(CASES)}")
    wrong = 0
    for name in names:
        began = time.monotonic()
        problem = run(name)
        wrong += bool(problem)
        verdict = "WRONG" if problem else "right"
        print(f"{verdict}  {name:36} {time.monotonic() - began:5.1f} s  {problem[:300]}", flush=True)
    print(f"{wrong} of {len(names)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
