"""How the network passes over one unit of a scene.

An engine cuts a scene into units that are computed, stored and resumed one by one. Whatever computes a unit
hands out pieces: a window of the scene, the logits there, and where the scene has data. Everything after that
is shared.

Legend: C bands, K logits, h and w rows and columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window, intersection
from torch import Tensor
from torch.nn.functional import pad

from bigvision.jobs.process.network import Network
from datasets.pairs import Pixels
from tiling import Tile, TileGrid

Padded = tuple[NDArray[np.float32], NDArray[np.bool_]]


class View(Pixels, Protocol):
    """A scene, of which an area of interest may be all that is written."""

    def inside(self, window: Window) -> NDArray[np.bool_]:
        """Which pixels of a window are written, bool [h, w]."""


@dataclass(frozen=True)
class Piece:
    """Part of a unit's core: logits [K, h, w] over `window`, and which pixels are written, bool [h, w]."""

    window: Window
    logits: Tensor
    valid: NDArray[np.bool_]


class Engine(Protocol):
    """Picklable. `read` may run ahead in any thread; `pieces` runs in the one that owns the network.

    at_once: how many units one process may have under way.
    """

    @property
    def at_once(self) -> int:
        """More than one, and units are read and written while another is computed."""

    def read(self, scene: View, unit: Tile) -> Any:
        """What `pieces` needs of the scene."""

    def below(self, unit: Tile, rows: int) -> Tile:
        """The unit without its first rows, which are stored: what is left gets the very same bits."""

    def pieces(self, network: Network, unit: Tile, read: Any) -> Iterator[Piece]:
        """The parts of the core that have data, from top to bottom; what no piece covers is nodata."""


@dataclass(frozen=True)
class TilesEngine:
    """One forward over each padded tile, of which the core is kept.

    The scene counts as padded below and on the right with zeros to whole strides; so is a tile that ends
    there.
    """

    stride: int
    at_once: int = 3  # one is read, one computed, one written

    def read(self, scene: View, unit: Tile) -> Padded:
        """The padded tile, float32 [C, h, w], and where the core has data that is wanted."""
        shown = scene.inside(unit.core)
        if not shown.any():
            return np.empty((0, 0, 0), np.float32), shown
        pixels, valid = scene.read(unit.padded)
        return pixels, shown & valid[unit.crop]

    def below(self, unit: Tile, rows: int) -> Tile:
        """The unit itself: a tile is stored whole."""
        return unit

    def pieces(self, network: Network, unit: Tile, read: Padded) -> Iterator[Piece]:
        """One piece, the core; none where it is all nodata."""
        pixels, shown = read
        if shown.any():
            yield Piece(unit.core, network(to_strides(pixels, self.stride))[:, *unit.crop], shown)


def to_strides(pixels: NDArray[np.float32], stride: int) -> Tensor:
    """[C, h, w] with zeros below and on the right up to whole strides."""
    image = torch.from_numpy(pixels)
    below, beside = (-side % stride for side in image.shape[1:])
    return pad(image, (0, beside, 0, below)) if below or beside else image


@dataclass(frozen=True)
class FinerTilesEngine:
    """Tiles of a run that was begun with more memory: each is computed in smaller ones, read by turns.

    size: (H, W) of the scene. side: of the smaller cores. halo, stride: as the run was planned.
    """

    size: tuple[int, int]
    side: int
    halo: int
    stride: int
    at_once: int = 1

    def read(self, scene: View, unit: Tile) -> View:
        """The scene itself."""
        return scene

    def below(self, unit: Tile, rows: int) -> Tile:
        """The unit itself: a tile is stored whole."""
        return unit

    def pieces(self, network: Network, unit: Tile, read: View) -> Iterator[Piece]:
        """A piece for each smaller tile that has data."""
        engine = TilesEngine(self.stride)
        for tile in TileGrid(*self.size, self.side, self.halo, self.stride).overlapping(unit.core):
            part = Tile(tile.index, intersection(tile.core, unit.core), tile.padded)
            yield from engine.pieces(network, part, engine.read(read, part))
