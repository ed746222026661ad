"""How the rows of a source become samples: which columns are meant, sizes, hints, prompts; nothing is guessed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import ImageColor

from splitlab.core.config import Natural, Settings, one_of
from splitlab.core.errors import InputError
from splitlab.data.annotators import ANNOTATORS
from splitlab.data.captions import caption
from splitlab.data.layouts import LAYOUT, PICTURE_COLUMNS, Listing
from splitlab.data.pictures import CROP, RESAMPLING, RESIZE, Pixels, decode, fit, resized

COLUMNS = {
    "image": PICTURE_COLUMNS,
    "conditioning_image": ("conditioning_image_file_name", "conditioning_image"),
    "text": ("text",),
    "label": ("label",),
    "source": ("source",),
}
"""What a row is made of, and what its column may be called where nobody says: the first name that is there."""


LARGEST = 8192
"""Pixels along one side: more is a mistake, and the memory would be gone before anybody is told."""


@dataclass(frozen=True)
class ReadOptions(Settings):
    """How a source is read.

    Attributes:
        columns: what is meant by which column of the source, e.g. `{image: img, text: caption}`. Besides those: `label`
            (a class, for `prompts`), `conditioning_image` (the hint), `source` (what the sample stems from: all that
            stems from one original comes into one split, and messages name it). "": there is none.
        prompts: makes the prompts, from the label where `{label}` stands in it: "a photograph of a {label}". Empty:
            they are the column `text`, and without it there are none, which is enough where no model is asked by text.
        labels: the names of the classes, a list by number or a mapping by label, where the source does not know them.
        hints: "column"; "none"; an annotator that makes them from the images, "canny"; or "auto": the column if there
            is one, else none.
        size: the height and width of the images, pixels (they are square); 0: the first image's.
        resize: how images come to that size: "none" (they must have it), "stretch" (both sides), or "shortest" (the
            shorter side, in proportion). Hints of another size than their image are then first brought to its size.
        crop: "none", or "centre": cut a square out of the middle, after "shortest".
        resampling: "lanczos", "bicubic", "bilinear", "box", "hamming" or "nearest".
        background: the colour behind transparent images, by name or as #rrggbb.
        limit: read the first that many rows of the source only; 0: all.
    """

    columns: dict[str, str] = field(default_factory=dict)
    prompts: str = ""
    labels: Any = ()
    hints: Annotated[str, one_of(("auto", "column", "none", *ANNOTATORS))] = "auto"
    size: Natural = 0
    resize: Annotated[str, one_of(RESIZE)] = "none"
    crop: Annotated[str, one_of(CROP)] = "none"
    resampling: Annotated[str, one_of(RESAMPLING)] = "lanczos"
    background: str = "white"
    limit: Natural = 0

    def __post_init__(self) -> None:
        """Refuse what is unknown or contradicts itself."""
        super().__post_init__()
        for key in self.columns:
            if key not in COLUMNS:
                raise InputError(f"columns: {key!r} is none of {', '.join(COLUMNS)}")
        if self.size > LARGEST:
            raise InputError(f"size is the side of a picture in pixels, {LARGEST} at most, got {self.size}")
        if not self.size and (self.resize, self.crop) != ("none", "none"):
            raise InputError("resize and crop lead to a size: give size too")
        if self.resize == "stretch" and self.crop != "none":
            raise InputError("stretch leaves nothing to crop: take resize 'shortest', or leave crop out")
        if left := re.search(r"\{(?!label\}).*", self.prompts):
            raise InputError(f"prompts: {left[0]!r} cannot be filled in; only {{label}} can")
        if not isinstance(self.labels, Mapping | Sequence) or isinstance(self.labels, str):
            raise InputError(f"labels: expected a list or a mapping of names, got {self.labels!r}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise InputError(f"background {self.background!r} is no colour; give a name or #rrggbb") from None


class Samples(NamedTuple):
    """Decoded rows: images and hints `[n, size, size, 3]` uint8, n prompts ("" without any), n names of originals."""

    images: Pixels
    hints: Pixels | None
    prompts: list[str]
    sources: list[str]


def read(listing: Listing, options: ReadOptions, indices: Sequence[int]) -> Samples:
    """Decode the rows `indices` of a source.

    Raises:
        InputError: a column is missing, or a row holds what cannot be read; the message names row, column and file.
    """
    if not indices:
        raise InputError(f"{listing.name}: the data set is empty; {LAYOUT}")
    reader = _Reader(listing, options)
    images, hints, prompts, sources = [], [], [], []
    for index in indices:
        try:
            image, hint, source = reader.pictures(index)
            prompts.append(reader.prompt(index))
        except InputError as error:
            raise InputError(f"{listing.name}: {listing.place(index)}: {error}") from None
        images.append(image)
        sources.append(source)
        if hint is not None:
            hints.append(hint)
    return Samples(np.stack(images), np.stack(hints) if hints else None, prompts, sources)


def column_of(listing: Listing, options: ReadOptions, role: str, *, needed: bool = False) -> str:
    """Return the source's name for one of `COLUMNS`; "" if it has none.

    Raises:
        InputError: the one that `options.columns` names is not there, or none is and one is `needed`.
    """
    asked = options.columns.get(role)
    if asked == "":
        return ""
    names = (asked,) if asked else COLUMNS[role]
    found = next((name for name in names if name in listing.columns), "")
    if not found and (needed or asked):
        raise InputError(
            f"{listing.name}: no column {' or '.join(names)} among {', '.join(listing.columns) or 'none'}; say which "
            f"holds it, as in columns: {{{role}: <name>}}"
        )
    return found


class _Reader:
    """Reads one source's rows, all in one way. Messages of its errors do not say which row."""

    def __init__(self, listing: Listing, options: ReadOptions) -> None:
        self.listing, self.options, self.size = listing, options, options.size
        self.image = column_of(listing, options, "image", needed=True)
        self.hint = column_of(listing, options, "conditioning_image", needed=options.hints == "column")
        self.annotator = ANNOTATORS.get(options.hints)
        if self.annotator or options.hints == "none":
            self.hint = ""
        self.text = "" if options.prompts else column_of(listing, options, "text")
        self.label = column_of(listing, options, "label", needed="{label}" in options.prompts)
        self.source = column_of(listing, options, "source")

    def pictures(self, index: int) -> tuple[Pixels, Pixels | None, str]:
        """Return a row's image and hint in their final size, and what it stems from."""
        row = self.listing.rows[index]
        name, image = self._picture(row, self.image)
        hint = None
        if self.hint:
            hint_name, hint = self._picture(row, self.hint)
            hint = self._like(image, hint, f"image {name}", f"hint {hint_name}")
        fitted = self._fitted(image, f"image {name}")
        if hint is not None:
            hint = self._fitted(hint, f"hint {hint_name}")
        elif self.annotator:
            hint = np.repeat(self.annotator(fitted)[..., None], 3, axis=2)
        source = row.get(self.source) if self.source else name
        return fitted, hint, "" if source is None else str(source)

    def _picture(self, row: Mapping[str, Any], column: str) -> tuple[str, Pixels]:
        if row.get(column) in (None, ""):
            raise InputError(f"no {column}; give the row its picture, or take the row out")
        try:
            name, content = self.listing.read(row[column])
        except InputError as error:
            raise InputError(f"column {column}: {error}") from None
        try:
            return name, decode(content, background=self.options.background)
        except InputError as error:
            raise InputError(f"column {column}: image {name} cannot be read ({error}); restore or convert it") from None

    def _fitted(self, pixels: Pixels, name: str) -> Pixels:
        o, (height, width) = self.options, pixels.shape[:2]
        first, self.size = not self.size, self.size or height
        try:
            return fit(pixels, self.size, resize=o.resize, crop=o.crop, resampling=o.resampling)
        except InputError as error:
            reason = f"is {width}x{height} pixels, not square" if first else error
            raise InputError(
                f"{name} {reason}; let the data set's entry say size, resize (stretch or shortest) and crop (centre)"
            ) from None

    def _like(self, image: Pixels, hint: Pixels, image_name: str, hint_name: str) -> Pixels:
        """Bring a hint to its image's size, if it shows the same part of the picture."""
        (height, width), (own_height, own_width) = image.shape[:2], hint.shape[:2]
        same = abs(own_width * height - own_height * width) <= max(width, height, own_width, own_height)
        if (own_height, own_width) != (height, width) and (self.options.resize == "none" or not same):
            raise InputError(
                f"{hint_name} is {own_width}x{own_height} pixels, {image_name} {width}x{height}; give both one size, "
                "or one proportion and let the data set's entry say size and resize"
            )
        return resized(hint, width, height, resampling=self.options.resampling)

    def prompt(self, index: int) -> str:
        """Return a row's prompt; "" where the source has none."""
        row = self.listing.rows[index]
        if "{label}" in self.options.prompts:
            return self.options.prompts.replace("{label}", self._class(row.get(self.label)))
        if self.options.prompts or not self.text:
            return self.options.prompts
        return caption(row.get(self.text), self.text)

    def _class(self, label: Any) -> str:
        """Return the name of a row's class."""
        known = self.options.labels or self.listing.classes.get(self.label, ())
        names = {str(key): name for key, name in (known.items() if isinstance(known, Mapping) else enumerate(known))}
        if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
            raise InputError(f"column {self.label}: expected a class, by number or name, got {label!r}")
        if not names or label in names.values():
            return str(label)
        if str(label) not in names:
            raise InputError(f"column {self.label}: {label!r} is none of the {len(names)} classes; see labels")
        return caption(names[str(label)], "labels")
