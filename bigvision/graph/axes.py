"""Which input rows an output row needs: the one-dimensional maps that receptive fields are made of.

A map is two arrays, the first and the last input row that each output row reads; a row below 0 or beyond the
input's end is padding. The same maps serve columns.

Legend: n_in, n_out rows of an operator's input and output; k kernel, s stride, d dilation, p padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

IntArray = np.ndarray


@dataclass(frozen=True, eq=False)
class AxisMap:
    """The rows that each output row reads.

    Attributes:
        first, last: int64 [n_out], inclusive; both never decrease.
        size_in: n_in.
        scale: input rows per output row, as far as origins are concerned.
        uniform: every output row reads alike, shifted by `scale`; false for resampling whose ratio is no
            whole number and for align_corners=True, which no tile can reproduce.
    """

    first: IntArray
    last: IntArray
    size_in: int
    scale: Fraction
    uniform: bool = True

    @property
    def size_out(self) -> int:
        """n_out."""
        return len(self.first)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The half-open range of input rows that output rows start..stop read, padding included."""
        return int(self.first[start]), int(self.last[stop - 1]) + 1

    def ready(self, available: int) -> int:
        """How many output rows can be made once the first `available` input rows are there."""
        if available >= self.size_in:
            return self.size_out
        return int(np.searchsorted(self.last, available, side="left"))


def _monotone(
    first: IntArray, last: IntArray, size_in: int, scale: Fraction, uniform: bool = True
) -> AxisMap:
    """Widen the rows to what a scan must keep, so that neither bound ever turns back (reflection does)."""
    first = np.minimum.accumulate(first[::-1])[::-1]
    return AxisMap(first, np.maximum.accumulate(last), size_in, scale, uniform)


def window(size_in: int, size_out: int, k: int, s: int = 1, d: int = 1, p: int = 0) -> AxisMap:
    """A convolution or pool: output row i reads rows i*s - p ... i*s - p + (k - 1)*d."""
    first = np.arange(size_out) * s - p
    return AxisMap(first, first + (k - 1) * d, size_in, Fraction(s))


def transposed(size_in: int, size_out: int, k: int, s: int = 1, d: int = 1, p: int = 0) -> AxisMap:
    """A transposed convolution: output row o reads the rows i with o = i*s - p + j*d for some 0 <= j < k."""
    o = np.arange(size_out) + p
    return AxisMap(-(((k - 1) * d - o) // s), o // s, size_in, Fraction(1, s))


def shuffled(size_in: int, r: int) -> AxisMap:
    """Pixel shuffle: r output rows from every input row."""
    rows = np.arange(size_in * r) // r
    return AxisMap(rows, rows, size_in, Fraction(1, r))


def unshuffled(size_in: int, r: int) -> AxisMap:
    """Pixel unshuffle: one output row from r input rows."""
    first = np.arange(size_in // r) * r
    return AxisMap(first, first + r - 1, size_in, Fraction(r))


def sliced(size_in: int, start: int, step: int, size_out: int) -> AxisMap:
    """Rows start, start + step, ... of the input."""
    rows = start + np.arange(size_out) * step
    return AxisMap(rows, rows, size_in, Fraction(step))


def padded(size_in: int, before: int, after: int, mode: str) -> AxisMap:
    """Rows added (or, where negative, taken away) at both ends: constant, reflect, replicate or circular."""
    rows = np.arange(-before, size_in + after)
    if mode == "reflect":
        rows = np.where(rows < 0, -rows, np.where(rows >= size_in, 2 * (size_in - 1) - rows, rows))
    elif mode == "replicate":
        rows = rows.clip(0, size_in - 1)
    elif mode == "circular":
        rows = rows % size_in
    return _monotone(rows, rows, size_in, Fraction(1), uniform=mode != "circular")


def taps(source: IntArray, size_in: int, *, drifts: bool = False) -> AxisMap:
    """Resampling: `source` [n_out, t] lists the input rows that each output row mixes.

    `drifts` says that the weights of the taps change over the image even where the rows repeat.
    """
    size_out = len(source)
    scale = Fraction(size_in, size_out)
    whole = scale.numerator == 1 or scale.denominator == 1
    uniform = whole and not drifts and _repeats(source, scale)
    return _monotone(source.min(1), source.max(1), size_in, scale.limit_denominator(1 << 16), uniform)


def _repeats(source: IntArray, scale: Fraction) -> bool:
    """Whether the taps, away from both ends, are the same ones shifted period after period."""
    period_out, period_in = scale.denominator, scale.numerator
    margin = 4 * period_out
    inner = source[margin : len(source) - margin]
    return len(inner) <= period_out or bool((inner[period_out:] == inner[:-period_out] + period_in).all())
