"""Counter-based random numbers: a pure function of (seed, step, global token id, global expert id).

There is no generator state. A rank that holds experts [start, stop) draws just those columns and agrees bit
for bit with a process that draws them all, and recomputation draws the same numbers again.

The 64-bit words are those of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014): mix(key + index * GOLDEN), computed in int64, whose wrap-around is the arithmetic
modulo 2**64.

Legend: T tokens, E experts (or classes) in the range asked for.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
# Elements drawn at once: on a CPU the block and its scratch stay in the second-level cache (twice as fast as
# one pass over ten million), on an accelerator launches are what costs.
_CPU_BLOCK = 1 << 16
_DEVICE_BLOCK = 1 << 24


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


def _mix_word(word: int) -> int:
    """SplitMix64's finaliser of one Python integer."""
    word &= _WORD
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        word = ((word ^ (word >> shift)) * multiplier) & _WORD
    return word ^ (word >> _SHIFTS[2])


def _mix_(words: Tensor, scratch: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place, of int64 ``words``; ``scratch`` is another tensor of its shape."""
    for position, shift in enumerate(_SHIFTS):
        torch.bitwise_right_shift(words, shift, out=scratch)
        scratch.bitwise_and_((1 << (64 - shift)) - 1)  # int64 shifts drag the sign along
        words.bitwise_xor_(scratch)
        if position < len(_MULTIPLIERS):
            words.mul_(_signed(_MULTIPLIERS[position]))
    return words


def counter_key(*counters: int) -> int:
    """Fold integers (a seed, a step, a purpose) into one 64-bit key; order and length matter."""
    key = len(counters)
    for counter in counters:
        key = _mix_word((key + _GOLDEN) ^ _mix_word(counter))
    return key


def _check_range(start: int, stop: int) -> None:
    if not 0 <= start <= stop:
        raise ValueError(f"experts [{start}, {stop}) is no range of ids")


def _blocks(
    key: int, token_ids: Tensor, start: int, stop: int
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield (rows, columns) and the int64 words there, which the next block overwrites."""
    _check_range(start, stop)
    if token_ids.dtype != torch.int64 or token_ids.dim() != 1:
        raise ValueError(f"token ids are int64 [T], got {token_ids.dtype} {list(token_ids.shape)}")
    num_tokens, num_experts, device = len(token_ids), stop - start, token_ids.device
    if num_tokens == 0 or num_experts == 0:
        return
    block = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK
    columns = min(num_experts, block)
    rows = min(num_tokens, max(1, block // columns))
    streams = token_ids * _signed(_GOLDEN) + _signed(key)
    _mix_(streams, torch.empty_like(streams))
    offsets = torch.arange(columns, device=device) * _signed(_GOLDEN)
    words = torch.empty(2, rows * columns, dtype=torch.int64, device=device)
    for left in range(0, num_experts, columns):
        width = min(columns, num_experts - left)
        # Folded into the row keys, which are few, rather than added to every column.
        shift = _signed((start + left) * _GOLDEN & _WORD)
        for top in range(0, num_tokens, rows):
            height = min(rows, num_tokens - top)
            drawn, scratch = (w[: height * width].view(height, width) for w in words)
            torch.add(streams[top : top + height, None] + shift, offsets[:width], out=drawn)
            yield (slice(top, top + height), slice(left, left + width)), _mix_(drawn, scratch)


def counter_bits(key: int, token_ids: Tensor, start: int, stop: int) -> Tensor:
    """64 random bits for each pair of a token and an expert in [start, stop).

    Args:
        key: 64-bit key, see :func:`counter_key`.
        token_ids: int64 [T], global ids; their device is where the words are drawn.
        start: first global expert id.
        stop: one past the last.

    Returns:
        int64 [T, stop - start], the same on every device.

    Raises:
        ValueError: the ids are not int64 [T], or the range is not one.
    """
    out = torch.empty(len(token_ids), stop - start, dtype=torch.int64, device=token_ids.device)
    for where, words in _blocks(key, token_ids, start, stop):
        out[where] = words
    return out


def counter_uniform(key: int, token_ids: Tensor, start: int, stop: int) -> Tensor:
    """Uniform float32 [T, stop - start], multiples of 2**-24 in [0, 1); see :func:`counter_bits`."""
    _check_range(start, stop)
    out = torch.empty(len(token_ids), stop - start, device=token_ids.device)
    for where, words in _blocks(key, token_ids, start, stop):
        # 24 bits are a float32's digits: the conversion is exact, hence the same on every device.
        out[where] = words.bitwise_right_shift_(40).bitwise_and_((1 << 24) - 1)
    return out.mul_(2.0**-24)


def counter_normal(key: int, token_ids: Tensor, start: int, stop: int) -> Tensor:
    """Standard normal float32 [T, stop - start] by Box-Muller; see :func:`counter_bits`.

    Logarithm and cosine differ in their last digit between devices; draw on the CPU where that matters.
    """
    _check_range(start, stop)
    out = torch.empty(len(token_ids), stop - start, device=token_ids.device)
    for where, words in _blocks(key, token_ids, start, stop):
        high = words.bitwise_right_shift(40).bitwise_and_((1 << 24) - 1).double()
        low = words.bitwise_right_shift(16).bitwise_and_((1 << 24) - 1).double()
        radius = ((high + 0.5) * 2.0**-24).log_().mul_(-2).sqrt_()
        out[where] = radius.mul_(low.mul_(math.tau * 2.0**-24).cos_()).float()
    return out


def counter_gumbel(key: int, token_ids: Tensor, start: int, stop: int) -> Tensor:
    """Standard Gumbel float32 [T, stop - start]: -log(-log(u)); see :func:`counter_bits`."""
    # Half a grid step keeps u inside (0, 1); float64 because 1 - 2**-25 is 1 in float32.
    uniform = counter_uniform(key, token_ids, start, stop).double().add_(2.0**-25)
    return uniform.log_().neg_().log_().neg_().float()
