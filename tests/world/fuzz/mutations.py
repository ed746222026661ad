"""Data sets with bytes changed at random: whatever comes, it is read or refused by one InputError.

`python tests/world/fuzz/mutations.py 100000` tries as many and says how many were read; the suite tries a few hundred.
"""

import io
import json
import random
import resource
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet, load

SIZE = 8
TOKENS = (
    *(
        b"\0",
        b"\xff",
        b"\n",
        b"\r",
        b'"',
        b",",
        b";",
        b"\t",
        b"{",
        b"}",
        b"[",
        b"NaN",
        b"null",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
    ),
    *(
        b"\xff\xfe",
        b"../",
        b"/etc/passwd",
        b"9" * 5000,
        b"\\ud800",
        b"file_name",
        b"text",
        b"true",
        b"1e999",
        b"(" * 999,
    ),
)


def _pictures() -> dict[str, bytes]:
    """Return one small picture per format and mode."""
    pixels = np.random.default_rng(0).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
    picture, found = Image.fromarray(pixels), {}
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        **{f"{mode}.png": ("PNG", picture.convert(mode)) for mode in ("RGB", "L", "P", "1", "RGBA", "LA")},
        **{f"{mode}.tif": ("TIFF", picture.convert(mode)) for mode in ("RGB", "CMYK", "F", "I")},
        **{f"x.{suffix}": (kind, picture) for suffix, kind in (("jpg", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP"))},
        **{f"x.{suffix}": (kind, picture) for suffix, kind in (("gif", "GIF"), ("ppm", "PPM"), ("jp2", "JPEG2000"))},
        "16.png": ("PNG", Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)),
    }
    for name, (kind, content) in kinds.items():
        buffer = io.BytesIO()
        content.save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        found[name] = buffer.getvalue()
    return found


def originals(folder: Path) -> Iterator[tuple[str, bytes, dict]]:
    """Yield (name of the file that is changed, its content, options); what else belongs to it is put into `folder`."""
    pictures = _pictures()
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    names = list(pictures)[:3]
    rows = [{"file_name": name, "text": f"a “thing”, {name}", "label": 1} for name in names]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = "file_name,text,label\n" + "".join(f'{r["file_name"]},"{r["text"]}",1\n' for r in rows)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, pictures[name])
        archive.writestr("metadata.csv", table)
    for name, content in pictures.items():
        yield name, content, {}
    yield "metadata.csv", table.encode(), {}
    yield "metadata.jsonl", lines.encode(), {"prompts": "a {label}"}
    yield "prompt.json", lines.replace("file_name", "target").replace("text", "prompt").encode(), {}
    yield "x.zip", buffer.getvalue(), {}
    yield "x.parquet", _parquet(pictures["RGB.png"]), {"prompts": "a {label}"}


def _parquet(picture: bytes) -> bytes:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"image": [{"bytes": picture, "path": None}] * 2, "label": [0, 1]}
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(buffer)
    return buffer.getvalue()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return `content` with a few bytes changed, put in, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(changed) + 1)
        what = draw.randrange(5)
        if what == 0 and changed:
            changed[place % len(changed)] = draw.randrange(256)
        elif what == 1:
            changed[place:place] = draw.choice(TOKENS)
        elif what == 2:
            del changed[place : place + draw.choice((1, 4, 64))]
        elif what == 3:
            changed[place:place] = changed[place : place + draw.choice((1, 8, 64))]
        else:
            changed = changed[: max(place, 1)] if draw.random() < 0.2 else changed
    return bytes(changed)


def attempt(n: int, *, seed: int = 0, said: Callable[[str], None] = lambda text: None) -> Counter[str]:
    """Try `n` mutations of all originals in turn; return how many were read and how many refused.

    Anything but an InputError goes up, with the file's name and the number of the try.
    """
    outcomes: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp())
    try:
        known = list(originals(folder))
        for number in range(n):
            name, content, options = known[number % len(known)]
            changed = mutated(content, random.Random(f"{seed}/{number}"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd metadata
                outcomes[_try(folder, name, changed, options, number)] += 1
            if number % 1000 == 999:
                said(f"{number + 1}: {dict(outcomes)}")
    finally:
        shutil.rmtree(folder)
    return outcomes


def is_picture(name: str) -> bool:
    """Say whether a file of that name is a picture, not a table or an archive."""
    return Path(name).suffix not in (".zip", ".parquet") and not name.startswith(("metadata", "prompt"))


def read(folder: Path, name: str, content: bytes, options: dict) -> ImageSet:
    """Load the data set that one file with this content makes."""
    place = folder / ("one" if is_picture(name) else "") / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(content)
    try:
        source = place if name.startswith("x.") and not is_picture(name) else place.parent
        return load(source, hints="canny", size=SIZE, resize="stretch", **options)
    finally:
        place.unlink()


def _try(folder: Path, name: str, content: bytes, options: dict, number: int) -> str:
    try:
        data = read(folder, name, content, options)
        assert data.images.isfinite().all()
        assert data.images.abs().max() <= 1
        assert all(isinstance(text, str) for text in data.prompts)
        return "read"
    except InputError:
        return "refused"
    except Exception as error:
        error.add_note(f"try {number}: {name}")
        raise


if __name__ == "__main__":
    print(
        attempt(int(sys.argv[1]), said=print),
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB at most",
    )
