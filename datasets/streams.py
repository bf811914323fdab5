"""Random numbers by counting: what is drawn depends on its use, the seed and a few counters alone.

Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key of two words
and a counter of four into four words. Seed and use are the key; the caller's counters are the three upper
words, and the lowest counts what one stream has drawn. Two streams can therefore share no number: they would
have to draw 2**66 first.
"""

from enum import IntEnum

import numpy as np

_WORD = 2**64


class Use(IntEnum):
    """What is drawn. One number each and for good: a run that goes on draws what it would have drawn."""

    CROP = 0  # step, place in the batch
    TONES = 1  # step, place in the batch
    SCENE_ORDER = 2  # epoch
    FACE_AUGMENTATION = 3  # epoch, position
    FACE_PATTERNS = 4
    FACE_LIGHTS = 5
    FACE_CODE = 6  # identity
    FACE_IMAGE = 7  # identity, image


def stream(use: Use, seed: int, *counters: int) -> np.random.Generator:
    """The random numbers of one use, seed and up to three counters, independent of all others'.

    Raises:
        ValueError: the seed or a counter is not in [0, 2**64), or there are more than three counters.
    """
    if len(counters) > 3 or not all(0 <= value < _WORD for value in (seed, *counters)):
        raise ValueError(
            f"seed and counters are up to four numbers from 0 to 2**64 - 1, not {seed}, {counters}"
        )
    upper = [*counters, 0, 0, 0][:3]
    # As arrays: numpy reads a list that mixes small and large integers as one of floats.
    key, counter = np.array([seed, int(use)], np.uint64), np.array([0, *upper], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
