"""Convolutions as a step computes them: taped, with quick weight gradients, or packed, for inference alone.

On a processor with AVX2, oneDNN's float32 weight gradient of channels-last operands was measured at 5 to 9
times that of channels-first ones, which takes about the forward's time; transposing both operands first costs
a tenth of what it saves.

Legend: C channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]
Convolve = Callable[[Tensor, Tensor, Tensor | None, Pair, Pair, Pair, int], Tensor]
"""Of input, weight, bias, stride, padding, dilation and groups."""

ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "none": ("none", lambda x: x),
    "relu": ("relu", torch.relu_),
    "sigmoid": ("sigmoid", torch.sigmoid_),
    "tanh": ("tanh", torch.tanh_),
    "silu": ("swish", lambda x: F.silu(x, inplace=True)),
    "hardswish": ("hardswish", lambda x: F.hardswish(x, inplace=True)),
}
"""By ATen's name what oneDNN calls an activation that it can apply to results, and the same in place."""


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """`torch.nn.functional.conv2d`, once differentiable."""
    wanted = torch.is_grad_enabled() and weight.requires_grad
    if wanted and x.dtype == torch.float32 and x.device.type == "cpu":
        y: Tensor = _Convolution.apply(x, weight, bias, stride, padding, dilation, groups)
        return y
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, *rest: Any
    ) -> Tensor:
        dilation, groups = rest
        ctx.save_for_backward(x, weight)
        ctx.geometry = (stride, padding, dilation, False, (0, 0), groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        differentiate = torch.ops.aten.convolution_backward
        (dy,) = grads
        of_x, _, of_bias = ctx.needs_input_grad[:3]
        dx = db = None
        if of_x:
            dx = differentiate(dy, x, weight, None, *ctx.geometry, (True, False, False))[0]
        if of_bias:
            db = dy.sum((0, 2, 3))
        operands = (channels_first(dy), channels_first(x), weight.contiguous())
        dw = differentiate(*operands, None, *ctx.geometry, (False, True, False))[1]
        return dx, dw, db, None, None, None, None


def channels_first(x: Tensor) -> Tensor:
    """x [N, C, H, W] with its channels outermost in memory; of one image by ATen's blocked transpose."""
    n, c, h, w = x.shape
    if n != 1 or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    return x.permute(0, 2, 3, 1).reshape(h * w, c).t().contiguous().view(1, c, h, w)


class PackedConvolution:
    """A convolution with its activation, for inference; the weight is packed for oneDNN once.

    Args:
        activation: by ATen's name.
        fused: let oneDNN apply it. Its ReLU gives 0 for NaN.
    """

    def __init__(self, activation: str, *, fused: bool = True) -> None:
        name, self._in_place = ACTIVATIONS[activation]
        self._name, self._fused = name if fused else "none", fused
        self._packed: tuple[Tensor, int, Tensor] | None = None  # a weight, its version, what it was packed to

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        """`torch.nn.functional.conv2d` and the activation."""
        if not _packs(x):
            return self._in_place(F.conv2d(x, weight, bias, stride, padding, dilation, groups))
        version = 0 if weight.is_inference() else weight._version
        packed = self._packed
        if packed is None or packed[0] is not weight or packed[1] != version:
            blocks = torch.ops.mkldnn._reorder_convolution_weight(
                weight, padding, stride, dilation, groups, list(x.shape)
            )
            self._packed = packed = weight, version, blocks
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x,
            packed[2],
            bias,
            padding,
            stride,
            dilation,
            groups,
            self._name,
            [],
            "",
        )
        return y if self._fused else self._in_place(y)


def _packs(x: Tensor) -> bool:
    """Whether oneDNN computes in this precision here (the operators are those that inductor calls)."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not x.numel():
        return False
    quick = x.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return x.dtype == torch.float32 or quick
