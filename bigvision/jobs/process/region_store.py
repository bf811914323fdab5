"""Results of regions on their way into a store whose files hold many of them.

A file for every small region would cost more than computing it; so would writing a file anew for each of its
regions. Here they wait until `flush`, which writes every file that they lie in once.

Legend: B bands, h and w rows and columns of a window.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from tiling import ZarrWriter
from tiling.shards import Stamp, settle

_SIDE = 512  # pixels of a file's side, at least


def file_side(region: int) -> int:
    """Side of a file: a whole number of regions."""
    return region * max(_SIDE // region, 1)


class RegionStore:
    """Windows of any size and place into a store; what is around them in their files stays.

    Args:
        writer: of the store; one such object at a time may write to it.
    """

    def __init__(self, writer: ZarrWriter) -> None:
        self.writer = writer
        self._waiting: dict[tuple[int, int], NDArray[Any]] = {}

    def put(self, result: NDArray[Any], window: Window) -> None:
        """Keep the pixels [B, h, w] of a window for the next `flush`."""
        tall, wide = self.writer.shard
        bottom, right = window.row_off + window.height, window.col_off + window.width
        for row in range(window.row_off // tall, -(-bottom // tall)):
            for col in range(window.col_off // wide, -(-right // wide)):
                file = self._window(row, col)
                top, left = max(window.row_off, file.row_off), max(window.col_off, file.col_off)
                height = min(bottom, file.row_off + file.height) - top
                width = min(right, file.col_off + file.width) - left
                into = _part(self._file(row, col), top - file.row_off, left - file.col_off, height, width)
                into[:] = _part(result, top - window.row_off, left - window.col_off, height, width)

    def flush(self) -> dict[str, Stamp]:
        """Write what waits, onto the disk; the stamps of the files written.

        Killed meanwhile, some files have it and some don't, each of them whole.
        """
        stamps: dict[str, Stamp] = {}
        for at in sorted(self._waiting):
            self.writer.write(self._waiting[at], self._window(*at))
            stamps |= settle(self.writer, self._window(*at))
        self._waiting.clear()
        return stamps

    def _file(self, row: int, col: int) -> NDArray[Any]:
        if (row, col) not in self._waiting:
            self._waiting[row, col] = np.array(self.writer.read(self._window(row, col)))
        return self._waiting[row, col]

    def _window(self, row: int, col: int) -> Window:
        _, height, width = self.writer.shape
        tall, wide = self.writer.shard
        top, left = row * tall, col * wide
        return Window(left, top, min(wide, width - left), min(tall, height - top))


def _part(x: NDArray[Any], top: int, left: int, height: int, width: int) -> NDArray[Any]:
    """A view of rows and columns of x [B, h, w]."""
    return x[:, top : top + height, left : left + width]
