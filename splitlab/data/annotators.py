"""Hints made from images, where a data set brings none: `hints` in an entry of the section `datasets` names one."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def canny(image: Pixels) -> Pixels:
    """Return the Canny edges of an RGB image `[h, w, 3]` as `[h, w]` uint8 in {0, 255}."""
    from skimage.color import rgb2gray
    from skimage.feature import canny as edges

    return np.where(edges(rgb2gray(image), sigma=1.0), 255, 0).astype(np.uint8)


ANNOTATORS: dict[str, Callable[[Pixels], Pixels]] = {"canny": canny}
"""Name -> a function from an image `[h, w, 3]` to a hint `[h, w]`, both uint8."""
