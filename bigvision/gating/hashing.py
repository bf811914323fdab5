"""Locality-sensitive hashing as a scorer: a token and a key that point the same way share codes.

A bit is the side of a random hyperplane; two vectors at angle a share it with probability 1 - a / pi, and a
code of b bits with probability (1 - a / pi)**b (Charikar, "Similarity Estimation Techniques from Rounding
Algorithms", 2002). Nothing is learnt; the score is the number of tables in which the codes are equal.

Legend: T tokens, E experts (or classes), D dimension, L tables, b bits of a code.
"""

import torch
from torch import Tensor, nn

from .counter import counter_key, counter_normal

MAX_BITS = 24  # a presence table of 2**bits entries is kept for each hash table
_BLOCK = 1 << 14  # rows hashed at once: their projections fit the cache


def hash_planes(seed: int, dim: int, tables: int, bits: int) -> Tensor:
    """Normals of the hyperplanes, float32 [D, L * b], drawn on the CPU: the same on every device and rank."""
    return counter_normal(counter_key(seed, dim), torch.arange(dim), 0, tables * bits)


def hash_codes(x: Tensor, planes: Tensor, bits: int) -> Tensor:
    """Codes int32 [T, L] of x [T, D] under planes [D, L * b]; T may be millions.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.dim() != 2 or x.shape[1] != len(planes) or planes.shape[1] % bits:
        raise ValueError(
            f"x is [T, D] and planes [D, L * {bits}], got {list(x.shape)} and {list(planes.shape)}"
        )
    tables = planes.shape[1] // bits
    powers = 2.0 ** torch.arange(bits, device=x.device)  # exact in float32 up to 24 bits
    codes = torch.empty(len(x), tables, dtype=torch.int32, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for top in range(0, len(x), _BLOCK):
            side = x[top : top + _BLOCK].to(planes.dtype) @ planes >= 0
            # Float32 whatever the planes were cast to: bf16 sums of powers of two run together past 8 bits.
            codes[top : top + _BLOCK] = side.view(-1, tables, bits).float() @ powers
    return codes


def collision_counts(token_codes: Tensor, expert_codes: Tensor) -> Tensor:
    """Tables in which token and expert collide: codes int32 [T, L] and [E, L] -> float32 [T, E]."""
    counts = torch.zeros(len(token_codes), len(expert_codes), device=token_codes.device)
    for ours, theirs in zip(token_codes.unbind(1), expert_codes.unbind(1), strict=True):
        counts += ours[:, None] == theirs
    return counts


def union_collisions(token_codes: Tensor, expert_codes: Tensor, bits: int) -> Tensor:
    """Tables in which an expert collides with any token: codes int32 [T, L] and [E, L] -> float32 [1, E].

    O(T + E) by a table of the codes present, where :func:`collision_counts` takes O(T E): no T x E tensor
    exists.
    """
    counts = torch.zeros(1, len(expert_codes), device=expert_codes.device)
    for ours, theirs in zip(token_codes.unbind(1), expert_codes.unbind(1), strict=True):
        present = torch.zeros(1 << bits, dtype=torch.bool, device=expert_codes.device)
        present[ours.long()] = True
        counts += present.index_select(0, theirs)
    return counts


class HashScorer(nn.Module):
    """Number of hash tables in which a token collides with each key; not learnable.

    Args:
        dim: D.
        tables: L.
        bits: b, 1 to 24.
        seed: of the hyperplanes.
        keys: float [E, D], one key an expert; may be given later by :meth:`index`.

    Raises:
        ValueError: a count below 1 or more than 24 bits.
    """

    planes: Tensor
    expert_codes: Tensor

    def __init__(
        self, dim: int, tables: int, bits: int, *, seed: int = 0, keys: Tensor | None = None
    ) -> None:
        super().__init__()
        if min(dim, tables, bits) < 1 or bits > MAX_BITS:
            raise ValueError(
                f"dim, tables and bits must be at least 1 and bits at most {MAX_BITS}, "
                f"got {dim}, {tables}, {bits}"
            )
        self.bits = bits
        self.register_buffer("planes", hash_planes(seed, dim, tables, bits), persistent=False)
        self.register_buffer("expert_codes", torch.empty(0, tables, dtype=torch.int32), persistent=False)
        if keys is not None:
            self.index(keys)

    def index(self, keys: Tensor) -> None:
        """Hash the keys [E, D] of the experts; call it again when they have moved."""
        self.expert_codes = self.codes(keys)

    def codes(self, x: Tensor) -> Tensor:
        """Codes int32 [T, L] of x [T, D]."""
        return hash_codes(x, self.planes, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """Collisions float32 [T, E] of x [T, D] with each key."""
        return collision_counts(self.codes(x), self.expert_codes)

    def union(self, x: Tensor) -> Tensor:
        """Collisions float32 [1, E] of each key with any row of x [T, D], in O(T + E)."""
        return union_collisions(self.codes(x), self.expert_codes, self.bits)
