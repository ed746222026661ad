"""Seeded generators of the shipped data sets: the provenance of `data.dvc`.

`python -m splitlab.data.generate data` writes `data/<split>/<name>.zip`, each a zip in the Hugging Face imagefolder
layout (`metadata.csv` with `file_name`, `conditioning_image_file_name`, `text`, `source`; PNG images beside it).
Splits never share a `source`: what stems from one photograph is all public, all held out or all private.
"""

import argparse
import csv
import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.storage import whole_file
from splitlab.data.annotators import canny
from splitlab.data.colours import COLOURS, rgb

Pixels = NDArray[np.uint8]
HEADINGS = ("file_name", "conditioning_image_file_name", "text", "source")
"""Of a split's metadata.csv."""


SHAPE_SPLITS = {"public": 4000, "heldout": 256, "private": 1000}
PHOTO_SPLITS = {"public": 3000, "heldout": 256, "private": 300}
PHOTO64_SPLITS = {"public": 600, "heldout": 64, "private": 200}
GLYPH_SPLITS = {"public": 2000, "heldout": 256}
DIGIT_TEST = 500

PUBLIC_PHOTOS = {
    "brick": "a photograph of a brick wall",
    "camera": "a photograph of a photographer with a camera",
    "clock_motion": "a photograph of a clock",
    "coins": "a photograph of coins",
    "grass": "a photograph of grass",
    "gravel": "a photograph of gravel",
    "hubble_deep_field": "a photograph of galaxies",
    "ihc": "a photograph of stained tissue",
    "moon": "a photograph of the moon",
    "motorcycle_left": "a photograph of a motorcycle",
    "page": "a photograph of a printed page",
    "retina": "a photograph of a retina",
}
HELDOUT_PHOTOS = {"coffee": "a photograph of a cup of coffee", "rocket": "a photograph of a rocket"}
PRIVATE_PHOTOS = {"astronaut": "a photograph of an astronaut", "chelsea": "a photograph of a cat"}
FACE_PROMPT = "a photograph of a face"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Sample(NamedTuple):
    """One row of a data set: two images `[h, w, 3]` / `[h, w]` uint8, a prompt, and the original it stems from."""

    image: Pixels
    hint: Pixels
    text: str
    source: str


def shapes(n: int, rng: np.random.Generator, prefix: str, size: int = 32) -> Iterator[Sample]:
    """Filled discs on coloured ground, after the fill50k task of the ControlNet authors.

    Disc and ground differ by at least a quarter of the RGB cube's diagonal, so that the disc can be located again.
    """
    names = list(COLOURS)
    for index in range(n):
        while True:
            disc, ground = (names[i] for i in rng.integers(len(names), size=2))
            if np.linalg.norm(np.subtract(rgb(disc), rgb(ground))) >= 0.25 * np.sqrt(3):
                break
        radius = rng.uniform(0.15, 0.36) * size
        centre = rng.uniform(0.8 * radius, size - 0.8 * radius, size=2)
        image = _disc(size, centre, radius, fill=rgb(disc), ground=rgb(ground))
        hint = _disc(size, centre, radius, outline=(1.0, 1.0, 1.0), ground=(0.0, 0.0, 0.0))[..., 0]
        yield Sample(image, hint, f"{disc} circle with {ground} background", f"{prefix}{index}")


def _disc(
    size: int,
    centre: NDArray[np.float64],
    radius: float,
    *,
    ground: tuple[float, ...],
    fill: tuple[float, ...] | None = None,
    outline: tuple[float, ...] | None = None,
) -> Pixels:
    """Draw an anti-aliased disc or ring: 4x supersampled, then box-averaged."""
    scale = 4
    canvas = Image.new("RGB", (size * scale, size * scale), _to8bit(ground))
    box = [*(scale * (centre - radius)), *(scale * (centre + radius))]
    ImageDraw.Draw(canvas).ellipse(
        box, fill=_to8bit(fill) if fill else None, outline=_to8bit(outline) if outline else None, width=scale
    )
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _to8bit(colour: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(255 * c) for c in colour)


def photos(n: int, rng: np.random.Generator, prompts: dict[str, str], size: int) -> Iterator[Sample]:
    """Square crops, 48 to 160 pixels wide, of photographs that scikit-image ships, scaled to `size`; Canny hints."""
    originals = {name: _packaged_photo(name) for name in prompts}
    for index in range(n):
        name = list(prompts)[index % len(prompts)]
        picture = originals[name]
        height, width = picture.shape[:2]
        side = int(rng.integers(48, min(160, height, width) + 1))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = _resize(picture[top : top + side, left : left + side], size)
        if crop.std() < 4.0:  # an empty piece of sky identifies nothing
            crop = _resize(picture[: min(height, width), : min(height, width)], size)
        yield Sample(crop, canny(crop), prompts[name], name)


def _packaged_photo(name: str) -> Pixels:
    """Read a photograph that lies in the scikit-image wheel (its accessors would download some others)."""
    import skimage.data

    path = next(Path(skimage.data.__file__).parent.glob(f"{name}.*"))
    return _rgb8(np.asarray(Image.open(path)))


def faces(size: int) -> Iterator[Sample]:
    """The 100 faces of scikit-image's `lfw_subset` (25x25 grey), scaled to `size`; Canny hints."""
    from skimage import data

    for index, grey in enumerate(data.lfw_subset()[:100]):
        face = _resize(_rgb8(np.round(255 * grey).astype(np.uint8)), size)
        yield Sample(face, canny(face), FACE_PROMPT, f"lfw{index}")


def handwritten_digits(first: int, last: int, size: int = 32) -> Iterator[Sample]:
    """scikit-learn's 8x8 handwritten digits `first` to `last`, scaled to `size`; Canny hints."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for index in range(first, last):
        grey = np.round(bunch.images[index] * (255 / 16)).astype(np.uint8)
        image = _resize(_rgb8(grey), size)
        yield Sample(image, canny(image), _digit_prompt(int(bunch.target[index])), f"handwritten{index}")


def rendered_digits(n: int, rng: np.random.Generator, prefix: str, size: int = 32) -> Iterator[Sample]:
    """Digits in the fonts that matplotlib ships, jittered, at the 8x8 of the handwritten ones, scaled to `size`."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    stems = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmr10", "cmb10", "cmss10", "cmtt10")
    fonts = sorted(path for stem in stems for path in folder.glob(f"{stem}.ttf") if "Display" not in path.name)
    for index in range(n):
        digit = index % 10
        font = ImageFont.truetype(str(fonts[rng.integers(len(fonts))]), int(rng.integers(88, 120)))
        canvas = Image.new("L", (160, 160))
        ImageDraw.Draw(canvas).text((80, 80), str(digit), fill=255, font=font, anchor="mm")
        shear, angle = rng.uniform(-0.3, 0.3), rng.uniform(-12, 12)
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (1, shear, -80 * shear, 0, 1, 0))
        canvas = canvas.rotate(angle, Image.Resampling.BILINEAR)
        width, height = int(rng.integers(5, 8)), 8  # the handwritten digits fill the frame's height
        glyph = canvas.crop(canvas.getbbox()).resize((width, height), Image.Resampling.BOX)
        grid = Image.new("L", (8, 8))
        grid.paste(glyph, (int(rng.integers(0, 9 - width)), 0))
        image = _resize(_rgb8(np.asarray(grid)), size)
        yield Sample(image, canny(image), _digit_prompt(digit), f"{prefix}{index}")


def _digit_prompt(digit: int) -> str:
    return f"the digit {DIGIT_WORDS[digit]}"


def _rgb8(picture: NDArray[np.generic]) -> Pixels:
    """Bring a photograph of any of scikit-image's layouts to `[h, w, 3]` uint8."""
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8:
        raise ValueError(f"expected a photograph of 8-bit pixels, got {pixels.dtype}")
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return pixels[..., :3]


def _resize(pixels: Pixels, size: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def write_split(path: Path, samples: Iterable[Sample], *, total: int | None = None) -> int:
    """Write `samples` to the zip `path` in imagefolder layout, byte for byte reproducible; return how many.

    Raises:
        InputError: there is a file that this function did not write, or none can be written.
    """
    refuse_foreign(path)
    rows = []
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, sample in enumerate(
            tqdm(samples, total=total, desc=f"{path.parent.name}/{path.stem}", mininterval=2)
        ):
            names = f"{index:05d}.png", f"{index:05d}_hint.png"
            for name, pixels in zip(names, (sample.image, sample.hint), strict=True):
                _add(archive, name, _png(pixels))
            rows.append([*names, sample.text, sample.source])
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(HEADINGS)
        writer.writerows(rows)
        _add(archive, "metadata.csv", table.getvalue().encode())
    return len(rows)


def refuse_foreign(path: Path) -> None:
    """Refuse to take the place of a file that `write_split` did not write.

    Raises:
        InputError: there is one.
    """
    if not path.exists():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            *pictures, last = archive.infolist()
            names = [f"{index // 2:05d}{'_hint' * (index % 2)}.png" for index in range(len(pictures))]
            same = [entry.filename for entry in pictures] == names and last.filename == "metadata.csv"
            headings = archive.read(last)[:200].decode().partition("\n")[0] if same else ""
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error):
        headings = ""
    if headings != ",".join(HEADINGS):
        raise InputError(
            f"{path}: splitlab.data.generate did not write this, and it stays; name another folder, or move it"
        )


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)


def _photo_splits(size: int, splits: dict[str, int], seed: int) -> dict[str, Callable[[], Iterator[Sample]]]:
    def rng(split: int) -> np.random.Generator:
        return np.random.default_rng([seed, split])

    def private() -> Iterator[Sample]:
        yield from faces(size)
        yield from photos(splits["private"] - 100, rng(2), PRIVATE_PHOTOS, size)

    return {
        "public": lambda: photos(splits["public"], rng(0), PUBLIC_PHOTOS, size),
        "heldout": lambda: photos(splits["heldout"], rng(1), HELDOUT_PHOTOS, size),
        "private": private,
    }


def _shape_splits(seed: int) -> dict[str, Callable[[], Iterator[Sample]]]:
    return {
        split: (lambda i=i, split=split, n=n: shapes(n, np.random.default_rng([seed, i]), split))  # type: ignore[misc]
        for i, (split, n) in enumerate(SHAPE_SPLITS.items())
    }


def _digit_splits(seed: int) -> dict[str, Callable[[], Iterator[Sample]]]:
    def glyphs(split: str, index: int) -> Callable[[], Iterator[Sample]]:
        return lambda: rendered_digits(GLYPH_SPLITS[split], np.random.default_rng([seed, index]), f"{split}-glyph")

    return {
        "public": glyphs("public", 0),
        "heldout": glyphs("heldout", 1),
        "private": lambda: handwritten_digits(0, 1797 - DIGIT_TEST),
        "private-test": lambda: handwritten_digits(1797 - DIGIT_TEST, 1797),
    }


def datasets(seed: int = 0) -> dict[str, dict[str, Callable[[], Iterator[Sample]]]]:
    """Return every shipped data set: name -> split -> a function that yields its samples."""
    return {
        "shapes": _shape_splits(seed),
        "photos": _photo_splits(32, PHOTO_SPLITS, seed + 1),
        "photos64": _photo_splits(64, PHOTO64_SPLITS, seed + 2),
        "digits": _digit_splits(seed + 3),
    }


def main(argv: list[str] | None = None) -> int:
    """Write all shipped data sets below a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where to write, one folder a data set")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    written = {
        arguments.folder / split / f"{name}.zip": samples
        for name, splits in datasets(arguments.seed).items()
        for split, samples in splits.items()
    }
    try:
        for path in written:
            refuse_foreign(path)
        for path, samples in written.items():
            write_split(path, samples())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
