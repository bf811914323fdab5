"""Temporal routing: a revisit of one place recomputes only what changed.

A region is copied from the previous output where nothing that its result depends on changed: the input within
its halo, the model, the preprocessing. What is recomputed is computed in the shape that it always has, so
that at tolerance 0 the result is, bit by bit, that of recomputing everything in the same shapes.

Legend: C channels, K output channels, H, W rows and columns, R, S rows and columns of regions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bigvision.routing.boxes import Box
from bigvision.routing.experts import Program, RegionExpert

Windows = Callable[[int, int], tuple[Box, Any, Box]]


@dataclass(frozen=True)
class Visit:
    """One visit: what went in, what came out, and of which model and preprocessing.

    Attributes:
        image: [C, H, W], as the network saw it.
        output: [K, H, W].
        made_by: identifies model and preprocessing (a hash); visits of different makers share nothing.
    """

    image: Tensor
    output: Tensor
    made_by: str


@dataclass(frozen=True)
class Revisited:
    """A new visit, and which of its regions were recomputed: bool [R, S]."""

    visit: Visit
    recomputed: NDArray[np.bool_]

    @property
    def reused(self) -> float:
        """Share of regions that were copied; 1 for an empty grid."""
        return 1 - float(self.recomputed.mean()) if self.recomputed.size else 1.0


def changed_pixels(current: Tensor, previous: Tensor, tolerance: float) -> Tensor:
    """bool [H, W]: any channel of [C, H, W] differs by more than the tolerance (at 0: in any bit).

    NaN against NaN is no change at a tolerance above 0.

    Raises:
        ValueError: a negative tolerance, or shapes or types that differ.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if current.shape != previous.shape or current.dtype != previous.dtype:
        raise ValueError(
            f"visits differ: {current.dtype} {list(current.shape)} and "
            f"{previous.dtype} {list(previous.shape)}"
        )
    if tolerance == 0:
        return (_bits(current) != _bits(previous)).any(0)
    same = (
        (current - previous).abs() <= tolerance
        if current.is_floating_point()
        else ((current.long() - previous.long()).abs() <= tolerance)
    )
    return ~(same | (current.isnan() & previous.isnan())).all(0)


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers: -0.0 differs from 0.0, and NaN equals itself."""
    kinds = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
    kinds[torch.bfloat16] = torch.int16
    return x.contiguous().view(kinds[x.dtype]) if x.dtype in kinds else x


def dilated_regions(changed: Tensor, reads: list[list[Box]]) -> NDArray[np.bool_]:
    """bool [R, S]: regions whose window (the box that they read) holds a changed pixel of bool [H, W]."""
    total = functional.pad(changed.to(torch.int64).cumsum(0).cumsum(1), (1, 0, 1, 0)).numpy()

    def count(b: Box) -> int:
        return int(
            total[b.bottom, b.right] - total[b.top, b.right] - total[b.bottom, b.left] + total[b.top, b.left]
        )

    return np.array([[count(box) > 0 for box in row] for row in reads], dtype=bool)


class TemporalRouter(nn.Module):
    """Recomputes the regions of a revisit whose receptive-field input changed, and copies the others.

    Args:
        network: in eval mode, [1, C, H, W] -> [1, K, H, W] with an exact halo.
        channels: C.
        region: side of a region, a multiple of the network's stride.
        made_by: identifies model and preprocessing.

    Raises:
        ValueError: a region that isn't a multiple of the stride, a network that no halo fits or that changes
            the resolution.
    """

    def __init__(self, network: nn.Module, channels: int, region: int, *, made_by: str) -> None:
        super().__init__()
        self.network, self.region, self.made_by = network, region, made_by
        self.known = RegionExpert("network", network, channels)
        shape = self.known.shape
        if region < 1 or region % shape.stride or shape.scale != 1:
            raise ValueError(
                f"a region of {region} px must be a positive multiple of the stride {shape.stride} px of a "
                f"network at full resolution (this one gives 1/{shape.scale})"
            )

    @torch.no_grad()
    def forward(self, image: Tensor, previous: Visit | None = None, *, tolerance: float = 0.0) -> Revisited:
        """Compute image [C, H, W], reusing what a previous visit has.

        Args:
            image: as the network sees it.
            previous: absent: everything is computed.
            tolerance: largest difference of a channel that counts as none. Above 0 compare every visit with
                one that was computed in full: small changes add up along a chain of visits.

        Raises:
            ValueError: a previous visit of another size, type or maker, or a negative tolerance.
        """
        reads, jobs = self._windows(image)
        if previous is None:
            stale = np.ones((len(reads), len(reads[0])), dtype=bool)
            output = image.new_zeros(self.known.shape.channels, *image.shape[1:])
        else:
            self._check(image, previous)
            changed = changed_pixels(image, previous.image, tolerance)
            stale = dilated_regions(self._padded(changed[None])[0], reads)
            output = previous.output.clone()
        padded = self._padded(image)
        for row, col in zip(*stale.nonzero(), strict=True):
            program, job = jobs
            at = job(int(row), int(col))
            y = program.run(padded[None, :, at[0].top : at[0].bottom, at[0].left : at[0].right], at[1])[0]
            inside = at[2].clipped(*image.shape[1:])
            output[:, inside.top : inside.bottom, inside.left : inside.right] = y[
                :, : inside.height, : inside.width
            ]
        return Revisited(Visit(image, output, self.made_by), stale)

    def curve(
        self, image: Tensor, previous: Visit, tolerances: list[float]
    ) -> Iterator[tuple[float, float, float]]:
        """(tolerance, share recomputed, largest error against recomputing everything) of each tolerance."""
        exact = self(image).visit.output
        for tolerance in tolerances:
            found = self(image, previous, tolerance=tolerance)
            error = (found.visit.output - exact).abs().max()
            yield tolerance, 1 - found.reused, float(error)

    def _check(self, image: Tensor, previous: Visit) -> None:
        if previous.made_by != self.made_by:
            raise ValueError(f"the previous visit was made by {previous.made_by}, this one by {self.made_by}")
        expected = (self.known.shape.channels, *image.shape[1:])
        if previous.image.shape != image.shape or tuple(previous.output.shape) != expected:
            raise ValueError(
                f"the previous visit is {list(previous.image.shape)} with an output "
                f"{list(previous.output.shape)}, this one {list(image.shape)} with {list(expected)}"
            )

    def _padded(self, image: Tensor) -> Tensor:
        stride = self.known.shape.stride
        return functional.pad(image, (0, -image.shape[2] % stride, 0, -image.shape[1] % stride))

    def _windows(self, image: Tensor) -> tuple[list[list[Box]], tuple[Program, Windows]]:
        """What each region reads, and how to compute it: its read box, what makes it alike, its own box."""
        if image.dim() != 3 or image.shape[0] != self.known.channels or 0 in image.shape:
            raise ValueError(f"the image must be [{self.known.channels}, H, W], got {list(image.shape)}")
        height, width = self._padded(image[:1]).shape[1:]
        size = (height, width)
        program = self.known.program(*size)

        def job(row: int, col: int) -> tuple[Box, Any, Box]:
            box = Box(row, col, row + 1, col + 1).scaled(self.region).clipped(*size)
            found = program.job(box)
            return found.read, found.alike, box

        rows, cols = (-(-side // self.region) for side in size)
        return [[job(r, c)[0] for c in range(cols)] for r in range(rows)], (program, job)
