"""How the network passes over one unit of a scene.

An engine cuts the scene into units that are computed, stored and resumed one by one. Whatever computes a unit
hands out pieces: a window of the scene and the logits there. Everything after that is shared.

Legend: C bands, K logits, h and w rows and columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor
from torch.nn.functional import pad

from bigvision.jobs.process.network import Network
from tiling import Tile


class Engine(Protocol):
    """Picklable; `pieces` runs in the one thread that owns the network."""

    def pieces(
        self, network: Network, unit: Tile, pixels: NDArray[np.float32]
    ) -> Iterator[tuple[Window, Tensor]]:
        """Windows of the scene within `unit.core`, and their logits [K, h, w].

        pixels: what the scene holds in `unit.padded`, normalised, [C, h, w].
        """


@dataclass(frozen=True)
class TilesEngine:
    """One forward over each padded tile, of which the core is kept.

    The scene counts as padded below and on the right with zeros to whole strides; so is a tile that ends
    there.
    """

    stride: int

    def pieces(
        self, network: Network, unit: Tile, pixels: NDArray[np.float32]
    ) -> Iterator[tuple[Window, Tensor]]:
        """One piece: the core."""
        image = torch.from_numpy(pixels)
        below, beside = (-side % self.stride for side in image.shape[1:])
        logits = network(pad(image, (0, beside, 0, below)) if below or beside else image)
        yield unit.core, logits[:, *unit.crop]
