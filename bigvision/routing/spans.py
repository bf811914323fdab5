"""What every operator of a traced network must compute for one interval of output rows (or columns).

Intervals run from the output back to the image: each operator computes just what the later ones read, so
the halo shrinks layer by layer instead of being paid for in full by all of them. Rows and columns are
independent, so a window is a pair of intervals, and windows whose intervals are alike run as one batch.

Legend: a, b first and past-the-last row that is wanted; first, last what is read for it, beyond 0..size_in
where the operator pads.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import fx

from bigvision.graph import Layout, TracedGraph, geometry
from bigvision.graph.arguments import INTERPOLATIONS, arguments, pad_mode, pair, resample_factors
from bigvision.graph.flow import flows, streaming_inputs
from bigvision.graph.layout import Flow
from bigvision.graph.trace import describe, operator_name, result_shape

_SIZED = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "expand", "unsqueeze", "squeeze")
_POOLS = ("max_pool2d", "max_pool2d_with_indices", "avg_pool2d")


class UnwindowedError(ValueError):
    """An operator that can't be computed window by window with shrinking halos."""


@dataclass(frozen=True)
class Cut:
    """One operator along one axis, in numbers that don't depend on where in the image it is.

    Attributes:
        reads: for each streaming input, where in the held interval it starts and how long it is.
        before, after: rows of padding.
        skip: rows of the raw result to drop; keep: rows that stay.
    """

    reads: tuple[tuple[int, int], ...]
    before: int
    after: int
    skip: int
    keep: int


@dataclass(frozen=True, eq=False)
class Interval:
    """One axis of a window: the rows of the image that it reads, and a cut for every operator.

    `cuts` are alike (the same object) for intervals that differ in position only.
    """

    start: int
    stop: int
    cuts: tuple[Cut, ...]


class Windows:
    """The operators of a traced network with their intervals.

    Args:
        traced: an eval-mode network without whole-image statistics.

    Raises:
        UnwindowedError: an operator that isn't computed window by window.
    """

    def __init__(self, traced: TracedGraph) -> None:
        self.traced = traced
        self.known = flows(traced)
        self.output = traced.output
        self.order = [n for n in traced.operators() if n in self.known]
        self.streaming = [n for n in self.order if self.known[n].layout is not None]
        self.inputs = {node: streaming_inputs(node, self.known) for node in self.streaming}
        for node in self.order:
            # In an image as small as its kernel an ordinary pool looks at all of it, too.
            held = self.known[node].layout is None or not self.inputs[node]
            if self.known[node].statistic or (held and node in self.inputs):
                raise UnwindowedError(f"{describe(node)} needs the whole image")
            if not held:
                _check(node, self.known[node])
        self._kinds: dict[tuple[int, ...], tuple[int, Interval]] = {}
        self._period, self._reach, self._scale = self._recurrence()
        self._alike: dict[tuple[Cut, ...], tuple[Cut, ...]] = {}

    def interval(self, axis: int, a: int, b: int) -> Interval:
        """What output rows (axis 0) or columns (axis 1) a..b take."""
        length = result_shape(self.output)[axis - 2]
        # All that an interval depends on: its length, its place in a period, edges as far as it can see them.
        edges = min(a, self._reach), min(length - b, self._reach)
        kind = (axis, a % self._period, b - a, *edges)
        if kind not in self._kinds:
            self._kinds[kind] = a, self._trace_back(axis, a, b)
        origin, known = self._kinds[kind]
        shift = int((a - origin) * self._scale)
        return Interval(known.start + shift, known.stop + shift, known.cuts) if shift else known

    def _recurrence(self) -> tuple[int, int, Fraction]:
        """Output rows after which intervals recur, those that an edge is seen from, pixels a row."""
        _, height, width = self.traced.shape
        found = geometry(self.traced)
        period = Fraction(found.stride) / (found.output_scale or found.stride)
        if period.denominator > 1 or 2 * (found.halo + found.stride) >= min(height, width):
            return 1, height + width, found.output_scale  # an edge is seen from everywhere
        return int(period), math.ceil(found.halo / found.output_scale), found.output_scale

    def _trace_back(self, axis: int, a: int, b: int) -> Interval:
        wanted: dict[fx.Node, tuple[int, int]] = {self.output: (a, b)}
        reads: dict[fx.Node, tuple[int, int]] = {}
        for node in reversed(self.streaming):
            flow = self.known[node]
            along = flow.cols if axis else flow.rows
            first, last = wanted[node] if along is None else along.span(*wanted[node])
            reads[node] = (first, last)
            for source in self.inputs[node]:
                length = result_shape(source)[axis - 2]
                start, stop = max(first, 0), min(last, length)
                before = wanted.get(source, (start, stop))
                wanted[source] = (min(before[0], start), max(before[1], stop))
        cuts = tuple(self._cut(node, axis, wanted, *reads[node]) for node in self.streaming)
        start, stop = wanted[self.traced.image]
        return Interval(start, stop, self._alike.setdefault(cuts, cuts))

    def _cut(
        self, node: fx.Node, axis: int, wanted: dict[fx.Node, tuple[int, int]], first: int, last: int
    ) -> Cut:
        a, b = wanted[node]
        size = result_shape(self.inputs[node][0])[axis - 2]
        start, stop = max(first, 0), min(last, size)
        reads = tuple((start - wanted[source][0], stop - start) for source in self.inputs[node])
        before, after = max(-first, 0), max(last - size, 0)
        if operator_name(node) == "conv_transpose2d":
            return _transposed(node, axis, reads, start, stop, a, b)
        factor = _magnified(node)
        if factor > 1:
            return Cut(reads, 0, 0, a - start * factor, b - a)
        return Cut(reads, before, after, 0, b - a)


def _transposed(
    node: fx.Node, axis: int, reads: tuple[tuple[int, int], ...], start: int, stop: int, a: int, b: int
) -> Cut:
    """Row r of the unpadded result of input rows start.. is output row start * stride - padding + r."""
    args = arguments(node)
    k = result_shape(args["weight"])[axis - 2]
    s, d, p = (pair(args[name])[axis] for name in ("stride", "dilation", "padding"))
    skip = a + p - start * s
    made = (stop - start - 1) * s + d * (k - 1) + 1
    missing = max(skip + b - a - made, 0)
    return Cut(reads, 0, -(-missing // s), skip, b - a)


def _magnified(node: fx.Node) -> int:
    """By how much an operator enlarges, along either axis; 1 where it doesn't."""
    name = operator_name(node)
    if name == "pixel_shuffle":
        return int(arguments(node)["upscale_factor"])
    if name in INTERPOLATIONS:
        return result_shape(node)[-1] // result_shape(arguments(node)["input"])[-1]
    return 1


def _check(node: fx.Node, flow: Flow) -> None:
    """Refuse what the executor has no window rule for."""
    name, args = operator_name(node), _arguments(node)
    if flow.statistic or not flow.local_columns or flow.layout != Layout() or name in _SIZED:
        raise UnwindowedError(f"{describe(node)} has no window rule")
    moved = flow.rows is not None or flow.cols is not None
    known = name in ("conv2d", "conv_transpose2d", "pixel_shuffle", *INTERPOLATIONS, *_POOLS)
    if name in ("pad", "constant_pad_nd"):
        known = pad_mode(name, args) == "constant"
    if moved and not known:
        raise UnwindowedError(f"{describe(node)} has no window rule")
    if name in _POOLS and (args["ceil_mode"] or _counts_by_place(name, args)):
        raise UnwindowedError(f"{describe(node)} pads in a way that has no window rule")
    if name in INTERPOLATIONS and not _whole(node, args):
        raise UnwindowedError(f"{describe(node)} resamples by a ratio that has no window rule")


def _counts_by_place(name: str, args: dict[str, Any]) -> bool:
    """Whether an average is over fewer pixels at the image's edge."""
    return name == "avg_pool2d" and any(pair(args["padding"])) and not args["count_include_pad"]


def _arguments(node: fx.Node) -> dict[str, Any]:
    return arguments(node) if hasattr(node.target, "_schema") else {}


def _whole(node: fx.Node, args: dict[str, Any]) -> bool:
    """Whether rows and columns grow by one whole factor, whose taps recur pixel after pixel."""
    before, after = result_shape(args["input"])[-2:], result_shape(node)[-2:]
    factor = after[0] // before[0]
    if args.get("align_corners") or operator_name(node) == "upsample_bicubic2d":
        return False
    given = resample_factors(args)
    return after == (before[0] * factor, before[1] * factor) and all(f in (None, factor) for f in given)
