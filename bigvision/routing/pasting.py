"""Windows cut out of images, and pasted into one: each the other's adjoint.

Slices do both in plain autograd too, but there every slice's backward touches the whole image.

Legend: B images, N windows of one shape, C channels, H, W rows and columns, h, w of a window.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigvision.routing.boxes import Box

Place = tuple[int, Box]
"""A window of one image of the batch."""


def _view(x: Tensor, place: Place) -> Tensor:
    image, box = place
    return x[image, :, box.top : box.bottom, box.left : box.right]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Sequence[Place]) -> Tensor:
        ctx.places, ctx.shape = places, x.shape
        first = places[0][1]
        out = _empty((len(places), x.shape[1], first.height, first.width), x)
        for row, place in zip(out, places, strict=True):
            row.copy_(_view(x, place))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return paste(ctx.shape, [(grad, ctx.places)]), None


class _Paste(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], placed: Sequence[Sequence[Place]], *pieces: Tensor) -> Tensor:
        ctx.placed = placed
        out = _empty(shape, pieces[0]).zero_()
        for batch, places in zip(pieces, placed, strict=True):
            for piece, place in zip(batch, places, strict=True):
                _view(out, place).add_(piece)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        found = zip(ctx.placed, wanted, strict=True)
        return None, None, *(cut(grad, places) if need else None for places, need in found)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory of this shape in the layout of `like`."""
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=form)


def cut(x: Tensor, places: Sequence[Place]) -> Tensor:
    """Windows [N, C, h, w] of x [B, C, H, W]; all of one size, at least one."""
    whole = Box(0, 0, x.shape[-2], x.shape[-1])
    if list(places) == [(image, whole) for image in range(len(x))]:
        return x
    windows: Tensor = _Cut.apply(x, places)
    return windows


def paste(shape: Sequence[int], pieces: Sequence[tuple[Tensor, Sequence[Place]]]) -> Tensor:
    """An image [B, C, H, W] of zeros to which batches of windows are added, each at its places."""
    image: Tensor = _Paste.apply(shape, [places for _, places in pieces], *(batch for batch, _ in pieces))
    return image
