"""What a region can be routed to, and each expert's exact way of computing windows.

Legend: N windows, C channels in, K channels out, H, W rows and columns of the padded image, h, w of a window.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigvision.graph import Geometry, TracedGraph, cost, geometry, main_output, trace, trace_padded
from bigvision.graph.geometry import NOMINAL_SIZE
from bigvision.graph.trace import result_shape
from bigvision.routing.boxes import Box
from bigvision.routing.spans import UnwindowedError
from bigvision.routing.windowed import WindowedNetwork

_SIZES_KEPT = 8  # image sizes whose graphs stay in memory
_FARTHEST = 8 * NOMINAL_SIZE


class Skip(nn.Module):
    """An expert that computes nothing: the same K values everywhere, learnt or fixed.

    Args:
        channels: K.
        scale: image pixels per output pixel, as the other experts have it.
        learn: whether the values train; they begin at 0.
    """

    def __init__(self, channels: int, *, scale: int = 1, learn: bool = True) -> None:
        super().__init__()
        if channels < 1 or scale < 1:
            raise ValueError(f"channels and scale must be at least 1, got {channels} and {scale}")
        self.scale = scale
        self.values = nn.Parameter(torch.zeros(channels), requires_grad=learn)

    def forward(self, x: Tensor) -> Tensor:
        """[N, K, h / scale, w / scale] of x [N, C, h, w]."""
        size = (len(x), len(self.values), x.shape[-2] // self.scale, x.shape[-1] // self.scale)
        return self.values.to(x.dtype).view(1, -1, 1, 1).expand(size)


class LowRes(nn.Module):
    """A network at a fraction of the resolution: averaged down, run, and interpolated up.

    Its halo is gathered at full resolution and averaged down with the region, so that a low-resolution region
    borders on what its neighbours show at that resolution, whatever they are routed to.

    Args:
        network: of [N, C, h, w] -> [N, K, h, w].
        factor: at least 2; a quarter of the resolution is 4.
    """

    def __init__(self, network: nn.Module, factor: int = 2) -> None:
        super().__init__()
        if factor < 2:
            raise ValueError(f"factor must be at least 2, got {factor}")
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        """[N, K, h, w] of x [N, C, h, w]; h and w multiples of factor."""
        small = self.network(functional.avg_pool2d(x, self.factor))
        return functional.interpolate(
            small, scale_factor=float(self.factor), mode="bilinear", align_corners=False
        )


@dataclass(frozen=True)
class Shape:
    """What an expert makes of an image: its stride, exact halo, K channels and pixels per output pixel."""

    stride: int
    halo: int
    channels: int
    scale: Fraction


@dataclass(frozen=True)
class Job:
    """One window of the output that an expert computes: what it reads, and what makes windows alike."""

    read: Box
    alike: Any

    @property
    def key(self) -> Hashable:
        """Equal for windows that may run as one batch; cuts count by identity, as like windows share them."""
        cuts = isinstance(self.alike[0], tuple) and not isinstance(self.alike[0], Box)
        alike = tuple(map(id, self.alike)) if cuts else self.alike
        return self.read.height, self.read.width, alike


class Program(Protocol):
    """An expert over windows of images of one size."""

    def job(self, box: Box) -> Job:
        """For a window of the output."""

    def flops(self, box: Box) -> float:
        """Of a window of the output, halo included."""

    def run(self, x: Tensor, alike: Any) -> Tensor:
        """Results [N, K, ...] of the windows x [N, C, h, w] of jobs that are alike."""


class ValidProgram:
    """Valid convolutions: halos shrink from layer to layer; see :class:`WindowedNetwork`."""

    def __init__(self, network: WindowedNetwork) -> None:
        self.network = network

    def job(self, box: Box) -> Job:
        """Rows and columns with their cuts."""
        rows, cols = self.network.intervals(box)
        return Job(Box(rows.start, cols.start, rows.stop, cols.stop), (rows.cuts, cols.cuts))

    def flops(self, box: Box) -> float:
        """Of every operator on the pixels that it is needed on."""
        return self.network.flops(box)

    def run(self, x: Tensor, alike: Any) -> Tensor:
        """The windows of one batch."""
        return self.network(x, *alike)


class CroppedProgram:
    """The module itself on windows with their whole halo, of which the interior is kept.

    For training mode (batch norm and dropout then see the windows) and operators without a window rule.
    """

    def __init__(
        self, module: nn.Module, shape: Shape, size: tuple[int, int], flops_per_pixel: float
    ) -> None:
        self.module, self.shape, self.size = module, shape, size
        self.flops_per_pixel = flops_per_pixel

    def _read(self, box: Box) -> Box:
        inside = _in_image(box, self.shape.scale).grown(self.shape.halo, *self.size)
        s = self.shape.stride
        return Box(
            inside.top // s * s, inside.left // s * s, -(-inside.bottom // s) * s, -(-inside.right // s) * s
        )

    def job(self, box: Box) -> Job:
        """The window with its halo, and where its interior lies in the result."""
        read = self._read(box)
        top, left = int(read.top / self.shape.scale), int(read.left / self.shape.scale)
        inner = Box(box.top - top, box.left - left, box.bottom - top, box.right - left)
        # At the image's edge there is no halo to crop, but padding of the network's own.
        return Job(read, (inner, read.height, read.width))

    def flops(self, box: Box) -> float:
        """Of the window with its halo."""
        return self._read(box).area * self.flops_per_pixel

    def run(self, x: Tensor, alike: Any) -> Tensor:
        """The windows of one batch."""
        inner = alike[0]
        return main_output(self.module(x))[..., inner.top : inner.bottom, inner.left : inner.right]


class SkipProgram:
    """Nothing is read."""

    def __init__(self, skip: Skip) -> None:
        self.skip = skip

    def job(self, box: Box) -> Job:
        """An empty window."""
        return Job(Box(0, 0, 0, 0), (box.height, box.width))

    def flops(self, box: Box) -> float:
        """None."""
        return 0.0

    def run(self, x: Tensor, alike: Any) -> Tensor:
        """The constant."""
        values = self.skip.values
        return values.to(x.dtype).view(1, -1, 1, 1).expand(len(x), len(values), *alike)


class RegionExpert:
    """An expert's geometry, and its program for each image size.

    Args:
        name: for messages.
        module: [N, C, h, w] -> [N, K, h / scale, w / scale].
        channels: C.
        size: H and W of the image that it is for, not padded; where known, one trace does for all.

    Raises:
        ValueError: an expert that no halo fits (whole-image statistics and the like), that doesn't take C
            channels, or that gives no map.
    """

    def __init__(
        self, name: str, module: nn.Module, channels: int, size: tuple[int, int] | None = None
    ) -> None:
        self.name, self.module, self.channels = name, module, channels
        self._programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        self._traced: TracedGraph | None = None
        if isinstance(module, Skip):
            self.shape, self.flops_per_pixel = (
                Shape(module.scale, 0, len(module.values), Fraction(module.scale)),
                0.0,
            )
            return
        with evaluating(module):
            self._traced, known = _measured(name, module, channels, size)
        _, height, width = self._traced.shape
        self.out_channels = result_shape(self._traced.output)[1]
        self.flops_per_pixel = cost(self._traced).flops / (height * width)
        self.shape = Shape(known.stride, known.halo, self.out_channels, known.output_scale)

    def check_region(self, region: int) -> None:
        """Refuse regions that the expert's windows don't fit.

        Raises:
            ValueError: a region that is no multiple of the stride, or no whole number of output pixels.
        """
        stride, scale = self.shape.stride, self.shape.scale
        if region % stride or (region / scale).denominator != 1:
            raise ValueError(
                f"a region of {region} px fits no halo of expert {self.name!r}: it must be a multiple of its "
                f"stride, {stride} px (its halo is {self.shape.halo} px)"
            )

    def program(self, height: int, width: int) -> Program:
        """For images of H x W pixels, multiples of the stride, in the mode the module is in now."""
        if isinstance(self.module, Skip):
            return SkipProgram(self.module)
        live = _depends_on_mode(self.module)
        dtype = next((p.dtype for p in self.module.parameters()), None)
        key = (height, width, live, dtype)
        if key not in self._programs:
            self._programs[key] = self._build(height, width, live)
            while len(self._programs) > _SIZES_KEPT:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _build(self, height: int, width: int, live: bool) -> Program:
        cropped = CroppedProgram(self.module, self.shape, (height, width), self.flops_per_pixel)
        if live:
            return cropped
        try:
            return ValidProgram(WindowedNetwork(self.module, self._trace(height, width)))
        except UnwindowedError:
            return cropped

    def _trace(self, height: int, width: int) -> TracedGraph:
        """At this size, in eval mode and the type that the module has now."""
        shape, dtype = (self.channels, height, width), next((p.dtype for p in self.module.parameters()), None)
        first = self._traced
        if first is None or first.shape != shape or dtype not in (None, first.image.meta["val"].dtype):
            with evaluating(self.module):
                return trace(self.module, shape)
        return first


def _measured(
    name: str, module: nn.Module, channels: int, size: tuple[int, int] | None
) -> tuple[TracedGraph, Geometry]:
    """The module in a graph large enough to hold its halo, at the image's size if that is."""
    for traced in _traces(name, module, channels, size):
        known, (_, height, width) = geometry(traced), traced.shape
        holds = known.halo + known.stride < min(height, width) // 2
        # In an image as small as its kernel, a pool that needs the whole of it may be an ordinary one.
        if (min(height, width) >= NOMINAL_SIZE) if known.inexact else holds:
            break
    if known.inexact:
        raise ValueError(f"no halo fits expert {name!r}: {'; '.join(known.inexact)}")
    out, scale = result_shape(traced.output), known.output_scale
    if len(out) != 4 or scale == 0 or out[-2:] != (int(height / scale), int(width / scale)):
        raise ValueError(
            f"expert {name!r} turns {(1, *traced.shape)} into {out}, which is no map of the image"
        )
    return traced, known


def _traces(
    name: str, module: nn.Module, channels: int, size: tuple[int, int] | None
) -> Iterator[TracedGraph]:
    """At the image's own size (which may be too small to tell), then at sizes that hold most halos."""
    known = False
    if size is not None:
        with suppress(ValueError):
            yield trace_padded(module, (channels, *size))[0]
            known = True
    side = NOMINAL_SIZE
    while side <= _FARTHEST:
        try:
            yield trace(module, (channels, side, side))
        except ValueError as error:
            if known:  # it runs at the image's size only
                return
            raise ValueError(f"expert {name!r} takes no image of {channels} channels: {error}") from error
        side *= 2


def _in_image(box: Box, scale: Fraction) -> Box:
    """A window of the output, in image pixels."""
    return Box(
        int(box.top * scale),
        int(box.left * scale),
        -int(-box.bottom * scale // 1),
        -int(-box.right * scale // 1),
    )


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether the module, as it stands, does what its eval graph doesn't."""
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    return any(part.training and isinstance(part, kinds) for part in module.modules())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every part gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
