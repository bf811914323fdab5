"""Regions over images of one size: their windows, the rectangles that they are joined into, and the price.

Legend: B images, R, S rows and columns of regions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigvision.routing.boxes import Box
from bigvision.routing.experts import Job, Program
from bigvision.routing.merging import Rectangle, merge, singles
from bigvision.routing.plan import ExpertPlan


class RegionWindow(NamedTuple):
    """One rectangle of regions of one image, and how an expert computes it."""

    image: int
    rectangle: Rectangle
    job: Job


@dataclass(frozen=True)
class RegionGrid:
    """Square regions from the upper left corner; those at the right and below may be cut off.

    Attributes:
        region: side in pixels of the image.
        size: rows and columns of the (padded) image.
        max_pixels: most pixels computed at once.
        scale: image pixels per output pixel.
        join: whether adjacent regions are computed as one rectangle.
    """

    region: int
    size: tuple[int, int]
    max_pixels: int
    scale: Fraction = Fraction(1)
    join: bool = True

    @property
    def limit(self) -> int:
        """Most regions of a rectangle."""
        return max(self.max_pixels // self.region**2, 1)

    def out(self, box: Box) -> Box:
        """A box of regions in pixels of the output."""
        inside = box.scaled(self.region).clipped(*self.size)
        above, below = self.scale.denominator, self.scale.numerator
        return Box(*(side * above // below for side in inside))

    def flops(self, box: Box, program: Program) -> float:
        """Of computing a box of regions, halo included."""
        return program.flops(self.out(box))

    def rectangles(
        self, mask: NDArray[np.bool_], program: Program, corner: tuple[int, int] = (0, 0)
    ) -> list[Rectangle]:
        """The regions that bool [R, S] selects, joined where that is cheaper.

        corner: row and column of the mask's first region, where it covers a part of the image.
        """
        if not self.join:
            return [_moved(one, corner) for one in singles(mask)]
        found = merge(mask, lambda box: self.flops(box.moved(*corner), program), self.limit)
        return [_moved(one, corner) for one in found]

    def batches(self, mask: NDArray[np.bool_], program: Program) -> list[list[RegionWindow]]:
        """Windows over bool [B, R, S] that are alike, as many together as max_pixels allows."""
        groups: dict[Any, list[RegionWindow]] = {}
        for image, regions in enumerate(mask):
            for rectangle in self.rectangles(regions, program):
                job = program.job(self.out(rectangle.box))
                key = job.key if self.join else (image, rectangle.box)
                groups.setdefault(key, []).append(RegionWindow(image, rectangle, job))
        batches = []
        for group in groups.values():
            many = max(self.max_pixels // max(group[0].job.read.area, 1), 1)
            batches += [group[at : at + many] for at in range(0, len(group), many)]
        return batches

    def plan(
        self, name: str, masks: Iterable[NDArray[np.bool_]], program: Program, pace: float
    ) -> ExpertPlan:
        """What an expert costs over the regions bool [R, S] of each image; pace: seconds a FLOP, or 1."""
        regions = rectangles = 0
        work = alone = 0.0
        for mask in masks:
            joined = self.rectangles(mask, program)
            regions, rectangles = regions + int(mask.sum()), rectangles + len(joined)
            work += sum(self.flops(one.box, program) for one in joined)
            alone += sum(self.flops(one.box, program) for one in singles(mask))
        return ExpertPlan(name, regions, rectangles, work, alone, pace)


def _moved(one: Rectangle, corner: tuple[int, int]) -> Rectangle:
    return Rectangle(one.box.moved(*corner), tuple(cell.moved(*corner) for cell in one.cells))
