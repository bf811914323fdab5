"""The one normalisation of pixels: (x / scale - mean) / std, however far from 0 the values lie.

Legend: C bands, h and w rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 2**17  # pixels: the wide copy stays in the processor's cache


def normalised(
    values: NDArray[Any], scale: float, mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """Pixels [C, h, w] of any real type as the network gets them, float32 [C, h, w].

    The mean is subtracted before anything is rounded to float32: 1e9 + 0.3 and 1e9 are one number there, and
    two a standard deviation apart.
    """
    out = np.empty(values.shape, np.float32)
    rows = max(1, _AT_ONCE // max(values.shape[-1], 1))
    wide = _wide(values.dtype)
    centre = np.asarray(mean, wide) * wide(scale)
    factor = 1 / (wide(scale) * np.asarray(std, wide))
    with np.errstate(over="ignore"):  # what float32 can't hold is infinite, and so is what comes of it
        for band, pixels in enumerate(values):
            for top in range(0, len(pixels), rows):
                part = pixels[top : top + rows].astype(wide)
                part -= centre[band]
                part *= factor[band]
                out[band, top : top + rows] = part
    return out


def _wide(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """A type in which every value of `dtype` is exact: its difference from the mean is, too."""
    if dtype.itemsize <= 2:
        return np.float32
    return np.longdouble if dtype.kind in "iu" and dtype.itemsize == 8 else np.float64
