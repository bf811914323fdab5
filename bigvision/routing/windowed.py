"""A traced network over windows of an image, as if over the whole of it.

Every operator runs without padding of its own on just the pixels that later ones read; where a window meets
the image's edge it gets the operator's padding there and nowhere else. So a window's result is the whole
image's, whatever its neighbours are routed to.

Legend: N windows of one shape, C channels, K output channels, h, w rows and columns of what is read.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from bigvision.graph import TracedGraph
from bigvision.graph.arguments import INTERPOLATIONS, arguments
from bigvision.graph.cost import flops
from bigvision.graph.trace import operator_name, result_shape
from bigvision.routing.boxes import Box
from bigvision.routing.spans import Cut, Interval, Windows

Values = Callable[[fx.Node], Any]


class WindowedNetwork:
    """A network in eval mode, ready to compute any window of images of one size; shares its parameters.

    Args:
        module: the network, for its current parameters.
        traced: its graph at the (padded) image's size.

    Raises:
        UnwindowedError: an operator has no window rule.
    """

    def __init__(self, module: nn.Module, traced: TracedGraph) -> None:
        self.module, self.traced = module, traced
        self.windows = Windows(traced)
        streaming = self.windows.streaming
        self.work = np.array([flops(node) / _pixels(node) for node in streaming])
        self.last_use = self._last_uses()
        self._flops: dict[tuple[int, int], float] = {}

    def intervals(self, box: Box) -> tuple[Interval, Interval]:
        """Rows and columns of one window of the output."""
        return self.windows.interval(0, box.top, box.bottom), self.windows.interval(1, box.left, box.right)

    def flops(self, box: Box) -> float:
        """Of computing this window of the output, halos included."""
        rows, cols = self.intervals(box)
        alike = id(rows.cuts), id(cols.cuts)  # which live as long as their windows
        if alike not in self._flops:
            kept = (np.array([cut.keep for cut in one.cuts], np.float64) for one in (rows, cols))
            self._flops[alike] = float(self.work @ math.prod(kept))
        return self._flops[alike]

    def tensors(self) -> dict[fx.Node, Tensor]:
        """The parameters and buffers as they are now."""
        live: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        live |= dict(self.module.named_buffers(remove_duplicate=False))
        traced = self.traced
        return {node: live.get(traced.names[node], tensor) for node, tensor in traced.tensors.items()}

    def __call__(self, x: Tensor, rows: tuple[Cut, ...], cols: tuple[Cut, ...]) -> Tensor:
        """Results [N, K, ...] of windows x [N, C, h, w] whose intervals have these cuts."""
        held: dict[fx.Node, Any] = {**self.tensors(), self.traced.image: x}
        plan = dict(zip(self.windows.streaming, zip(rows, cols, strict=True), strict=True))
        for node in self.windows.order:
            if node in plan:
                held[node] = self._run(node, held, *plan[node])
            else:
                held[node] = node.target(*_mapped(node.args, held), **_mapped(node.kwargs, held))  # type: ignore[operator]
            for finished in self.last_use.get(node, ()):
                del held[finished]
        return held[self.windows.output]

    def _run(self, node: fx.Node, held: dict[fx.Node, Any], rows: Cut, cols: Cut) -> Any:
        sources = self.windows.inputs[node]
        cut = {
            source: _window(held[source], *rows.reads[i], *cols.reads[i]) for i, source in enumerate(sources)
        }

        def values(source: fx.Node) -> Any:
            return cut[source] if source in cut else held[source]

        name = operator_name(node)
        if name in _KERNELS:
            return _KERNELS[name](node, values, rows, cols)
        if name == "relu" and not torch.is_grad_enabled() and self._owned(node, sources[0], held):
            return values(sources[0]).relu_()
        args, kwargs = fx.map_arg(node.args, values), fx.map_arg(node.kwargs, values)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _owned(self, node: fx.Node, source: fx.Node, held: dict[fx.Node, Any]) -> bool:
        """Whether this is the last reader of memory that nothing else shares."""
        made_fresh = operator_name(source) in ("conv2d", "batch_norm", "add", "conv_transpose2d")
        return source.op == "call_function" and made_fresh and source in self.last_use.get(node, ())

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.windows.order:
            for source in (node, *node.all_input_nodes):
                last[source] = node
        uses: dict[fx.Node, list[fx.Node]] = {}
        for source, reader in last.items():
            if source is not self.windows.output and source not in self.traced.tensors:
                uses.setdefault(reader, []).append(source)
        return uses


def _mapped(args: Any, held: dict[fx.Node, Any]) -> Any:
    return fx.map_arg(args, lambda node: held[node])


def _pixels(node: fx.Node) -> int:
    shape = result_shape(node)
    return shape[-2] * shape[-1]


def _window(x: Any, top: int, height: int, left: int, width: int) -> Any:
    if isinstance(x, tuple | list):  # several results, of which others may read more than this one
        return tuple(_window(part, top, height, left, width) for part in x)
    if x.ndim < 2:  # the moments beside a batch norm's result, empty
        return x
    if x.shape[-2] != height:
        x = x.narrow(-2, top, height)
    return x if x.shape[-1] == width else x.narrow(-1, left, width)


def _padded(x: Tensor, rows: Cut, cols: Cut, value: float = 0.0) -> Tensor:
    amounts = (cols.before, cols.after, rows.before, rows.after)
    return functional.pad(x, amounts, value=value) if any(amounts) else x


def _kept(y: Tensor, rows: Cut, cols: Cut) -> Tensor:
    return _window(y, rows.skip, rows.keep, cols.skip, cols.keep)


def _convolution(node: fx.Node, values: Values, rows: Cut, cols: Cut) -> Tensor:
    args = arguments(node)
    x, padding = values(args["input"]), (0, 0)
    if rows.before == rows.after and cols.before == cols.after:
        padding = (rows.before, cols.before)  # the kernel pads without a copy
    else:
        x = _padded(x, rows, cols)
    bias = None if args["bias"] is None else values(args["bias"])
    weight = values(args["weight"])
    return functional.conv2d(x, weight, bias, args["stride"], padding, args["dilation"], args["groups"])


def _transposed(node: fx.Node, values: Values, rows: Cut, cols: Cut) -> Tensor:
    args = arguments(node)
    bias = None if args["bias"] is None else values(args["bias"])
    x = _padded(values(args["input"]), rows, cols)
    y = functional.conv_transpose2d(
        x, values(args["weight"]), bias, args["stride"], 0, 0, args["groups"], args["dilation"]
    )
    return _kept(y, rows, cols)


def _max_pool(node: fx.Node, values: Values, rows: Cut, cols: Cut) -> Any:
    args = arguments(node)
    x = _padded(values(args["self"]), rows, cols, -torch.inf)
    y = functional.max_pool2d(x, args["kernel_size"], args["stride"] or None, 0, args["dilation"])
    return (y,) if operator_name(node) == "max_pool2d_with_indices" else y


def _average_pool(node: fx.Node, values: Values, rows: Cut, cols: Cut) -> Tensor:
    args = arguments(node)
    return functional.avg_pool2d(
        _padded(values(args["self"]), rows, cols),
        args["kernel_size"],
        args["stride"] or None,
        divisor_override=args["divisor_override"],
    )


def _pad(node: fx.Node, values: Values, rows: Cut, cols: Cut) -> Tensor:
    args = arguments(node)
    return _padded(values(args["self"]), rows, cols, args.get("value") or 0.0)


def _shuffle(node: fx.Node, values: Values, rows: Cut, cols: Cut) -> Tensor:
    args = arguments(node)
    return _kept(functional.pixel_shuffle(values(args["self"]), args["upscale_factor"]), rows, cols)


def _interpolation(node: fx.Node, values: Values, rows: Cut, cols: Cut) -> Tensor:
    args = arguments(node)
    x = values(args["input"])
    factor = result_shape(node)[-1] // result_shape(args["input"])[-1]
    size = [x.shape[-2] * factor, x.shape[-1] * factor]
    operator = getattr(torch.ops.aten, operator_name(node))
    bilinear = operator_name(node) == "upsample_bilinear2d"
    return _kept(operator(x, size, False) if bilinear else operator(x, size), rows, cols)


_KERNELS: dict[str, Callable[[fx.Node, Values, Cut, Cut], Any]] = {
    "conv2d": _convolution,
    "conv_transpose2d": _transposed,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _average_pool,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "pixel_shuffle": _shuffle,
    **dict.fromkeys(INTERPOLATIONS, _interpolation),
}
