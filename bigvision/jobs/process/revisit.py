"""What two visits of one place see through a window: the same in every bit, or nearly the same.

Nearly the same are windows that have data in the same pixels and bands and differ there by no more than a
tolerance in the scene's own units. An earlier scene on another grid is resampled onto the present one for
that: its values bilinearly, and what lies beyond it is neither data nor missing data.

Legend: C bands, h and w rows and columns of a window.
"""

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.jobs.process.scene import Scene
from bigvision.routing.grids import brought, under

_OUTSIDE, _DATA, _MISSING = 0, 1, 2

# Values float64 [C, h, w] and what each of them is, uint8 [C, h, w].
Seen = tuple[NDArray[np.float64], NDArray[np.uint8]]


def same_bits(before: Scene, now: Scene, window: Window) -> bool:
    """Whether the network gets the very same from both scenes, which lie on one grid."""
    pixels, valid = now.read(window)
    earlier, shown = before.read(window)
    # Bits, not values: NaN equals itself, and -0 is not 0.
    return bool(
        np.array_equal(valid, shown) and np.array_equal(pixels.view(np.int32), earlier.view(np.int32))
    )


def nearly_same(before: Scene, now: Scene, window: Window, tolerance: float) -> bool:
    """Whether both scenes, which lie on one grid, differ by no more than the tolerance."""
    return _near(_seen(before, window), _seen(now, window), tolerance)


def nearly_same_resampled(before: Scene, now: Scene, window: Window, tolerance: float) -> bool:
    """The same for an earlier scene on any grid.

    A network sees where a scene ends, so the windows are widened by a pixel beyond the present scene's edges:
    there the earlier one must end, too.
    """
    wide = _beyond(window, now.shape)
    return _near(_seen_resampled(before, now, wide), _seen(now, wide), tolerance)


def _near(before: Seen, now: Seen, tolerance: float) -> bool:
    (earlier, was), (pixels, state) = before, now
    if not np.array_equal(was, state):
        return False
    data = state == _DATA
    return bool((np.abs(pixels - earlier)[data] <= tolerance).all())


def _seen(scene: Scene, window: Window) -> Seen:
    """Of a window that may reach beyond the scene."""
    bands, height, width = scene.shape
    values = np.zeros((bands, window.height, window.width))
    state = np.full(values.shape, _OUTSIDE, np.uint8)
    top, left = max(window.row_off, 0), max(window.col_off, 0)
    bottom = min(window.row_off + window.height, height)
    right = min(window.col_off + window.width, width)
    found, missing = scene.values(Window(left, top, right - left, bottom - top))
    rows = slice(top - window.row_off, bottom - window.row_off)
    columns = slice(left - window.col_off, right - window.col_off)
    values[:, rows, columns] = found
    state[:, rows, columns] = np.where(missing, _MISSING, _DATA)
    return values, state


def _seen_resampled(scene: Scene, like: Scene, window: Window) -> Seen:
    """Of a window of another scene's grid."""
    shape = (scene.shape[0], window.height, window.width)
    part = under(scene.raster, like.raster, window)
    if part is None:
        return np.zeros(shape), np.full(shape, _OUTSIDE, np.uint8)
    found, missing = scene.values(part)
    known = np.where(missing, np.nan, found.astype(np.float64))
    states = np.where(missing, _MISSING, _DATA).astype(np.uint8)
    values, state = np.zeros(shape), np.zeros(shape, np.uint8)
    for band in range(shape[0]):  # one by one: warped together, a band's gap counts only where all have one
        one = slice(band, band + 1)
        values[one] = brought(
            known[one], part, scene.raster, like.raster, window, nodata=np.nan, method="bilinear"
        )
        state[one] = brought(
            states[one], part, scene.raster, like.raster, window, nodata=_OUTSIDE, method="nearest"
        )
    # To what the raster's type can hold: of a shift by whole pixels nothing is left but the pixels.
    if np.issubdtype(found.dtype, np.integer):
        return np.rint(values), state
    return values.astype(found.dtype).astype(np.float64), state


def _beyond(window: Window, shape: tuple[int, int, int]) -> Window:
    """A window of a scene [C, H, W], a pixel wider where the scene ends."""
    top, left = int(window.row_off == 0), int(window.col_off == 0)
    below = int(window.row_off + window.height == shape[1])
    right = int(window.col_off + window.width == shape[2])
    return Window(
        window.col_off - left,
        window.row_off - top,
        window.width + left + right,
        window.height + top + below,
    )
