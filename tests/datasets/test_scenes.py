"""Synthetic scenes: any block equals the crop of the whole, and the land looks as promised."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from datasets.scenes import BANDS, BUILDING, CLASSES, COLOURS, FOREST, ROAD, WATER, Scene

SMALL = Scene(700, 620, seed=3)
WHOLE_IMAGE, WHOLE_LABELS = SMALL.read(0, 0, 700, 620)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_block_is_the_crop_of_the_whole(data: st.DataObject) -> None:
    top = data.draw(st.integers(0, 699))
    left = data.draw(st.integers(0, 619))
    height = data.draw(st.integers(1, 700 - top))
    width = data.draw(st.integers(1, 620 - left))
    image, labels = SMALL.read(top, left, height, width)
    np.testing.assert_array_equal(image, WHOLE_IMAGE[:, top : top + height, left : left + width])
    np.testing.assert_array_equal(labels, WHOLE_LABELS[top : top + height, left : left + width])
    np.testing.assert_array_equal(SMALL.labels(top, left, height, width), labels)


def test_the_size_of_a_scene_does_not_change_its_land() -> None:
    far = Scene(30_000, 30_000, seed=3)
    np.testing.assert_array_equal(far[:, 100:150, 200:233], SMALL[:, 100:150, 200:233])
    assert far.read(29_990, 29_983, 10, 17)[0].shape == (4, 10, 17)


def test_slices_as_numpy_does() -> None:
    for key in (
        np.s_[:, 5:9],
        np.s_[1, 5:9, 3:4],
        np.s_[:3, -2:],
        np.s_[2],
        np.s_[:, 4],
        np.s_[:, 4, 7],
        np.s_[:, 9:5],
        np.s_[[3, 0], 1:3],
    ):
        np.testing.assert_array_equal(SMALL[key], WHOLE_IMAGE[key], err_msg=str(key))
    with pytest.raises(IndexError, match="step 1, not 2"):
        SMALL[:, ::2]
    with pytest.raises(IndexError, match="700 is outside"):
        SMALL[:, 700]


def test_seeds_are_different_landscapes() -> None:
    other = Scene(256, 256, seed=4).labels(0, 0, 256, 256)
    assert np.mean(other != WHOLE_LABELS[:256, :256]) > 0.2


@pytest.mark.parametrize("seed", range(3))
def test_the_land_has_every_class_and_no_nodata(seed: int) -> None:
    image, labels = Scene(2048, 2048, seed=seed).read(0, 0, 2048, 2048)
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    assert share.size == len(CLASSES) == len(COLOURS)
    assert share.min() > 0.005 and share.max() < 0.9
    assert image.dtype == np.uint8 and image.min() >= 1 and len(image) == len(BANDS)


def test_patches_are_compact_roads_are_long_and_buildings_are_rectangles() -> None:
    labels = Scene(4096, 4096, seed=0).labels(0, 0, 4096, 4096)
    without_roads = ndimage.median_filter(labels[::8, ::8], 7)
    for patch in (WATER, FOREST):
        regions, _ = ndimage.label(without_roads == patch)
        assert 8 * max(box[0].stop - box[0].start for box in ndimage.find_objects(regions)) > 1024
    roads, _ = ndimage.label(labels == ROAD)
    assert np.bincount(roads.ravel())[1:].max() > 0.9 * (labels == ROAD).sum(), "one connected network"
    houses, _ = ndimage.label(labels == BUILDING)
    boxes = ndimage.find_objects(houses)
    filled = [np.mean(houses[box] == i + 1) for i, box in enumerate(boxes)]
    assert np.median(filled) == 1 and np.mean(np.array(filled) == 1) > 0.9
    assert max(box[0].stop - box[0].start for box in boxes) <= 36


def test_single_pixels_do_not_tell_the_classes_apart() -> None:
    image, labels = Scene(1024, 1024, seed=0).read(0, 0, 1024, 1024)
    means = np.stack([image[:, labels == c].mean(axis=1) for c in range(len(CLASSES))])
    distance = ((image[None].astype(np.float32) - means[:, :, None, None]) ** 2).sum(axis=1)
    assert np.mean(distance.argmin(axis=0) == labels) < 0.85


def test_reading_a_block_of_a_huge_scene_needs_no_more_than_the_block() -> None:
    huge = Scene(30_000, 30_000)
    tracemalloc.start()
    huge.read(20_000, 20_000, 1024, 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="not 0 x 5"):
        Scene(0, 5)
    with pytest.raises(ValueError, match=r"8 x 8 at \(695, 0\) is not inside 700 x 620"):
        SMALL.read(695, 0, 8, 8)
    with pytest.raises(ValueError, match="0 x 3"):
        SMALL.labels(0, 0, 0, 3)
