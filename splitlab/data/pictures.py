"""Picture files to pixels: decoded as every viewer shows them and brought to one square size, or refused."""

import io
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from splitlab.core.errors import InputError

Pixels = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
"""What is read, by content and not by suffix."""

Image.init()  # Pillow knows some of these formats only then
SUFFIXES = tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")))

TIFF_BITS, TIFF_INTERPRETATION = 258, 262
"""Tags: the bits per sample, and whether 0 is white (0) or black (1)."""

RESIZE = ("none", "stretch", "shortest")
CROP = ("none", "centre")
RESAMPLING = {mode.name.lower(): mode for mode in Image.Resampling}


def decode(content: bytes, *, background: str = "white") -> Pixels:
    """Decode a picture file to `[h, w, 3]` uint8.

    The EXIF orientation is applied, grey of 12 or 16 bits is scaled so that 0 is black and the largest number white (or
    the other way round, where a TIFF says so), what is transparent is composited on `background`, and other modes
    (palette, CMYK, 1-bit, ...) are converted. Colour profiles are not applied.

    Raises:
        InputError: it is no picture, damaged, too large (decompression bombs), has several frames, holds numbers of
            which nobody says what is white (floating-point and 32-bit integers), or shows nothing on `background`. The
            message is the reason alone.
    """
    if not content:
        raise InputError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                frames = getattr(picture, "n_frames", 1)
                if frames > 1 and picture.format != "MPO":  # an MPO, as phones write it, is a JPEG with more behind it
                    raise InputError(
                        f"it has {frames} frames or pages; save the one that counts as a picture of its own"
                    )
                picture.load()
                shown = ImageOps.exif_transpose(picture)  # a copy, without the tags
                if picture.format == "TIFF" and shown.mode.startswith("I;16"):
                    return _grey(shown, getattr(picture, "tag_v2", {}))
                return _rgb(shown, picture.format, background)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"it is no picture in a format that is read here ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise InputError(str(error).strip() or type(error).__name__) from None


def _rgb(picture: Image.Image, kind: str | None, background: str) -> Pixels:
    """Convert a picture of any mode to RGB pixels."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind in ("PNG", "PPM")):
        if "transparency" in picture.info:
            raise InputError("it is 16-bit grey with a transparent colour; save it without either")
        return _grey(picture)
    if picture.mode in ("I", "F"):
        what = "32-bit integers" if picture.mode == "I" else "floating-point numbers"
        raise InputError(
            f"mode {picture.mode}: it holds {what}, and nothing says which is white; save it with 8 or 16 bits"
        )
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("RGB"))
    picture = picture.convert("RGBA")
    ground = Image.new("RGBA", picture.size, (*ImageColor.getrgb(background)[:3], 255))
    shown = np.asarray(Image.alpha_composite(ground, picture).convert("RGB"))
    if np.ptp(np.asarray(picture)[..., 3]) and not np.ptp(shown, axis=(0, 1)).any():
        raise InputError(f"all that is not transparent is {background}, so nothing is left: say another background")
    return shown


def _grey(picture: Image.Image, tags: Mapping[int, Any] = MappingProxyType({})) -> Pixels:
    """Scale grey of 16 bits, or as many as the `tags` of a TIFF say, to RGB pixels; in a TIFF, 0 may be white."""
    white = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    grey = np.asarray(picture).astype(np.float64).clip(0, white) * 255 / white
    if tags.get(TIFF_INTERPRETATION) == 0:
        grey = 255 - grey
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def fit(pixels: Pixels, size: int, *, resize: str = "none", crop: str = "none", resampling: str = "lanczos") -> Pixels:
    """Bring `[h, w, 3]` to `[size, size, 3]`.

    Args:
        pixels: the picture.
        size: the height and width wanted.
        resize: "stretch" to `size` x `size`; scale the "shortest" side to `size`, in proportion; or "none".
        crop: "centre": cut a square out of the middle, as large as `resize` leaves it; or "none".
        resampling: a key of `RESAMPLING`.

    Raises:
        InputError: the result is not `size` x `size`. The message is the reason alone.
    """
    height, width = pixels.shape[:2]
    side = size if resize == "none" else min(height, width)
    part = pixels
    if crop == "centre" and side <= min(height, width):
        top, left = (height - side) // 2, (width - side) // 2
        part = pixels[top : top + side, left : left + side]
    if resize == "stretch" or (resize == "shortest" and part.shape[0] == part.shape[1]):
        part = resized(part, size, size, resampling=resampling)
    if part.shape[:2] != (size, size):
        raise InputError(f"is {width}x{height} pixels, expected {size}x{size}")
    return part


def resized(pixels: Pixels, width: int, height: int, *, resampling: str = "lanczos") -> Pixels:
    """Return `pixels` scaled to `width` x `height`; the same ones where they have that size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), RESAMPLING[resampling]))
