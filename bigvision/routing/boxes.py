"""Rectangles of whole pixels or of whole regions, half open."""

from typing import NamedTuple


class Box(NamedTuple):
    """Rows top..bottom and columns left..right, the ends left out."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def area(self) -> int:
        """Rows times columns."""
        return self.height * self.width

    def around(self, other: "Box") -> "Box":
        """The smallest box around both."""
        return Box(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
        )

    def holds(self, other: "Box") -> bool:
        """Whether `other` lies within."""
        return (
            self.top <= other.top
            and self.left <= other.left
            and self.bottom >= other.bottom
            and self.right >= other.right
        )

    def clipped(self, height: int, width: int) -> "Box":
        """What of it lies in an image of this size."""
        return Box(max(self.top, 0), max(self.left, 0), min(self.bottom, height), min(self.right, width))

    def grown(self, halo: int, height: int, width: int) -> "Box":
        """It with a halo on every side, as far as the image goes."""
        return Box(self.top - halo, self.left - halo, self.bottom + halo, self.right + halo).clipped(
            height, width
        )

    def moved(self, rows: int, cols: int) -> "Box":
        """So many rows down and columns to the right."""
        return Box(self.top + rows, self.left + cols, self.bottom + rows, self.right + cols)

    def scaled(self, factor: int) -> "Box":
        """In pixels what was in regions of `factor` pixels."""
        return Box(*(side * factor for side in self))
