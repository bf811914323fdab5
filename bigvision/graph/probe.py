"""Stride and halo of a network that can't be traced, from where NaN spreads.

One row (then one column) of the input is NaN; the outputs that turn NaN are those that read it. Unlike a
perturbed value, NaN can't hide behind a ReLU or a maximum; a large perturbation finds what a network that
replaces NaN reads. What hides from both is caught by the final check, which computes tiles both ways.

Legend: C bands; H, W rows and columns; y input row; lo, hi first and last output row that row y reaches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigvision.graph.outputs import main_output

_NARROW = 64  # columns of a probe image: enough for the usual strides, cheap to run
_LONGEST = 4096  # rows of the longest probe image
_STRIDES = tuple(2**k for k in range(8))
_GLOBAL = "one value reaches every output (global pooling, attention or normalisation over space)"
_UNEVEN = f"tiles differ from the whole image at every stride up to {_STRIDES[-1]}"


@dataclass(frozen=True)
class Probed:
    """Total stride and halo in input pixels, and why tiles can't be exact (empty: they can)."""

    stride: int
    halo: int
    inexact: tuple[str, ...]


@torch.inference_mode()
def probe(model: nn.Module, channels: int) -> Probed:
    """The total stride and exact halo of `model` ([1, C, H, W] -> [1, K, H, W]) by NaN propagation.

    Runs the model some hundred times on narrow images. A network in which one value reaches every output has
    `inexact` reasons instead of a halo. Raises ValueError where the output has another size than the input.
    """
    found = [_probe_rows(_Axis(model, channels, transposed)) for transposed in (False, True)]
    stride = max(result.stride for result in found)
    halo = -(-max(result.halo for result in found) // stride) * stride
    return Probed(stride, halo, tuple(dict.fromkeys(reason for result in found for reason in result.inexact)))


class _Axis:
    """The network seen along one axis: images of [1, C, length, narrow], or their transposes."""

    def __init__(self, model: nn.Module, channels: int, transposed: bool) -> None:
        self.model, self.channels, self.transposed = model, channels, transposed

    def __call__(self, image: Tensor) -> Tensor:
        output = main_output(self.model(image.mT.contiguous() if self.transposed else image))
        output = output.mT if self.transposed else output
        if output.shape[-2:] != image.shape[-2:]:
            raise ValueError(
                f"the model turns {image.shape[-2]} x {image.shape[-1]} pixels into {tuple(output.shape)}"
            )
        return output

    def image(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randn((1, self.channels, length, _NARROW), generator=generator)

    def reach(self, image: Tensor, y: int) -> tuple[int, int] | None:
        """First and last output row that row `y` reaches; None for none."""
        for mark in (torch.nan, 1e4):
            marked = image.clone()
            marked[:, :, y] = mark
            output = self(marked)
            reached = output.isnan() if mark != mark else output != self(image)
            rows = reached.any(dim=(0, 1, 3)).nonzero()
            if len(rows):
                return int(rows[0]), int(rows[-1])
        return None


def _probe_rows(axis: _Axis) -> Probed:
    length = 256
    while True:
        reach = axis.reach(axis.image(length), length // 2)
        margin = length // 4
        if reach is None or (reach[0] >= margin and reach[1] < length - margin):
            return _measure(axis, length)
        if length == _LONGEST:
            return Probed(1, 0, (_GLOBAL,))
        length *= 2


def _measure(axis: _Axis, length: int) -> Probed:
    """The first stride that the reach of rows repeats with and at which tiles equal the whole image."""
    image = axis.image(length)
    middle = length // 2 // _STRIDES[-1] * _STRIDES[-1]
    reaches: list[tuple[int, int]] = []
    for stride in _STRIDES:
        for y in range(middle + len(reaches), middle + 2 * stride):
            reaches.append(axis.reach(image, y) or (y, y))
        if any(
            (first + stride, last + stride) != later
            for (first, last), later in zip(reaches, reaches[stride:], strict=False)
        ):
            continue
        halo = max(_needed(y, *reach, stride) for y, reach in enumerate(reaches, middle))
        if _tiles_agree(axis, stride, halo):
            return Probed(stride, halo, ())
    return Probed(1, 0, (_UNEVEN,))


def _needed(y: int, first: int, last: int, stride: int) -> int:
    """The halo, in whole strides, with which every block of `stride` rows that row `y` reaches sees it."""
    below = y - ((first // stride + 1) * stride - 1)
    above = last // stride * stride - y
    return -(-max(below, above, 0) // stride) * stride


def _tiles_agree(axis: _Axis, stride: int, halo: int) -> bool:
    """Whether tiles of this stride and halo, at odd and even multiples, equal the whole image."""
    period = _STRIDES[-1]
    image = axis.image(-(-(2 * halo + 8 * stride) // period) * period)
    whole = axis(image)
    for first in (halo + stride, halo + 2 * stride, halo + 3 * stride):
        try:
            tile = axis(image[:, :, first - halo : first + stride + halo])[:, :, halo : halo + stride]
        except (RuntimeError, ValueError):  # a size that the network doesn't take
            return False
        expected = whole[:, :, first : first + stride]
        if not (tile - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1e-6):
            return False
    return True
