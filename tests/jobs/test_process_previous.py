"""`bigvision process --previous`: what is copied from an earlier result, exactly and on demand nearly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from numpy.typing import NDArray
from process_scenes import TRANSFORM, random_pixels, write_scene
from rasterio.warp import Resampling, reproject

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.run import Outcome
from tiling import TileGrid, open_raster

NET = "bigvision.models.small_unet:small_unet?in_channels=2&classes=3&width=4&depth=1"
PHASED = f"{Path(__file__).parent}/process_networks.py:gated_net?bands=2"
SIZE = (194, 214)


def options(previous: Path | None = None, **more: Any) -> Options:
    about = {"scale": 255.0, "dtype": "float32", "tile": 32, "output": "logits", "format": "zarr"}
    return Options(**({"model": NET, "previous": previous} | about | more))


def run(scene: Path, target: Path, wishes: Options) -> tuple[Outcome, NDArray[Any]]:
    outcome = run_scene((str(scene),), target, wishes)
    return outcome, open_raster(target).read()


def either(
    outcome: Outcome, copied: NDArray[Any], computed: NDArray[Any], same: Callable[[Any], bool]
) -> tuple[NDArray[Any], int]:
    """Both results by tile, the copied one where `same(padded window)` says so; pixels of the other."""
    expected, pixels = copied.copy(), 0
    assert outcome.plan is not None
    shape = computed.shape[1:]
    for tile in TileGrid(*shape, 32, outcome.plan.halo, outcome.plan.stride):
        if not same(tile.padded):
            core = tile.core.toslices()
            expected[:, *core] = computed[:, *core]
            pixels += tile.core.height * tile.core.width
    return expected, pixels


def test_tiles_within_the_tolerance_are_those_of_the_earlier_result(tmp_path: Path) -> None:
    pixels = random_pixels((2, *SIZE)) + 10
    change = np.random.default_rng(1).integers(-2, 3, pixels.shape)
    change[:, 70:74, 80:84] = 30
    first = write_scene(tmp_path / "first.tif", pixels)
    later = write_scene(tmp_path / "later.tif", (pixels + change).astype(np.uint8))
    _, earlier = run(first, tmp_path / "first.zarr", options())
    _, exact = run(later, tmp_path / "exact.zarr", options())
    near = options(tmp_path / "first.zarr", tolerance=2.0)
    outcome, found = run(later, tmp_path / "near.zarr", near)
    expected, computed = either(
        outcome, earlier, exact, lambda window: bool((abs(change[:, *window.toslices()]) <= 2).all())
    )
    assert outcome.computed == computed and 0 < computed < SIZE[0] * SIZE[1] / 2
    assert np.array_equal(found, expected) and "within 2" in outcome.routed
    # All tiles have a pixel that changed by 2: below that tolerance nothing is like it was.
    outcome, found = run(later, tmp_path / "none.zarr", options(tmp_path / "first.zarr", tolerance=1.9))
    assert outcome.computed == SIZE[0] * SIZE[1] and np.array_equal(found, exact)


def test_a_result_says_that_it_reused_and_serves_no_later_one(tmp_path: Path) -> None:
    pixels = random_pixels((2, 96, 96))
    first = write_scene(tmp_path / "first.tif", pixels)
    later = write_scene(tmp_path / "later.tif", pixels + 1)
    run(first, tmp_path / "first.zarr", options())
    near, target = options(tmp_path / "first.zarr", tolerance=2.5), tmp_path / "near.zarr"
    outcome, _ = run(later, target, near)
    tags = open_raster(target).tags
    rule = f"tiles whose input differs by at most 2.5 are those of {tmp_path / 'first.zarr'}"
    assert outcome.computed == 0 and tags["BIGVISION_REUSED"] == rule
    assert tags["BIGVISION_EXACTNESS"] == f"approximate: {rule}"
    assert run(later, target, near)[0].status == "already done"
    for other in (options(), replace(near, tolerance=2.0)):
        with pytest.raises(ValueError, match="made by another command"):
            run(later, target, other)
    for tolerance in (0.0, 2.5):
        with pytest.raises(ValueError, match=r"near\.zarr: was not computed in full \(tiles whose input"):
            run(first, tmp_path / "third.zarr", options(target, tolerance=tolerance))
    # What is the same in every bit says nothing of the kind.
    run(first, tmp_path / "bits.zarr", options(tmp_path / "first.zarr"))
    tags = open_raster(tmp_path / "bits.zarr").tags
    assert tags["BIGVISION_EXACTNESS"] == "exact" and "BIGVISION_REUSED" not in tags


def test_data_that_comes_or_goes_is_a_change(tmp_path: Path) -> None:
    pixels = random_pixels((2, 96, 96)) + 1
    pixels[0, 40, 40] = 0
    first = write_scene(tmp_path / "first.tif", pixels, nodata=0)
    run(first, tmp_path / "first.zarr", options())
    pixels[0, 40, 40] = 1
    later = write_scene(tmp_path / "later.tif", pixels, nodata=0)
    _, exact = run(later, tmp_path / "exact.zarr", options())
    outcome, found = run(later, tmp_path / "near.zarr", options(tmp_path / "first.zarr", tolerance=2.0))
    assert 0 < outcome.computed < 96 * 96 and np.array_equal(found, exact)


def test_a_network_of_global_statistics_is_reused_whole_or_not_at_all(tmp_path: Path) -> None:
    pixels = random_pixels((2, 60, 50))
    first = write_scene(tmp_path / "first.tif", pixels)
    wishes = options(model=PHASED, tile=None)
    _, earlier = run(first, tmp_path / "first.zarr", wishes)
    near = replace(wishes, previous=tmp_path / "first.zarr", tolerance=1.0)
    later = write_scene(tmp_path / "later.tif", pixels + 1)
    outcome, found = run(later, tmp_path / "near.zarr", near)
    assert outcome.computed == 0 and np.array_equal(found, earlier)
    pixels[0, 0, 0] += 2
    other = write_scene(tmp_path / "other.tif", pixels)
    outcome, found = run(other, tmp_path / "other.zarr", near)
    assert outcome.computed == 60 * 50
    assert np.array_equal(found, run(other, tmp_path / "exact.zarr", wishes)[1])


def test_a_shift_by_whole_strides_reuses_all_but_the_edges(tmp_path: Path) -> None:
    pixels = random_pixels((2, *SIZE))
    first = write_scene(tmp_path / "first.tif", pixels)
    _, earlier = run(first, tmp_path / "first.zarr", options())
    # The later scene is a part: its upper and left edges, which the network sees, were none.
    transform = TRANSFORM @ Affine.translation(64, 32)
    later = write_scene(tmp_path / "later.tif", pixels[:, 32:, 64:], transform=transform)
    _, exact = run(later, tmp_path / "exact.zarr", options())
    with pytest.raises(ValueError, match=r"by -64 columns and -32 rows.*: --resample-previous brings it"):
        run(later, tmp_path / "near.zarr", options(tmp_path / "first.zarr"))
    near = options(tmp_path / "first.zarr", resample_previous=True)
    outcome, found = run(later, tmp_path / "near.zarr", near)
    assert 0 < outcome.computed < exact[0].size / 2 and "resampled" in outcome.routed
    assert np.allclose(found, exact, atol=1e-5)
    assert np.array_equal(found[:, 64:, 64:], earlier[:, 96:, 128:])
    tags = open_raster(tmp_path / "near.zarr").tags
    assert "by at most 0 are" in tags["BIGVISION_REUSED"] and "-64 columns" in tags["BIGVISION_EXACTNESS"]


@pytest.mark.parametrize("tolerance", [1.15, 1.25])
def test_a_shift_by_parts_of_a_pixel_compares_interpolated_values(tmp_path: Path, tolerance: float) -> None:
    ramp = np.broadcast_to(2 * np.arange(SIZE[1], dtype=np.float32), (2, *SIZE))
    first = write_scene(tmp_path / "first.tif", ramp)
    later = write_scene(tmp_path / "later.tif", ramp, transform=TRANSFORM @ Affine.translation(0.6, 0))
    _, earlier = run(first, tmp_path / "first.zarr", options())
    _, exact = run(later, tmp_path / "exact.zarr", options())
    near = options(tmp_path / "first.zarr", tolerance=tolerance, resample_previous=True)
    outcome, found = run(later, tmp_path / "near.zarr", near)
    if tolerance < 1.2:  # 0.6 pixels of a ramp of 2 a pixel
        assert outcome.computed == exact[0].size and np.array_equal(found, exact)
        return
    nearest = np.concatenate([earlier[:, :, 1:], earlier[:, :, -1:]], 2)
    expected, computed = either(
        outcome, nearest, exact, lambda w: w.col_off > 0 and w.col_off + w.width < SIZE[1]
    )
    assert outcome.computed == computed and np.array_equal(found, expected)


def test_an_earlier_run_in_another_crs_is_resampled_too(tmp_path: Path) -> None:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    smooth = np.stack([100 + 50 * np.sin(columns / 9), 100 + 50 * np.cos(rows / 7)]).astype(np.float32)
    first = write_scene(tmp_path / "first.tif", smooth)
    _, earlier = run(first, tmp_path / "first.zarr", options())
    degrees = Affine(1.2e-4, 0, 15.0025, 0, -9e-5, 41.5495)

    def warped(pixels: NDArray[Any], method: Resampling) -> NDArray[Any]:
        into = np.full((len(pixels), 160, 150), np.nan, np.float32)
        places = {"src_transform": TRANSFORM, "dst_transform": degrees}
        reproject(pixels, into, src_crs="EPSG:32633", dst_crs="EPSG:4326", resampling=method, **places)
        return into

    there = warped(smooth, Resampling.bilinear)
    assert np.isfinite(there).all()
    later = write_scene(tmp_path / "later.tif", there, crs="EPSG:4326", transform=degrees)
    _, exact = run(later, tmp_path / "exact.zarr", options())
    near = options(tmp_path / "first.zarr", tolerance=0.1, resample_previous=True)
    outcome, found = run(later, tmp_path / "near.zarr", near)
    expected, computed = either(
        outcome,
        warped(earlier, Resampling.nearest),
        exact,
        lambda w: (
            w.col_off > 0 and w.row_off > 0 and w.col_off + w.width < 150 and w.row_off + w.height < 160
        ),
    )
    assert outcome.computed == computed
    # By windows a place is some thousandths of a pixel off, so a nearest neighbour may be the next one.
    assert (found != expected).mean() < 0.01
    assert "EPSG:4326" in open_raster(tmp_path / "near.zarr").tags["BIGVISION_REUSED"]


def test_the_same_grid_needs_no_resampling_and_none_is_told(tmp_path: Path) -> None:
    pixels = random_pixels((2, 96, 96))
    run(write_scene(tmp_path / "first.tif", pixels), tmp_path / "first.zarr", options())
    wishes = options(tmp_path / "first.zarr", resample_previous=True)
    outcome, _ = run(write_scene(tmp_path / "same.tif", pixels), tmp_path / "same.zarr", wishes)
    assert outcome.computed == 0
    assert open_raster(tmp_path / "same.zarr").tags["BIGVISION_EXACTNESS"] == "exact"


def test_a_place_that_is_nowhere_can_not_be_resampled(tmp_path: Path) -> None:
    pixels = random_pixels((2, 40, 40))
    first = write_scene(tmp_path / "first.tif", pixels, crs=None)
    run(first, tmp_path / "first.zarr", options())
    later = write_scene(tmp_path / "later.tif", pixels)
    wishes = options(tmp_path / "first.zarr", resample_previous=True)
    with pytest.raises(ValueError, match=r"first\.zarr is in None.*later\.tif in EPSG:32633"):
        run(later, tmp_path / "near.zarr", wishes)
    assert not (tmp_path / "near.zarr").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tolerance": -1.0, "previous": Path("a")}, "--tolerance is a difference of at least 0, got -1.0"),
        ({"tolerance": float("nan"), "previous": Path("a")}, "takes finite numbers, got nan"),
        ({"tolerance": 2.0}, "--tolerance is about an earlier result: give --previous RUN, too"),
        ({"resample_previous": True}, "--resample-previous is about an earlier result"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Options(NET, **given)
