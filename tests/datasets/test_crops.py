"""Random crops: a function of seed, step and place; image and labels turned alike."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from rasterio.windows import Window

from datasets.crops import draw_crop, read_crops, shift_tones, turn
from datasets.pairs import IGNORE

sizes = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4)


@given(sizes, st.integers(1, 70), st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 64))
def test_crops_lie_inside_and_depend_on_their_counters_alone(
    sizes: list[tuple[int, int]], size: int, seed: int, step: int, place: int
) -> None:
    crop = draw_crop(sizes, size, seed=seed, step=step, place=place)
    assert crop == draw_crop(sizes, size, seed=seed, step=step, place=place)
    height, width = sizes[crop.scene]
    window = crop.window
    assert (window.height, window.width) == (min(size, height), min(size, width))
    assert 0 <= window.row_off <= height - window.height and 0 <= window.col_off <= width - window.width
    assert 0 <= crop.symmetry < 8


def test_scenes_are_drawn_by_area_and_places_differ() -> None:
    crops = [
        draw_crop([(10, 10), (30, 10)], 1, seed=1, step=s, place=p) for s in range(200) for p in range(4)
    ]
    assert abs(np.mean([crop.scene for crop in crops]) - 0.75) < 0.05
    assert len({(c.scene, c.window.row_off, c.window.col_off) for c in crops[:40]}) > 30


def test_the_eight_symmetries_are_different_and_keep_pixels_together() -> None:
    square = np.arange(9).reshape(3, 3)
    turned = [turn(square, k) for k in range(8)]
    assert len({t.tobytes() for t in map(np.ascontiguousarray, turned)}) == 8
    assert all(sorted(t.ravel()) == list(range(9)) for t in turned)


@dataclass
class Numbered:
    """A scene whose pixels hold their own coordinates, and whose class is their parity."""

    shape: tuple[int, int, int]

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = (
            np.arange(window.row_off, window.row_off + window.height),
            np.arange(window.col_off, window.col_off + window.width),
        )
        image = np.stack(np.meshgrid(rows, columns, indexing="ij")).astype(np.float32)
        return image, (image.sum(axis=0) % 2).astype(np.uint8)


def test_image_and_labels_stay_together_and_small_scenes_are_filled_up() -> None:
    scenes = [Numbered((2, 40, 50)), Numbered((2, 5, 9))]
    crops = [draw_crop([s.shape[1:] for s in scenes], 8, seed=0, step=s, place=0) for s in range(300)]
    assert {crop.scene for crop in crops} == {0, 1}
    images, targets = read_crops(scenes, crops, 8)  # type: ignore[arg-type]
    assert images.shape == (300, 2, 8, 8) and targets.shape == (300, 8, 8)
    seen = targets != IGNORE
    np.testing.assert_array_equal(images.sum(axis=1)[seen] % 2, targets[seen])
    assert {int(n) for n in seen.sum(axis=(1, 2))} == {64, 40}
    assert not images.sum(axis=1)[~seen].any()


def test_tones_shift_crop_by_crop_and_missing_pixels_stay_missing() -> None:
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    images[:, :, :2] = 0
    shifted = shift_tones(images, 0.2, seed=1, step=5, places=[0, 1, 2, 3])
    assert not shifted[:, :, :2].any()
    apart = shift_tones(images[2:3], 0.2, seed=1, step=5, places=[2])
    np.testing.assert_array_equal(apart[0], shifted[2])
    for n in range(4):
        for band in range(3):
            before, after = images[n, band, 2:].ravel(), shifted[n, band, 2:].ravel()
            gain, offset = np.polyfit(before, after, 1)
            assert abs(gain - 1) <= 0.2 and abs(offset) <= 0.2
            np.testing.assert_allclose(gain * before + offset, after, atol=1e-5)
    assert len({round(float(v), 6) for v in shifted[:, 0, 2, 0] / images[:, 0, 2, 0]}) == 4
    np.testing.assert_array_equal(shift_tones(images, 0.0, seed=1, step=5, places=[0, 1, 2, 3]), images)
