"""Aligning a face by five landmarks: eyes, nose tip, corners of the mouth, in the image's left-to-right
order.

Legend: P points, x column and y row of a pixel's centre, the first pixel's centre being (0, 0).
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

# The standard template of aligned 112 x 112 crops (deepinsight/insightface, `face_align`).
TEMPLATE_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares rotation, scale and shift [2, 3] that takes points [P, 2] to points [P, 2].

    In the complex plane it is target = a * source + b, an ordinary linear regression; it equals Umeyama
    (1991) with scale for two dimensions, reflections excluded. Raises ValueError for shapes that differ and
    for points that are all the same.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2:
        raise ValueError(f"points of shapes {source.shape} and {target.shape}; both must be [P, 2]")
    s, t = source @ [1, 1j], target @ [1, 1j]
    spread = np.sum(np.abs(s - s.mean()) ** 2)
    if not np.isfinite(spread) or spread == 0:
        raise ValueError(f"landmarks {source.tolist()} do not span a face")
    a = np.sum((t - t.mean()) * np.conj(s - s.mean())) / spread
    b = t.mean() - a * s.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align_face(image: np.ndarray, landmarks: np.ndarray, size: int = 112) -> np.ndarray:
    """Crop uint8 [size, size, 3] of uint8 [H, W, 3], its five landmarks [5, 2] brought onto the template."""
    forward = similarity(landmarks, TEMPLATE_112 * (size / 112))
    linear = np.linalg.inv(forward[:, :2])
    # Pillow measures from the pixel's corner, landmarks from its centre: shift by half a pixel on either
    # side.
    shift = -linear @ forward[:, 2] + 0.5 - linear @ [0.5, 0.5]
    coefficients = (*linear[0], shift[0], *linear[1], shift[1])
    picture = Image.fromarray(image)
    return np.asarray(
        picture.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    )


def read_landmarks(path: str | Path) -> dict[str, np.ndarray]:
    """Landmarks [5, 2] by image name from a CSV with lines `image,x1,y1,...,x5,y5`; a header line may lead.

    Raises ValueError naming the line that does not fit.
    """
    found: dict[str, np.ndarray] = {}
    with Path(path).open(newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            try:
                values = np.array([float(value) for value in row[1:]]).reshape(5, 2)
            except ValueError as error:
                if number == 1 or not row:
                    continue
                raise ValueError(
                    f"{path} line {number}: not an image and ten numbers: {','.join(row)}"
                ) from error
            found[row[0]] = values
    if not found:
        raise ValueError(f"{path} holds no line of an image and ten numbers")
    return found
