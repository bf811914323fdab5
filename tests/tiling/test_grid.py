import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasterio.windows import Window

from tiling import TileGrid, shard_aligned

sizes = st.integers(1, 90)
pairs = st.tuples(st.integers(1, 40), st.integers(1, 40))
margins = st.tuples(*[st.integers(0, 25)] * 4)
grids = st.builds(
    TileGrid, sizes, sizes, pairs, margins, st.tuples(st.sampled_from([1, 2, 8, 32]), st.integers(1, 9))
)


@given(grids)
def test_every_pixel_lies_in_exactly_one_core(grid: TileGrid) -> None:
    times = np.zeros((grid.height, grid.width), int)
    for tile in grid:
        times[tile.core.toslices()] += 1
    assert (times == 1).all()


@given(grids)
def test_padded_windows_lie_inside_start_aligned_and_hold_the_halo(grid: TileGrid) -> None:
    top, bottom, left, right = grid.halo
    for tile in grid:
        for core, padded, before, after, align, size in zip(
            tile.core.toslices(),
            tile.padded.toslices(),
            (top, left),
            (bottom, right),
            grid.align,
            (grid.height, grid.width),
            strict=True,
        ):
            assert 0 <= padded.start < padded.stop <= size
            assert padded.start % align == 0
            assert padded.stop % align == 0 or padded.stop == size
            assert padded.start <= max(0, core.start - before)
            assert padded.stop >= min(size, core.stop + after)
            # No more than the alignment asks for.
            assert padded.start > core.start - before - align
            assert padded.stop < core.stop + after + align


@given(grids)
def test_the_crop_of_what_is_read_is_what_is_written(grid: TileGrid) -> None:
    image = np.arange(grid.height * grid.width).reshape(1, grid.height, grid.width)
    for tile in grid:
        read = image[:, *tile.padded.toslices()]
        assert np.array_equal(read[..., *tile.crop], image[:, *tile.core.toslices()])


@given(grids)
def test_tiles_are_found_by_index_by_place_and_by_what_they_overlap(grid: TileGrid) -> None:
    tiles = list(grid)
    assert len(tiles) == len(grid) == grid.shape[0] * grid.shape[1]
    assert [tile.index for tile in tiles] == list(range(len(grid)))
    assert grid[-1] == tiles[-1] and grid[1:3] == tiles[1:3]
    assert [grid.at(row, column) for row in range(grid.shape[0]) for column in range(grid.shape[1])] == tiles
    asked = Window(grid.width // 3, grid.height // 3, 7, 11)
    image = np.zeros((grid.height, grid.width), bool)
    image[asked.toslices()] = True
    assert grid.overlapping(asked) == [tile for tile in tiles if image[tile.core.toslices()].any()]


@given(grids)
def test_overhead_is_pixels_read_over_pixels_written(grid: TileGrid) -> None:
    read = sum(tile.padded.width * tile.padded.height for tile in grid)
    assert grid.overhead == pytest.approx(read / (grid.height * grid.width))


def test_a_tile_need_not_be_a_multiple_of_the_alignment() -> None:
    grid = TileGrid(100, 100, 30, halo=5, align=16)
    second = grid.at(1, 1)
    assert (second.core.row_off, second.padded.row_off) == (30, 16)  # 30 - 5 = 25, down to 16
    assert second.padded.row_off + second.padded.height == 80  # 60 + 5 = 65, up to 80


def test_full_width_bands_of_rows_have_no_halo_at_the_sides() -> None:
    grid = TileGrid(1000, 333, (256, 333), halo=20, align=32)
    assert grid.shape == (4, 1)
    assert all((tile.padded.col_off, tile.padded.width) == (0, 333) for tile in grid)


def test_a_raster_smaller_than_a_tile_is_one_tile_and_an_empty_one_is_none() -> None:
    assert [tile.core for tile in TileGrid(1, 1, 512, halo=64, align=32)] == [Window(0, 0, 1, 1)]
    assert list(TileGrid(0, 5, 4)) == [] and list(TileGrid(5, 0, 4, 1, 2)) == []


@pytest.mark.parametrize(
    "arguments", [(-1, 5, 4), (5, 5, 0), (5, 5, (4, 0)), (5, 5, 4, -1), (5, 5, 4, 0, 0), (5, 5, 4, (0, -2))]
)
def test_impossible_grids_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"0|-1|-2"):
        TileGrid(*arguments)


def test_tiles_beyond_the_grid_are_an_index_error() -> None:
    grid = TileGrid(10, 10, 5)
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            grid[wrong]
    with pytest.raises(IndexError):
        grid.at(0, 2)


@given(sizes, sizes, pairs, pairs, margins)
def test_shard_aligned_tiles_never_share_a_shard(
    height: int, width: int, shard: tuple[int, int], tile: tuple[int, int], halo: tuple[int, int, int, int]
) -> None:
    owner: dict[tuple[int, int], int] = {}
    for piece in shard_aligned(height, width, shard, tile, halo):
        rows, columns = piece.core.toslices()
        touched = {
            (row // shard[0], column // shard[1])
            for row in range(rows.start, rows.stop)
            for column in range(columns.start, columns.stop)
        }
        for key in touched:
            assert owner.setdefault(key, piece.index) == piece.index
