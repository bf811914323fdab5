"""Windows cut out of images, and pasted into one: each the other's adjoint.

Slices do both in plain autograd too, but there every slice's backward touches the whole image.

Legend: B images, N windows of one shape, C channels, H, W rows and columns, h, w of a window.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigvision.routing.boxes import Box

Place = tuple[int, Box]
"""A window of one image of the batch."""
Piece = tuple[Tensor, Sequence[Place]]
"""Windows [N, C, h, w] and their N places."""
# Bytes: from where NumPy asks for huge pages, the most that the C heap keeps when freed, torch's alignment.
_HUGE_PAGES, _KEPT, _ALIGNED = 1 << 22, 1 << 25, 64


def _view(x: Tensor, place: Place) -> Tensor:
    image, box = place
    return x[image, :, box.top : box.bottom, box.left : box.right]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Sequence[Place]) -> Tensor:
        ctx.places, ctx.shape = places, x.shape
        first = places[0][1]
        out = _empty((len(places), x.shape[1], first.height, first.width), x, x.dtype)
        for row, place in zip(out, places, strict=True):
            row.copy_(_view(x, place))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return paste(ctx.shape, [(grad, ctx.places)], like=grad), None


class _Paste(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shape: Sequence[int],
        like: Tensor,
        alone: bool,
        placed: Sequence[Sequence[Place]],
        *pieces: Tensor,
    ) -> Tensor:
        ctx.placed = placed
        covered = sum(box.area for places in placed for _, box in places)
        whole = alone and covered == shape[0] * shape[2] * shape[3]
        out = (_empty if whole else _zeros)(shape, like, pieces[0].dtype)
        for batch, places in zip(pieces, placed, strict=True):
            for piece, place in zip(batch, places, strict=True):
                _view(out, place).copy_(piece) if alone else _view(out, place).add_(piece)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4:]
        found = zip(ctx.placed, wanted, strict=True)
        return None, None, None, None, *(cut(grad, places) if need else None for places, need in found)


def _empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of this shape in the layout of `like`."""
    count = math.prod(shape)
    if like.device.type == "cpu" and count * dtype.itemsize > _KEPT:
        return _laid_out(_untouched(count, dtype), shape, like)
    return _laid_out(torch.empty(count, dtype=dtype, device=like.device), shape, like)


def _zeros(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of this shape in the layout of `like`; large ones cost what is written of them."""
    count = math.prod(shape)
    if like.device.type == "cpu" and count * dtype.itemsize > _HUGE_PAGES:
        return _laid_out(_untouched(count, dtype), shape, like)
    return _laid_out(torch.zeros(count, dtype=dtype, device=like.device), shape, like)


def _untouched(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros [count] on the CPU that the system makes page by page as they are written.

    torch.zeros writes all of them itself, with a page fault each 4 KiB where the memory is new; NumPy leaves
    that to the system and asks for huge pages. For 33 MB of which a quarter is written: 4 ms against 33 ms.
    """
    size = count * dtype.itemsize
    held = np.zeros(size + _ALIGNED, np.uint8)
    start = -held.ctypes.data % _ALIGNED
    return torch.from_numpy(held[start : start + size]).view(dtype)


def _laid_out(memory: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    if not _by_pixels(like):
        return memory.view(*shape)
    batch, channels, height, width = shape
    return memory.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _by_pixels(like: Tensor) -> bool:
    return not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)


def cut(x: Tensor, places: Sequence[Place]) -> Tensor:
    """Windows [N, C, h, w] of x [B, C, H, W]; all of one size, at least one."""
    whole = Box(0, 0, x.shape[-2], x.shape[-1])
    if list(places) == [(image, whole) for image in range(len(x))]:
        return x
    windows: Tensor = _Cut.apply(x, places)
    return windows


def paste(
    shape: Sequence[int],
    pieces: Sequence[Piece],
    *,
    like: Tensor,
    alone: bool = False,
) -> Tensor:
    """An image [B, C, H, W] of zeros to which batches of windows are added, each at its places.

    Args:
        shape: of the image.
        pieces: windows [N, C, h, w] and their N places; at least one piece.
        like: whose memory layout the image gets.
        alone: no two windows overlap: they are copied.
    """
    placed = [places for _, places in pieces]
    image: Tensor = _Paste.apply(shape, like, alone, placed, *(batch for batch, _ in pieces))
    return image
