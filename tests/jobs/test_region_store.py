"""Regions that are written together, against an array that they are written into one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.windows import Window

from bigvision.jobs.process.region_store import RegionStore, file_side
from tiling import ZarrWriter, create_zarr

BANDS, HEIGHT, WIDTH = 2, 21, 34


def empty(folder: Path) -> ZarrWriter:
    shape = (BANDS, HEIGHT, WIDTH)
    return create_zarr(folder / "store.zarr", shape, "int16", nodata=-1, chunk=8, shard=8)


def whole(writer: ZarrWriter) -> NDArray[Any]:
    return writer.read(Window(0, 0, WIDTH, HEIGHT))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    top, left = draw(st.integers(0, HEIGHT - 1)), draw(st.integers(0, WIDTH - 1))
    return Window(left, top, draw(st.integers(1, WIDTH - left)), draw(st.integers(1, HEIGHT - top)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(windows(), max_size=4), max_size=3))
def test_windows_of_any_place_are_stored_over_what_was_there(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Window]]
) -> None:
    writer = empty(tmp_path_factory.mktemp("regions"))
    store, expected = RegionStore(writer), np.full((BANDS, HEIGHT, WIDTH), -1, np.int16)
    for number, batch in enumerate(batches):
        before = expected.copy()
        for place, window in enumerate(batch):
            values = np.full((BANDS, window.height, window.width), 10 * number + place, np.int16)
            store.put(values, window)
            expected[:, *window.toslices()] = values
        assert np.array_equal(whole(writer), before)  # they wait
        store.flush()
        assert np.array_equal(whole(writer), expected)


def test_a_file_is_written_once_for_all_its_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []
    write = ZarrWriter.write

    def counted(self: ZarrWriter, data: NDArray[Any], window: Window) -> None:
        written.append((window.row_off, window.col_off))
        write(self, data, window)

    monkeypatch.setattr(ZarrWriter, "write", counted)
    store = RegionStore(empty(tmp_path))
    for row in range(0, 16, 4):
        for col in range(8, 32, 4):
            store.put(np.zeros((BANDS, 4, 4), np.int16), Window(col, row, 4, 4))
    store.flush()
    store.flush()
    assert written == [(row, col) for row in (0, 8) for col in (8, 16, 24)]


@pytest.mark.parametrize(("region", "side"), [(16, 512), (96, 480), (512, 512), (700, 700)])
def test_a_file_is_made_of_whole_regions(region: int, side: int) -> None:
    assert file_side(region) == side
