"""A random order of any length that needs no storage.

A keyed Feistel network permutes [0, 4^k); indices that land outside [0, n) are walked on until they land
inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The order of an
epoch is a function of (seed, epoch), so any rank, worker or restarted run can name the image at any position.
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 6
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


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
        values = self._encrypt(positions.astype(np.uint64), half)
        while (outside := values >= self.count).any():
            values[outside] = self._encrypt(values[outside], half)
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray, half: int) -> np.ndarray:
        mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
        left, right = values >> shift, values & mask
        for key in _round_keys(self.seed, self.epoch):
            left, right = right, left ^ (mix(right ^ key) & mask)
        return left << shift | right


def mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of uint64 that scatters every bit."""
    values = (values ^ (values >> np.uint64(30))) * MIX[0]
    values = (values ^ (values >> np.uint64(27))) * MIX[1]
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    keys: np.ndarray = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    return keys
