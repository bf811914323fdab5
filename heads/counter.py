"""Counter-based random bits: functions of (seed, stream, step, global class id, column), never of a rank.

Integer arithmetic only, so every device gives the same bits. The 32-bit mixer is the two-round multiply-
xorshift of C. Wellons' hash prospector (constants 0x7feb352d, 0x846ca68b); keys of rows are 64 bits wide,
since among ten million classes thousands of pairs would share a 32-bit key and so start alike.

Shapes: K rows, D columns.
"""

import torch
from torch import Tensor

from bigvision.gating import counter_key

_COLUMN = -1640531527  # 0x9e3779b9, the golden ratio, as a signed 32-bit number

# What the bits are for.
STREAM_INIT, STREAM_CATCH_UP, STREAM_ROUNDING = range(3)


def _signed32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def mix32(x: Tensor) -> Tensor:
    """A bijective scrambling of int32 values, any shape."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261  # 0x846ca68b
    return x ^ ((x >> 16) & 0xFFFF)


def row_keys(seed: int, stream: int, step: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 keys for each global class id (int64 [K]), together 64 bits of one row's identity."""
    base = counter_key(seed, stream, step)
    low = (ids & 0x7FFFFFFF).to(torch.int32)
    high = (ids >> 31).to(torch.int32)
    first = mix32(mix32(low ^ _signed32(base)) + high)
    second = mix32(mix32(low + _signed32(base >> 32)) ^ high)
    return first, second


def row_noise(key: Tensor, columns: Tensor) -> Tensor:
    """Random int32 [K, D] from one key a row (int32 [K]) and the column numbers (int32 [D])."""
    return mix32(key[:, None] ^ (columns * _COLUMN)[None, :])


def normal_rows(seed: int, ids: Tensor, dim: int, std: float, dtype: torch.dtype) -> Tensor:
    """Initial centres [K, D] of the classes `ids`: nearly normal, mean 0, standard deviation `std`.

    The sum of the four bytes of a hash (Irwin-Hall, n = 4): no transcendental function, so the same bits
    everywhere.
    """
    first, second = row_keys(seed, STREAM_INIT, 0, ids)
    return spread_normal(first, second, dim, std, dtype)


def spread_normal(first: Tensor, second: Tensor, dim: int, std: float, dtype: torch.dtype) -> Tensor:
    """The rows [K, D] of two keys each, int32 [K]; see `normal_rows`."""
    columns = torch.arange(dim, dtype=torch.int32, device=first.device)
    bits = mix32(row_noise(first, columns) ^ second[:, None])
    total = (bits & 255) + ((bits >> 8) & 255) + ((bits >> 16) & 255) + ((bits >> 24) & 255)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return ((total.to(acc) - 510.0) * (std / 147.8005)).to(dtype)


def rounding_noise(keys: tuple[Tensor, Tensor], number: int, dim: int) -> Tensor:
    """The bits that round the `number`-th wide column of a tile: int32 [K, D], of which the lower 16 count.

    Two columns share a hash, one takes its lower half and one its upper; `keys` are those of `row_keys`.
    """
    columns = torch.arange(dim, dtype=torch.int32, device=keys[0].device)
    return row_noise(keys[number // 2], columns) >> 16 * (number % 2)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """float32 x to a neighbour that bfloat16 can hold, up or down with the probabilities that make the
    expectation x: float32. `noise` is int32 of the same shape.
    """
    bits = x.view(torch.int32) + (noise & 0xFFFF)
    return (bits & -65536).view(torch.float32)
