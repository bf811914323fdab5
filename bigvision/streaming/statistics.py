"""Statistics over the whole image, accumulated row by row in float64.

A statistic is a set of sums over rows and a function of the sums (`finish`). Sums add in a fixed order, so
the result does not depend on how the image was cut; being plain sums, their gradient reaches every row alike,
which is what lets a backward pass walk the image once.

Legend: C channels, G groups, h rows at hand, W columns, n elements behind one statistic.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from bigvision.graph.arguments import arguments, reduced_axes
from bigvision.graph.resampling import area_bins
from bigvision.graph.trace import operator_name, result_shape

Sums = tuple[Tensor, ...]


class Statistic(ABC):
    """One statistic of one streaming value `source`."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        self.node, self.source = node, source
        value: Any = node.meta["val"]
        self.dtype: torch.dtype = (value[0] if isinstance(value, tuple | list) else value).dtype

    @abstractmethod
    def partial(self, x: Tensor, start: int) -> Sums:
        """The sums (float64) over the rows `x`, the first of which is the image's row `start`."""

    def merge(self, left: Sums, right: Sums) -> Sums:
        """Both parts' sums together; `left` lies above `right`."""
        return tuple(a + b for a, b in zip(left, right, strict=True))

    @abstractmethod
    def finish(self, sums: Sums) -> Any:
        """What the operator returns, or for a normalisation its (mean, variance)."""

    def differentiable_partial(self, x: Tensor, start: int, whole: Sums) -> Sums:
        """Like `partial`, but a true sum even where the statistic is an extreme, given the `whole` sums."""
        return self.partial(x, start)


class Total(Statistic):
    """sum, mean and p-norm over axes that include the rows."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        args, shape = arguments(node), result_shape(source)
        self.kind = operator_name(node)
        self.dims = reduced_axes(args, shape)
        self.keepdim = bool(args.get("keepdim", False))
        self.count = math.prod(shape[dim] for dim in self.dims)
        self.cast: torch.dtype | None = args.get("dtype")
        self.order = float(args.get("ord", 1))

    def partial(self, x: Tensor, start: int) -> Sums:
        """Sums, or sums of powers."""
        x = x if self.cast is None else x.to(self.cast)
        if self.kind == "linalg_vector_norm":
            wide = x.double()
            powers = wide.square() if self.order == 2 else wide.abs().pow(self.order)
            return (powers.sum(self.dims, self.keepdim),)
        return (x.sum(self.dims, self.keepdim, dtype=torch.float64),)

    def finish(self, sums: Sums) -> Tensor:
        """The sum, the mean or the norm, in the operator's dtype."""
        (total,) = sums
        if self.kind == "mean":
            total = total / self.count
        if self.kind == "linalg_vector_norm":
            total = _root(total, self.order)
        return total.to(self.dtype)


def _root(total: Tensor, order: float) -> Tensor:
    """total ** (1 / order), whose gradient at zero is zero, as ATen has it."""
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).pow(1 / order), total)


class BinnedMean(Statistic):
    """Adaptive average pooling to a few bins, [..., bins, bins]; global pooling is one bin."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        height, width = result_shape(source)[-2:]
        out_height, out_width = result_shape(node)[-2:]
        self.rows, self.cols = area_bins(height, out_height), area_bins(width, out_width)
        self.divisor: int | None = arguments(node).get("divisor_override")

    def partial(self, x: Tensor, start: int) -> Sums:
        """Sums over each bin's part of these rows."""
        columns = [
            x[..., first:stop].sum(-1, dtype=torch.float64) for first, stop in zip(*self.cols, strict=True)
        ]
        by_column = torch.stack(columns, -1)  # [..., h, bins]
        first, stop = (edge - start for edge in self.rows)
        reached = (stop > 0) & (first < x.shape[-2])
        sums = [
            by_column[..., max(a, 0) : b, :].sum(-2)
            for a, b in zip(first[reached].tolist(), stop[reached].tolist(), strict=True)
        ]
        above = int(reached.argmax())  # bins that lie above these rows; others lie below
        return (F.pad(torch.stack(sums, -2), (0, 0, above, len(first) - above - len(sums))),)

    def finish(self, sums: Sums) -> Tensor:
        """Sums over bin areas, or over the divisor given."""
        if self.divisor is not None:
            return (sums[0] / self.divisor).to(self.dtype)
        height, width = (torch.from_numpy(stop - first) for first, stop in (self.rows, self.cols))
        return (sums[0] / (height[:, None] * width).to(sums[0])).to(self.dtype)


class Moments(Statistic):
    """Mean and variance of groups of channels: of every image for group and instance norm, of all for batch
    norm."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        args, shape = arguments(node), result_shape(source)
        name = operator_name(node)
        self.images = 1 if name == "_native_batch_norm_legit" else shape[0]
        groups = args["num_groups"] if name == "group_norm" else args.get("group", shape[1])
        self.groups = self.images * groups
        self.count = math.prod(shape) // self.groups

    def partial(self, x: Tensor, start: int) -> Sums:
        """Sum and sum of squares of every group, float64 [N * G]."""
        grouped = x.transpose(0, 1) if x.shape[0] > self.images else x
        wide = grouped.reshape(self.groups, -1).double()
        return wide.sum(1), wide.square().sum(1)

    def finish(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """(mean, biased variance), float64 [N * G]."""
        return _moments(sums, self.count)


class Spread(Total):
    """std and var over axes that include the rows, alone or with the mean."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        args = arguments(node)
        given = args.get("correction")
        correction = float(args.get("unbiased", True)) if given is None else float(given)
        self.free = max(self.count - correction, 0.0)

    def partial(self, x: Tensor, start: int) -> Sums:
        """Sums and sums of squares, float64."""
        wide = x.double()
        return wide.sum(self.dims, self.keepdim), wide.square().sum(self.dims, self.keepdim)

    def finish(self, sums: Sums) -> Any:
        """The standard deviation or the variance; NaN where no degree of freedom is left, as in ATen."""
        mean, variance = _moments(sums, self.count)
        variance = variance * self.count / self.free
        spread = (_root(variance, 2) if self.kind.startswith("std") else variance).to(self.dtype)
        return (spread, mean.to(self.dtype)) if self.kind.endswith("_mean") else spread


def _moments(sums: Sums, count: int) -> tuple[Tensor, Tensor]:
    mean = sums[0] / count
    return mean, (sums[1] / count - mean.square()).clamp(min=0)


class Extreme(Statistic):
    """amax and amin over axes that include the rows; equal extremes share the gradient, as ATen has it."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        self.dims = reduced_axes(arguments(node), result_shape(source))
        greatest = operator_name(node) in ("amax", "max")
        self.reduce, self.join = (torch.amax, torch.maximum) if greatest else (torch.amin, torch.minimum)

    def partial(self, x: Tensor, start: int) -> Sums:
        """The extreme and how many elements reach it, axes kept."""
        top = self.reduce(x, self.dims, True)
        return top.double(), (x == top).sum(self.dims, True).double()

    def merge(self, left: Sums, right: Sums) -> Sums:
        """The more extreme one (NaN, if there is any), and the count of it."""
        top = self.join(left[0], right[0])
        return top, left[1] * (left[0] == top) + right[1] * (right[0] == top)

    def differentiable_partial(self, x: Tensor, start: int, whole: Sums) -> Sums:
        """The mean of the elements that reach the whole image's extreme, as a sum over rows."""
        top, count = whole
        share = torch.where(x.detach().double() == top, x.double(), 0) / count
        return share.sum(self.dims, True), torch.zeros_like(count)

    def finish(self, sums: Sums) -> Tensor:
        """The extreme in the operator's shape."""
        return sums[0].to(self.dtype).reshape(result_shape(self.node))


class BinnedMaximum(Statistic):
    """Adaptive max pooling, and max pooling over the whole image; the first of equals takes the gradient."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        self.name = operator_name(node)
        (height, self.width), shape = result_shape(source)[-2:], result_shape(node)[-2:]
        self.rows, self.cols = area_bins(height, shape[0]), area_bins(self.width, shape[1])

    def partial(self, x: Tensor, start: int) -> Sums:
        """Each bin's maximum over these rows and its flat position in the image (-inf and -1 where none)."""
        best = x.new_full(
            (*x.shape[:-2], len(self.rows[0]), len(self.cols[0])), -torch.inf, dtype=torch.float64
        )
        at = torch.full_like(best, -1.0)
        for r, (top, bottom) in enumerate(zip(*self.rows, strict=True)):
            low, high = max(top - start, 0), min(bottom - start, x.shape[-2])
            for c, (left, right) in enumerate(zip(*self.cols, strict=True)):
                if low >= high:
                    continue
                value, index = x[..., low:high, left:right].flatten(-2).max(-1)
                row, col = index // (right - left) + low + start, index % (right - left) + left
                best[..., r, c], at[..., r, c] = value.double(), (row * self.width + col).double()
        return best, at

    def merge(self, left: Sums, right: Sums) -> Sums:
        """The greater one (NaN, if there is any); the upper one of equals, where it has any row."""
        later = (right[0] > left[0]) | (right[0].isnan() & ~left[0].isnan()) | (left[1] < 0)
        return torch.where(later, right[0], left[0]), torch.where(later, right[1], left[1])

    def differentiable_partial(self, x: Tensor, start: int, whole: Sums) -> Sums:
        """The elements at the known positions that lie in these rows, zero elsewhere."""
        at = whole[1].long() - start * self.width
        rows = x.shape[-2] * self.width
        here = (at >= 0) & (at < rows)
        picked = x.flatten(-2).gather(-1, at.clamp(0, rows - 1).flatten(-2)).view_as(at)
        return torch.where(here, picked.double(), 0), torch.zeros_like(whole[1])

    def finish(self, sums: Sums) -> Any:
        """The maxima, as (values, positions) where the operator returns both."""
        values = sums[0].to(self.dtype)
        return values if self.name == "max_pool2d" else (values, sums[1].long())


class Gathered(Statistic):
    """The few rows of a small map themselves, for a view that merges them with another axis."""

    def __init__(self, node: fx.Node, source: fx.Node, axis: int) -> None:
        super().__init__(node, source)
        self.axis, self.rows = axis, result_shape(source)[axis]

    def partial(self, x: Tensor, start: int) -> Sums:
        """The rows in their place, zeros elsewhere."""

        def zeros(rows: int) -> Tensor:
            shape = list(x.shape)
            shape[self.axis] = rows
            return x.new_zeros(shape, dtype=torch.float64)

        below = self.rows - start - x.shape[self.axis]
        return (torch.cat([zeros(start), x.double(), zeros(below)], self.axis),)

    def finish(self, sums: Sums) -> Tensor:
        """The view of them all."""
        return sums[0].to(self.dtype).reshape(result_shape(self.node))


def statistic_for(node: fx.Node, source: fx.Node, axis: int) -> Statistic:
    """The statistic behind an operator that needs the whole image; `axis` is that of its source's rows."""
    name = operator_name(node)
    if name in _VIEWS:
        return Gathered(node, source, axis)
    kinds: dict[str, type[Statistic]] = {
        **dict.fromkeys(("mean", "sum", "linalg_vector_norm"), Total),
        **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "avg_pool2d"), BinnedMean),
        **dict.fromkeys(("adaptive_max_pool2d", "max_pool2d", "max_pool2d_with_indices"), BinnedMaximum),
        **dict.fromkeys(("amax", "amin", "max", "min"), Extreme),
        **dict.fromkeys(("std", "var", "std_mean", "var_mean"), Spread),
        **dict.fromkeys(NORMALISATIONS, Moments),
    }
    return kinds[name](node, source)


_VIEWS = frozenset(("view", "_unsafe_view", "squeeze"))

NORMALISATIONS = frozenset(("group_norm", "native_group_norm", "instance_norm", "_native_batch_norm_legit"))


def normalise(node: fx.Node, x: Tensor, moments: tuple[Tensor, Tensor], weight: Any, bias: Any) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the moments of groups of channels.

    Moments of every image lie one image's after another's.
    """
    images = 1 if operator_name(node) == "_native_batch_norm_legit" else x.shape[0]
    channels = x.shape[1]
    mean, variance = (
        one.view(images, -1).repeat_interleave(images * channels // one.numel(), 1) for one in moments
    )
    scale = (variance + arguments(node)["eps"]).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean * scale if bias is None else bias.double() - mean * scale
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, shift = (one.to(wide).view(images, channels, *[1] * (x.ndim - 2)) for one in (scale, shift))
    return torch.addcmul(shift, x.to(wide), scale).to(x.dtype)
