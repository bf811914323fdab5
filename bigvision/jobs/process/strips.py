"""Pieces of a unit, of any height, into strips of whole shards as the store takes them.

Legend: B bands written, h and w rows and columns.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.jobs.process.engine import Piece
from bigvision.jobs.process.results import ResultKind

Strip = tuple[NDArray[Any], Window, int]
"""Pixels, where they go, and how many of them had data, but no finite value came of it: they are nodata."""


def strips(pieces: Iterator[Piece], core: Window, rows: int, kind: ResultKind) -> Iterator[Strip]:
    """The pixels of `core` [B, h, w] as they are written, `rows` at a time; nodata where no piece is.

    Pieces come from top to bottom; a strip is handed out as soon as a piece begins below it.
    """
    windows = row_windows(core, rows)
    window = next(windows)
    strip, lost = _blank(window, kind), 0
    for piece in pieces:
        pixels, valid, bad = written(piece, kind)
        left = piece.window.col_off - core.col_off
        columns = slice(left, left + piece.window.width)
        begin, end = piece.window.row_off, piece.window.row_off + piece.window.height
        while begin < end:
            while begin >= window.row_off + window.height:
                yield strip, window, lost
                window = next(windows)
                strip, lost = _blank(window, kind), 0
            stop = min(end, window.row_off + window.height)
            part = slice(begin - piece.window.row_off, stop - piece.window.row_off)
            into = strip[:, begin - window.row_off : stop - window.row_off, columns]
            np.copyto(into, pixels[:, part], where=valid[part])
            lost += 0 if bad is None else int(np.count_nonzero(bad[part]))
            begin = stop
    yield strip, window, lost
    for window in windows:
        yield _blank(window, kind), window, 0


def written(
    piece: Piece, kind: ResultKind
) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]:
    """A piece's pixels [B, h, w], where they are written, and where data came to nothing (None: nowhere)."""
    spoilt = kind.spoilt(piece.logits)
    pixels = kind.convert(piece.logits).cpu().numpy()
    if spoilt is None:
        return pixels, piece.valid, None
    bad = spoilt.cpu().numpy()
    return pixels, piece.valid & ~bad, piece.valid & bad


def row_windows(core: Window, rows: int) -> Iterator[Window]:
    """A window in strips of so many rows, from top to bottom."""
    end = core.row_off + core.height
    for top in range(core.row_off, end, rows):
        yield Window(core.col_off, top, core.width, min(rows, end - top))


def _blank(window: Window, kind: ResultKind) -> NDArray[Any]:
    return np.full((kind.bands, window.height, window.width), kind.nodata, kind.dtype)
