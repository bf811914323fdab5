"""Synthetic identities of any count: generated when asked for, nothing stored.

An identity is a code of K independent normal numbers, an image is a fixed bank of K smooth patterns weighted
by that code (an "eigenface" model: Turk and Pentland 1991, run forwards), seen through what makes faces hard:
another illumination, a shift of a few pixels, contrast, noise. Every number is drawn from a counter-based
generator keyed by (seed, identity, image), so image 3 of identity 9 999 999 is the same in every process
without making the others.

They prove that a pipeline learns, at any scale; they say nothing about real faces.

Legend: K patterns, S image size, M margin of the canvas in which the image is shifted.
"""

import numpy as np

from datasets.streams import Use, stream

PATTERNS = 48
LIGHTS = 6
CELLS = 9  # the patterns' own resolution: smooth at any image size


def smooth_patterns(count: int, channels: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Smooth random patterns float32 [count, channels * size * size], of unit variance each."""
    coarse = random.standard_normal((count, channels, CELLS, CELLS))
    rows = _interpolation(size)
    fine = np.einsum("hi,kcij,wj->kchw", rows, coarse, rows, optimize=True).reshape(count, -1)
    fine -= fine.mean(axis=1, keepdims=True)
    return np.ascontiguousarray(fine / fine.std(axis=1, keepdims=True), np.float32)


def _interpolation(size: int) -> np.ndarray:
    """Linear interpolation [size, CELLS] of CELLS samples."""
    places = np.linspace(0, CELLS - 1, size)
    weights: np.ndarray = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(CELLS)))
    return weights


class SyntheticIdentities:
    """Face-like images of `num_classes` identities, `per_class` of each; position = identity * per_class +
    image.

    Raises ValueError for counts below one.
    """

    def __init__(self, num_classes: int, per_class: int = 16, size: int = 112, seed: int = 0) -> None:
        if num_classes < 1 or per_class < 1 or size < 8:
            raise ValueError(
                f"need at least one identity, one image each and 8 pixels; got {num_classes}, "
                f"{per_class}, {size}"
            )
        self.num_classes, self.per_class, self.size, self.seed = num_classes, per_class, size, seed
        self.margin = size // 16
        canvas = size + 2 * self.margin
        self._patterns = smooth_patterns(PATTERNS, 3, canvas, stream(Use.FACE_PATTERNS, seed))
        self._lights = smooth_patterns(LIGHTS, 1, canvas, stream(Use.FACE_LIGHTS, seed))

    def __len__(self) -> int:
        return self.num_classes * self.per_class

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [S, S, 3] and label of one position."""
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)} synthetic images")
        identity, image = divmod(index, self.per_class)
        return self.image(identity, image), identity

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions."""
        return np.repeat(np.arange(self.num_classes), self.per_class)

    def code(self, identity: int) -> np.ndarray:
        """Code float64 [K] of one identity."""
        return stream(Use.FACE_CODE, self.seed, identity).standard_normal(PATTERNS)

    def image(self, identity: int, image: int) -> np.ndarray:
        """One image uint8 [S, S, 3] of one identity."""
        random = stream(Use.FACE_IMAGE, self.seed, identity, image)
        canvas = self.size + 2 * self.margin
        face = (self.code(identity) / np.sqrt(PATTERNS)).astype(np.float32) @ self._patterns
        light = (random.standard_normal(LIGHTS) / np.sqrt(LIGHTS)).astype(np.float32) @ self._lights
        top, left = random.integers(0, 2 * self.margin + 1, 2)
        picture = face.reshape(3, canvas, canvas) + 0.5 * light.reshape(1, canvas, canvas)
        picture = picture[:, top : top + self.size, left : left + self.size]
        picture = random.uniform(0.7, 1.3) * picture + 0.2 * random.standard_normal(dtype=np.float32)
        picture += 0.15 * random.standard_normal(picture.shape, dtype=np.float32)
        pixels: np.ndarray = (127.5 + 127.5 * np.tanh(picture)).astype(np.uint8)
        return pixels.transpose(1, 2, 0)
