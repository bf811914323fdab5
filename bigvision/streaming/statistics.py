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

from bigvision.graph.arguments import arguments
from bigvision.graph.resampling import area_bins
from bigvision.graph.trace import describe, operator_name, result_shape

Sums = tuple[Tensor, ...]


class Statistic(ABC):
    """One statistic of one streaming value `source`."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        self.node, self.source = node, source
        self.dtype: torch.dtype = source.meta["val"].dtype

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
    """sum, mean and Euclidean norm over axes that include the rows."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        args, shape = arguments(node), result_shape(source)
        self.kind = operator_name(node)
        self.dims = reduced_axes(args, shape)
        self.keepdim = bool(args.get("keepdim", False))
        self.count = math.prod(shape[dim] for dim in self.dims)
        if self.kind == "linalg_vector_norm" and args["ord"] != 2:
            raise ValueError(f"{describe(node)} over the image is supported for ord=2, not {args['ord']}")

    def partial(self, x: Tensor, start: int) -> Sums:
        """Sums, or sums of squares."""
        if self.kind == "linalg_vector_norm":
            return (x.double().square().sum(self.dims, self.keepdim),)
        return (x.sum(self.dims, self.keepdim, dtype=torch.float64),)

    def finish(self, sums: Sums) -> Tensor:
        """The sum, the mean or the norm, in the operator's dtype."""
        (total,) = sums
        if self.kind == "mean":
            total = total / self.count
        return (total.sqrt() if self.kind == "linalg_vector_norm" else total).to(self.dtype)


class BinnedMean(Statistic):
    """Adaptive average pooling to a few bins (global pooling is one bin): [1, C, bins, bins]."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        height, width = result_shape(source)[-2:]
        out_height, out_width = result_shape(node)[-2:]
        self.rows, self.cols = area_bins(height, out_height), area_bins(width, out_width)

    def partial(self, x: Tensor, start: int) -> Sums:
        """Sums over each bin's part of these rows."""
        columns = [
            x[..., first:stop].sum(-1, dtype=torch.float64) for first, stop in zip(*self.cols, strict=True)
        ]
        by_column = torch.stack(columns, -1)  # [1, C, h, bins]
        rows = torch.arange(start, start + x.shape[-2], device=x.device)
        first, stop = (torch.from_numpy(edge).to(x.device)[:, None] for edge in self.rows)
        inside = ((rows >= first) & (rows < stop)).to(torch.float64)
        return (torch.einsum("rh,nchw->ncrw", inside, by_column),)

    def finish(self, sums: Sums) -> Tensor:
        """Sums over bin areas."""
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


class Spread(Statistic):
    """std and var over axes that include the rows."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        args, shape = arguments(node), result_shape(source)
        self.dims = reduced_axes(args, shape)
        self.count = math.prod(shape[dim] for dim in self.dims)
        unbiased = args.get("unbiased", True)
        correction = args["correction"] if args.get("correction") is not None else float(bool(unbiased))
        self.free = max(self.count - correction, 0)
        self.shape = result_shape(node)

    def partial(self, x: Tensor, start: int) -> Sums:
        """Sum and sum of squares, float64, axes kept."""
        wide = x.double()
        return wide.sum(self.dims, True), wide.square().sum(self.dims, True)

    def finish(self, sums: Sums) -> Tensor:
        """The standard deviation or the variance; NaN where no degree of freedom is left, as in ATen."""
        _, variance = _moments(sums, self.count)
        variance = variance * self.count / variance.new_tensor(self.free)
        value = variance.sqrt() if operator_name(self.node) == "std" else variance
        return value.reshape(self.shape).to(self.dtype)


def _moments(sums: Sums, count: int) -> tuple[Tensor, Tensor]:
    mean = sums[0] / count
    return mean, (sums[1] / count - mean.square()).clamp(min=0)


def reduced_axes(args: dict[str, Any], shape: tuple[int, ...]) -> list[int]:
    """The axes that a reduction runs over, from 0; all where it names none."""
    dims = args.get("dim")
    given = range(len(shape)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    return [dim % len(shape) for dim in given]


class Extreme(Statistic):
    """amax and amin over axes that include the rows; equal extremes share the gradient, as ATen has it."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        super().__init__(node, source)
        args, shape = arguments(node), result_shape(source)
        self.dims = reduced_axes(args, shape)
        self.sign = 1 if operator_name(node) == "amax" else -1

    def partial(self, x: Tensor, start: int) -> Sums:
        """The extreme and how many elements reach it, axes kept."""
        top = (self.sign * x).amax(self.dims, True)
        return top.double(), (self.sign * x == top).sum(self.dims, True).double()

    def merge(self, left: Sums, right: Sums) -> Sums:
        """The greater one, and the count of it."""
        top = torch.maximum(left[0], right[0])
        return top, left[1] * (left[0] == top) + right[1] * (right[0] == top)

    def differentiable_partial(self, x: Tensor, start: int, whole: Sums) -> Sums:
        """The mean of the elements that reach the whole image's extreme, as a sum over rows."""
        top, count = whole
        reached = (self.sign * x.detach()).double() == top
        share = torch.where(reached, (self.sign * x).double(), 0) / count
        return share.sum(self.dims, True), torch.zeros_like(count)

    def finish(self, sums: Sums) -> Tensor:
        """The extreme in the operator's shape."""
        return (self.sign * sums[0]).to(self.dtype).reshape(result_shape(self.node))


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
            (*x.shape[:2], len(self.rows[0]), len(self.cols[0])), -torch.inf, dtype=torch.float64
        )
        at = torch.full_like(best, -1.0)
        for r, (top, bottom) in enumerate(zip(*self.rows, strict=True)):
            low, high = max(top - start, 0), min(bottom - start, x.shape[-2])
            for c, (left, right) in enumerate(zip(*self.cols, strict=True)):
                if low >= high:
                    continue
                value, index = x[..., low:high, left:right].flatten(2).max(-1)
                row, col = index // (right - left) + low + start, index % (right - left) + left
                best[..., r, c], at[..., r, c] = value.double(), (row * self.width + col).double()
        return best, at

    def merge(self, left: Sums, right: Sums) -> Sums:
        """The greater one; the upper one of equals."""
        later = right[0] > left[0]
        return torch.where(later, right[0], left[0]), torch.where(later, right[1], left[1])

    def differentiable_partial(self, x: Tensor, start: int, whole: Sums) -> Sums:
        """The elements at the known positions that lie in these rows, zero elsewhere."""
        at = whole[1].long() - start * self.width
        rows = x.shape[-2] * self.width
        here = (at >= 0) & (at < rows)
        picked = x.flatten(2).gather(2, at.clamp(0, rows - 1).flatten(2)).view_as(at)
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
    """The statistic behind an operator that needs the whole image; `axis` is that of its source's rows.

    Raises:
        ValueError: a case (an order, a set of axes) that none covers.
    """
    name = operator_name(node)
    if name in _VIEWS:
        return Gathered(node, source, axis)
    kinds: dict[str, type[Statistic]] = {
        **dict.fromkeys(("mean", "sum", "linalg_vector_norm"), Total),
        **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "avg_pool2d"), BinnedMean),
        **dict.fromkeys(("adaptive_max_pool2d", "max_pool2d", "max_pool2d_with_indices"), BinnedMaximum),
        **dict.fromkeys(("amax", "amin"), Extreme),
        **dict.fromkeys(("std", "var"), Spread),
    }
    return kinds.get(name, Moments)(node, source)


_VIEWS = frozenset(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"))

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
