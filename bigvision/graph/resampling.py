"""Resampling in global coordinates: which rows an interpolated row mixes, and in what proportion.

A tile that is resampled by itself uses its own size as the ratio and its own edges as the clamp; these taps
are those of the whole image. Coordinates are computed in the precision that the operator itself uses (float32
for float32 and narrower, float64 for float64), since at row 30000 a float32 coordinate is already 1e-3 off.

Legend: n_in, n_out rows before and after; t taps a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Taps:
    """Output row i is the sum over t of weight[i, t] * input row index[i, t]; both [n_out, t]."""

    index: np.ndarray
    weight: np.ndarray


def interpolation_taps(
    kind: str, size_in: int, size_out: int, *, align_corners: bool, factor: float | None, dtype: torch.dtype
) -> Taps:
    """The taps of `nearest`, `nearest_exact`, `bilinear` or `bicubic`, as ATen's upsample_*2d computes them.

    `factor` is the operator's own scale factor, where it was given one: it then replaces size_in / size_out.
    """
    if kind.startswith("nearest"):
        return _nearest(kind, size_in, size_out, factor, dtype)
    source, real = _source_rows(size_in, size_out, align_corners, factor, dtype)
    if kind == "bilinear":
        source = np.maximum(source, real(0))
        low = np.minimum(np.floor(source).astype(np.int64), size_in - 1)
        part = np.clip(source - low.astype(real), 0, 1).astype(np.float64)
        return Taps(np.stack([low, np.minimum(low + 1, size_in - 1)], 1), np.stack([1 - part, part], 1))
    low = np.floor(source).astype(np.int64)
    index = (low[:, None] + np.arange(-1, 3)).clip(0, size_in - 1)
    return Taps(index, _cubic_weights((source - low.astype(real)).astype(np.float64)))


def area_taps(size_in: int, size_out: int) -> Taps:
    """Adaptive average pooling: row i averages rows floor(i*n_in/n_out) ... ceil((i+1)*n_in/n_out) - 1."""
    first, stop = area_bins(size_in, size_out)
    width = int((stop - first).max())
    index = first[:, None] + np.arange(width)
    inside = index < stop[:, None]
    weight = inside / (stop - first)[:, None]
    return Taps(np.where(inside, index, stop[:, None] - 1), weight)


def area_bins(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """The half-open input range of every bin of an adaptive pool, int64 [n_out] each."""
    bins = np.arange(size_out, dtype=np.int64)
    return bins * size_in // size_out, -((-(bins + 1) * size_in) // size_out)


def resample_rows(x: Tensor, taps: Taps, rows: int, start: int, *, skip_zeros: bool = False) -> Tensor:
    """Mix the rows (axis `rows`) of `x`, whose first is the image's row `start`; differentiable.

    `skip_zeros` leaves taps of weight 0 out, so that what is not finite there does no harm.
    """
    index = torch.from_numpy(taps.index - start).to(x.device)
    weight = torch.from_numpy(taps.weight).to(x)
    shape = [-1 if axis == rows % x.ndim else 1 for axis in range(x.ndim)]
    mixed = x.index_select(rows, index[:, 0]) * weight[:, 0].view(shape)
    for t in range(1, index.shape[1]):
        part, share = x.index_select(rows, index[:, t]), weight[:, t].view(shape)
        part = torch.where(share == 0, 0, part) if skip_zeros else part
        mixed = torch.addcmul(mixed, part, share)
    return mixed


def _source_rows(
    size_in: int, size_out: int, align_corners: bool, factor: float | None, dtype: torch.dtype
) -> tuple[np.ndarray, type]:
    real: type = np.float64 if dtype == torch.float64 else np.float32
    rows: np.ndarray = np.arange(size_out, dtype=real)
    if align_corners:
        scale = real(size_in - 1) / real(size_out - 1) if size_out > 1 else real(0)
        return rows * scale, real
    scale = real(1 / factor) if factor else real(size_in) / real(size_out)
    return scale * (rows + real(0.5)) - real(0.5), real


def _nearest(kind: str, size_in: int, size_out: int, factor: float | None, dtype: torch.dtype) -> Taps:
    """Asks the operator itself: it rounds in its own way."""
    wide = torch.promote_types(dtype, torch.float32)  # the precision in which it computes the index
    column = torch.arange(size_in, dtype=wide).view(1, 1, size_in, 1)
    operator = {
        "nearest": torch.ops.aten.upsample_nearest2d,
        "nearest_exact": torch.ops.aten._upsample_nearest_exact2d,
    }
    picked = operator[kind](column, [size_out, 1], factor, 1.0)
    index = picked.flatten().to(torch.int64).numpy()[:, None]
    return Taps(index, np.ones(index.shape))


def _cubic_weights(part: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution (1981), a = -0.75 as in ATen; float64 [n, 4]."""

    def near(d: np.ndarray) -> np.ndarray:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: np.ndarray) -> np.ndarray:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return np.stack([far(part + 1), near(part), near(1 - part), far(2 - part)], 1)


def interpolate_columns(
    x: Tensor, size_out: int, kind: str, align_corners: bool, factor: float | None
) -> Tensor:
    """Resample the columns of [N, C, H, W] alone, by the operator's own kernel."""
    rows = x.shape[-2]
    if kind == "nearest":
        return torch.ops.aten.upsample_nearest2d(x, [rows, size_out], 1.0, factor)
    if kind == "nearest_exact":
        return torch.ops.aten._upsample_nearest_exact2d(x, [rows, size_out], 1.0, factor)
    if kind == "bilinear":
        return torch.ops.aten.upsample_bilinear2d(x, [rows, size_out], align_corners, 1.0, factor)
    if kind == "bicubic":
        return torch.ops.aten.upsample_bicubic2d(x, [rows, size_out], align_corners, 1.0, factor)
    return F.adaptive_avg_pool2d(x, (rows, size_out))
