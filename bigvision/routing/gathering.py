"""Hard mode: windows of like shape gathered with their halos, run, and their interiors scattered back.

Legend: B images, C channels, K output channels, H, W rows and columns, R, S rows and columns of regions,
    N windows, h, w rows and columns of a window.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigvision.routing.boxes import Box
from bigvision.routing.experts import Program
from bigvision.routing.pasting import Piece, Place, cut
from bigvision.routing.region_grid import RegionGrid, RegionWindow


def computed_regions(
    x: Tensor, mask: NDArray[np.bool_], program: Program, grid: RegionGrid, weights: Tensor | None
) -> list[Piece]:
    """The results of one expert on its regions, and where in the output they go.

    Args:
        x: [B, C, H, W], of the grid's size.
        mask: bool [B, R, S], the expert's regions.
        program: the expert at this size.
        grid: of the regions.
        weights: float [B, R, S], what each region's result is multiplied by; absent: by nothing.
    """
    pieces: list[Piece] = []
    for batch in grid.batches(mask, program):
        y = program.run(cut(x, [(one.image, one.job.read) for one in batch]), batch[0].job.alike)
        pieces += _kept(y, batch, grid, weights)
    return pieces


def _kept(y: Tensor, batch: Sequence[RegionWindow], grid: RegionGrid, weights: Tensor | None) -> list[Piece]:
    """Of the results [N, K, h, w] those that were asked for, weighted, with their places."""
    if all(one.rectangle.cells == (one.rectangle.box,) for one in batch):
        boxes = [(one.image, one.rectangle.box) for one in batch]
        return [(_weighted(y, boxes, grid, weights), [(image, grid.out(box)) for image, box in boxes])]
    pieces: list[Piece] = []
    for row, (image, rectangle, _) in zip(y, batch, strict=True):
        outer = grid.out(rectangle.box)
        for cell in rectangle.cells:
            at = grid.out(cell)
            inside = at.moved(-outer.top, -outer.left)
            part = row[None, :, inside.top : inside.bottom, inside.left : inside.right]
            pieces.append((_weighted(part, [(image, cell)], grid, weights), [(image, at)]))
    return pieces


def _weighted(y: Tensor, boxes: Sequence[Place], grid: RegionGrid, weights: Tensor | None) -> Tensor:
    return y if weights is None else y * weight_map(weights, boxes, grid, y).to(y.dtype)


def weight_map(weights: Tensor, boxes: Sequence[Place], grid: RegionGrid, like: Tensor) -> Tensor:
    """Weights [B, R, S] of regions on the pixels of N boxes of them: [N, 1, h, w], as large as `like`."""
    found = torch.stack([weights[image, b.top : b.bottom, b.left : b.right] for image, b in boxes])
    side = int(grid.region / grid.scale)
    wide = found.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return wide[:, None, : like.shape[-2], : like.shape[-1]]


def whole_maps(weights: Tensor) -> list[Place]:
    """All regions of each image, for :func:`weight_map`."""
    return [(image, Box(0, 0, *weights.shape[1:3])) for image in range(len(weights))]
