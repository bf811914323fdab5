"""Alignment: the similarity against the SVD solution of Umeyama, the crop against a face drawn at known
places.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.alignment import TEMPLATE_112, align_face, read_landmarks, similarity


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The published solution: rotation from an SVD, reflections excluded, then scale and shift."""
    s, t = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(t.T @ s / len(s))
    sign = np.diag([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / s.var(0).sum()
    return np.column_stack([scale * rotation, target.mean(0) - scale * rotation @ source.mean(0)])


@given(st.integers(0, 10**6), st.integers(3, 8))
def test_it_is_umeyamas(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    source, target = random.normal(size=(2, count, 2))
    np.testing.assert_allclose(similarity(source, target), umeyama(source, target), atol=1e-9)


def test_points_that_do_not_span_a_face_are_refused() -> None:
    with pytest.raises(ValueError, match="do not span a face"):
        similarity(np.ones((5, 2)), TEMPLATE_112)
    with pytest.raises(ValueError, match="do not span a face"):
        similarity(np.full((5, 2), np.nan), TEMPLATE_112)
    with pytest.raises(ValueError, match="both must be"):
        similarity(np.ones((4, 2)), TEMPLATE_112)


@pytest.mark.parametrize("angle", [0.0, 0.3, -1.2, 3.0])
def test_landmarks_land_on_the_template(angle: float) -> None:
    # Bright blobs at the landmarks of a turned and enlarged face must come out at the template's places.
    turn = 2.0 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    landmarks = (TEMPLATE_112 - 56) @ turn.T + [210, 190]
    rows, columns = np.mgrid[:400, :400]
    image = sum(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 40) for x, y in landmarks)
    crop = align_face(np.repeat((255 * image)[..., None], 3, axis=2).astype(np.uint8), landmarks)
    assert crop.shape == (112, 112, 3)
    for x, y in TEMPLATE_112:
        left, top = round(x) - 6, round(y) - 6
        window = crop[top : top + 13, left : left + 13, 0].astype(float)
        window[window < 20] = 0
        centre = (np.mgrid[:13, :13] * window).sum(axis=(1, 2)) / window.sum()
        np.testing.assert_allclose(centre + np.array([top, left]), [y, x], atol=0.15)


def test_a_face_on_the_template_is_cropped_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    np.testing.assert_allclose(align_face(image, TEMPLATE_112).astype(int), image.astype(int), atol=1)


def test_landmark_files(tmp_path: Path) -> None:
    path = tmp_path / "landmarks.csv"
    numbers = ",".join(str(number) for number in range(10))
    path.write_text(f"image,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\na.jpg,{numbers}\n\n")
    assert read_landmarks(path)["a.jpg"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    path.write_text(f"a.jpg,{numbers}\nb.jpg,1,2\n")
    with pytest.raises(ValueError, match=r"line 2: not an image and ten numbers: b\.jpg,1,2"):
        read_landmarks(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no line"):
        read_landmarks(path)
