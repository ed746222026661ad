"""Pictures as people have them: shown as every viewer shows them, or refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from splitlab.core.errors import InputError
from splitlab.data.pictures import FORMATS, decode, fit

RED, BLUE = (255, 0, 0), (0, 0, 255)


def file(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Return 4x2 pixels, left half red, right half blue."""
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2], pixels[:, 2:] = RED, BLUE
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3) // 2)
    shown = decode(file(picture, kind, exif=exif))
    ops = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}  # the TIFF 6.0 specification, tag 274
    expected = decode(file(picture, kind))
    for op in ops.get(orientation, []):
        expected = np.asarray(Image.fromarray(expected).transpose(Image.Transpose(op)))
    assert np.array_equal(shown, expected)


def test_16_bit_grey_keeps_its_256_levels():
    ramp = (np.arange(256) * 257).astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF", "PPM"):
        pixels = decode(file(Image.fromarray(ramp), kind))
        assert np.array_equal(pixels[..., 0], np.arange(256, dtype=np.uint8).reshape(16, 16)), kind
        assert (pixels == pixels[..., :1]).all()


def tiff(bits: int, interpretation: int, samples: bytes) -> bytes:
    """Return 2x1 grey pixels as the TIFF 6.0 specification lays them out, without compression."""
    entries = [(256, 3, 2), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, interpretation), (273, 4, 122)]
    entries += [(277, 3, 1), (278, 3, 1), (279, 4, len(samples))]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return (b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory).ljust(122, b"\0") + samples


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(16, 1, struct.pack("<HH", 0, 65535)), [0, 255]),
        (tiff(16, 0, struct.pack("<HH", 0, 65535)), [255, 0]),  # 0 is white
        (tiff(12, 1, bytes([0x00, 0x0F, 0xFF])), [0, 255]),
        (tiff(8, 0, bytes([0, 255])), [255, 0]),
    ],
)
def test_grey_is_shown_as_the_tiff_says(content: bytes, expected: list[int]):
    assert decode(content)[0, :, 0].tolist() == expected


def test_16_bit_colour_keeps_its_upper_bits():
    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 0x1234, 0) * 2 for _ in range(2))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    assert decode(content)[0, 0].tolist() == [255, 0x12, 0]


@pytest.mark.parametrize(
    ("picture", "kind", "expected"),
    [
        (Image.new("1", (2, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("L", (2, 2), 7), "PNG", (7, 7, 7)),
        (Image.new("RGB", (2, 2), RED).convert("P"), "GIF", RED),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF", RED),
        (Image.new("RGBA", (2, 2), (*RED, 255)), "PNG", RED),
        (Image.new("RGBA", (2, 2), (*RED, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (*RED, 0)), "WEBP", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (Image.new("LA", (2, 2), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (2, 2), (9, 255)), "PNG", (9, 9, 9)),
    ],
)
def test_other_modes_become_rgb_and_what_is_transparent_white(
    picture: Image.Image, kind: str, expected: tuple[int, int, int]
):
    assert decode(file(picture, kind, lossless=True))[0, 0].tolist() == list(expected)


def test_transparent_colours_of_palettes_and_rgb_are_composited():
    palette = halves().quantize(2)
    index = palette.getpixel((0, 0))
    for picture in (palette, halves()):
        content = file(picture, transparency=index if picture is palette else RED)
        assert decode(content)[0, 0].tolist() == [255, 255, 255]
        assert decode(content, background="#00ff00")[0, 0].tolist() == [0, 255, 0]
        assert decode(content)[0, 3].tolist() == list(BLUE)


def test_what_would_vanish_into_the_background_is_refused():
    lines = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    lines.putpixel((1, 2), (255, 255, 255, 255))  # white on nothing, as edges are exported
    with pytest.raises(InputError, match="all that is not transparent is white, so nothing is left: say another"):
        decode(file(lines))
    assert decode(file(lines), background="black")[..., 0].sum() == 255
    assert (decode(file(Image.new("RGBA", (4, 4), (9, 9, 9, 0)))) == 255).all()  # nothing was there


def test_content_counts_and_not_the_suffix_and_phones_may_append_pictures():
    photo = file(halves(), "JPEG")
    assert decode(photo).shape == (2, 4, 3)
    several = io.BytesIO()
    halves().save(several, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert decode(several.getvalue()).shape == (2, 4, 3)


def frames(kind: str) -> bytes:
    return file(halves(), kind, save_all=True, append_images=[Image.new("RGB", (4, 2))])


FLOAT = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
INTEGERS = Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4))
NOISE = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        *(
            (frames(kind), "it has 2 frames or pages; save the one that counts")
            for kind in ("GIF", "WEBP", "PNG", "TIFF")
        ),
        (file(FLOAT, "TIFF"), "mode F: it holds floating-point numbers, and nothing says which is white"),
        (file(INTEGERS, "TIFF"), "mode I: it holds 32-bit integers"),
        (file(Image.fromarray(np.zeros((2, 2), np.uint16)), transparency=0), "16-bit grey with a transparent colour"),
        (b"", "the file is empty"),
        (b"<html>", "it is no picture in a format that is read here .PNG, JPEG"),
        (b"version https://git-lfs.github.com/spec/v1", "it is no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no picture"),  # would start Ghostscript
        (file(Image.fromarray(NOISE))[:5000], "truncated"),
        (file(Image.fromarray(NOISE), "JPEG")[:1000], "truncated"),
        (file(Image.fromarray(NOISE), "TIFF")[:2000], "not enough image data|truncated"),
    ],
)
def test_what_is_ambiguous_or_damaged_is_refused(content: bytes, says: str):
    with pytest.raises(InputError, match=says) as caught:
        decode(content)
    assert str(caught.value)
    assert "0x" not in str(caught.value)  # no address: equal files, equal messages


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs_are_refused_before_they_are_decoded(side: int):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    with pytest.raises(InputError, match="exceeds limit"):
        decode(content)


def test_only_raster_formats_are_tried():
    assert not {"EPS", "PDF", "WMF", "FITS", "HDF5"} & set(FORMATS)
    assert TiffImagePlugin  # 32-bit TIFFs above come from here


def gradient(width: int, height: int) -> np.ndarray:
    return np.tile(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, 1, 3))


@pytest.mark.parametrize(
    ("width", "height", "options"),
    [
        (8, 8, {}),
        (12, 8, {"crop": "centre"}),
        (20, 20, {"resize": "stretch"}),
        (12, 30, {"resize": "stretch"}),
        (20, 20, {"resize": "shortest"}),
        (31, 20, {"resize": "shortest", "crop": "centre"}),
        (4, 9, {"resize": "shortest", "crop": "centre", "resampling": "nearest"}),
        (60_000, 1, {"resize": "shortest", "crop": "centre"}),
    ],
)
def test_pictures_come_to_one_square_size(width: int, height: int, options: dict):
    assert fit(gradient(width, height), 8, **options).shape == (8, 8, 3)


def test_a_picture_of_that_size_stays_as_it_is_and_the_centre_is_the_centre():
    picture = gradient(8, 8)
    for options in ({}, {"resize": "stretch"}, {"resize": "shortest", "crop": "centre"}):
        assert np.array_equal(fit(picture, 8, **options), picture)
    assert np.array_equal(fit(gradient(12, 8), 8, crop="centre"), gradient(12, 8)[:, 2:10])


@pytest.mark.parametrize(
    ("width", "height", "options"),
    [(8, 9, {}), (9, 9, {}), (7, 20, {"crop": "centre"}), (16, 8, {"resize": "shortest"})],
)
def test_what_has_another_size_in_the_end_is_refused(width: int, height: int, options: dict):
    with pytest.raises(InputError, match=f"is {width}x{height} pixels, expected 8x8"):
        fit(gradient(width, height), 8, **options)
