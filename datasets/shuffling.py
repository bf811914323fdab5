"""A random order of any length that needs no storage.

A keyed Feistel network permutes [0, 4^k); indices that land outside [0, n) are walked on until they land
inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Its round function
is the counter-based generator of the gates. The order of an epoch is a function of (seed, epoch), so any
rank, worker or restarted run can name the image at any position.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigvision.gating import counter_bits, counter_key

ROUNDS = 6


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of range(count), keyed by seed and epoch."""

    count: int
    seed: int
    epoch: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Indices int64 at positions int64, both within [0, count); raises ValueError for others."""
        positions = np.asarray(positions, np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.count):
            raise ValueError(
                f"positions {positions.min()}..{positions.max()} are not all in [0, {self.count})"
            )
        half = max(1, (max(self.count - 1, 1).bit_length() + 1) // 2)
        values = self._encrypt(torch.from_numpy(positions), half)
        while (outside := values >= self.count).any():
            values[outside] = self._encrypt(values[outside], half)
        found: np.ndarray = values.numpy()
        return found

    def _encrypt(self, values: Tensor, half: int) -> Tensor:
        mask = (1 << half) - 1
        left, right = values >> half, values & mask
        for number in range(ROUNDS):
            bits = counter_bits(counter_key(self.seed, self.epoch, number), right, 0, 1)[:, 0]
            left, right = right, left ^ (bits & mask)
        return left << half | right
