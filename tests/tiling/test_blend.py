import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.windows import Window

from tiling import Blender, TileGrid, blend_rows, create_zarr, window_weights

kinds = st.sampled_from(["hann", "pyramid", "gaussian"])
grids = st.builds(
    TileGrid,
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 25),
    st.integers(0, 12),
    st.sampled_from([1, 4]),
)


@given(st.integers(1, 300), st.integers(1, 300), kinds)
def test_no_window_has_a_zero_edge(height: int, width: int, kind: str) -> None:
    weights = window_weights((height, width), kind)
    assert weights.shape == (height, width) and (weights > 0).all()
    assert np.allclose(weights, weights[::-1, ::-1]) and weights.max() == weights[height // 2, width // 2]


def test_windows_by_hand() -> None:
    eighth = np.sin(np.pi / 8) ** 2
    np.testing.assert_allclose(
        window_weights((1, 4), "hann")[0], [eighth, 1 - eighth, 1 - eighth, eighth], rtol=1e-6
    )
    np.testing.assert_allclose(window_weights((1, 4), "pyramid")[0], [0.25, 0.75, 0.75, 0.25])
    edge, middle = np.exp(-(1.5**2) / 2), np.exp(-(0.5**2) / 2)
    np.testing.assert_allclose(window_weights((1, 4), "gaussian")[0], [edge, middle, middle, edge], rtol=1e-6)


@settings(deadline=None)
@given(grids, kinds, st.floats(-1e3, 1e3, width=32))
def test_a_constant_stays_constant(grid: TileGrid, kind: str, value: float) -> None:
    tiles = ((tile, np.full((2, tile.padded.height, tile.padded.width), value, "float32")) for tile in grid)
    rows = 0
    for window, data in blend_rows(tiles, grid, kind=kind):
        assert (window.row_off, window.col_off, window.width) == (rows, 0, grid.width)
        np.testing.assert_allclose(data, value, rtol=1e-5, atol=1e-6)
        assert data.shape == (2, window.height, grid.width)
        rows += window.height
    assert rows == grid.height


@settings(deadline=None)
@given(grids, kinds, st.integers(0, 99))
def test_rows_are_the_weighted_mean_of_everything_over_them(grid: TileGrid, kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    results = [(tile, random.random((1, tile.padded.height, tile.padded.width), "float32")) for tile in grid]
    total, weight = np.zeros((1, grid.height, grid.width)), np.zeros((grid.height, grid.width))
    for tile, data in results:
        weights = window_weights(data.shape[1:], kind)
        total[:, *tile.padded.toslices()] += data * weights
        weight[tile.padded.toslices()] += weights
    assert (weight > 0).all()
    out = np.concatenate([data for _, data in blend_rows(iter(results), grid, kind=kind)], axis=1)
    np.testing.assert_allclose(out, total / weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["hann", "pyramid", "gaussian"])
def test_the_blender_on_disk_agrees_with_the_rows_in_any_order_and_from_threads(tmp_path, kind: str) -> None:
    grid = TileGrid(100, 130, 32, halo=9)
    random = np.random.default_rng(3)
    results = [(tile, random.random((2, tile.padded.height, tile.padded.width), "float32")) for tile in grid]
    expected = np.concatenate([data for _, data in blend_rows(iter(results), grid, kind=kind)], axis=1)
    with (
        Blender(2, 100, 130, tmp_path / "sums", kind=kind, chunk=40) as blender,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda result: blender.add(*result), results[::-1]))
        np.testing.assert_allclose(blender.read(Window(0, 0, 130, 100)), expected, rtol=1e-5)
        writer = create_zarr(tmp_path / "out.zarr", (1, 100, 130), "uint8", chunk=32, shard=32)
        blender.finish(writer, convert=lambda mean: mean.argmax(axis=0)[None].astype("uint8"))
    assert not (tmp_path / "sums").exists()
    assert np.array_equal(writer.publish().read()[0], expected.argmax(axis=0))


def test_seams_fade(tmp_path) -> None:
    """Two tiles that disagree meet in a slope without a jump; cut side by side they would jump by 1."""
    grid = TileGrid(8, 64, (8, 32), halo=(0, 16))
    tiles = ((tile, np.full((1, 8, tile.padded.width), float(tile.index))) for tile in grid)
    ((_, data),) = blend_rows(tiles, grid)
    assert np.abs(np.diff(data[0, 0])).max() < 0.15


def test_pixels_that_nothing_covers_are_nan(tmp_path) -> None:
    with Blender(1, 20, 20, tmp_path / "sums") as blender:
        tile = TileGrid(20, 20, 10)[0]
        blender.add(tile, np.ones((1, 10, 10)))
        assert np.isnan(blender.read(Window(0, 0, 20, 20))).sum() == 300


def test_misuse_is_named(tmp_path) -> None:
    grid = TileGrid(20, 20, 10)
    with pytest.raises(ValueError, match="window 'box' is none of hann, pyramid, gaussian"):
        window_weights((4, 4), "box")
    with pytest.raises(ValueError, match="got 0 x 4"):
        window_weights((0, 4))
    with pytest.raises(ValueError, match=r"tile 1 .* came where tile 0"):
        list(blend_rows([(grid[1], np.ones((1, 10, 10)))], grid))
    with pytest.raises(ValueError, match=r"10 x 10 pixels, got \(1, 9, 10\)"):
        list(blend_rows([(grid[0], np.ones((1, 9, 10)))], grid))
    with pytest.raises(ValueError, match="shorter"):
        list(blend_rows([(grid[0], np.ones((1, 10, 10)))], grid))
    with pytest.raises(ValueError, match="exists already"):
        Blender(1, 5, 5, tmp_path)


def test_rows_hold_no_more_than_later_tiles_need() -> None:
    import tracemalloc

    grid = TileGrid(20_000, 64, (100, 64), halo=20)
    tiles = ((tile, np.ones((1, tile.padded.height, 64), "float32")) for tile in grid)
    gc.collect()
    tracemalloc.start()
    for _ in blend_rows(tiles, grid):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000 * 64 * 4 / 8  # the whole raster's sums alone would be 5 MB


def test_sums_with_a_gap_are_not_finished(tmp_path) -> None:
    """Without this a gap would come out of an argmax as class 0."""
    with Blender(1, 20, 20, tmp_path / "sums") as blender:
        tile = TileGrid(20, 20, 10)[0]
        blender.add(tile, np.ones((1, 10, 10)))
        writer = create_zarr(tmp_path / "out.zarr", (1, 20, 20), "float32")
        with pytest.raises(ValueError, match="300 pixels that no added tile covers"):
            blender.finish(writer)
