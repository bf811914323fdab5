import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from rasterio.windows import Window

from tiling import RasterError, Tile, TileError, TileGrid, create_zarr, map_tiles, open_raster


def box_blur(data: np.ndarray, tile: Tile) -> np.ndarray:
    """Mean over 5 x 5 pixels, those beyond the array being 0: needs a halo of 2."""
    padded = np.pad(data.astype("float32"), ((0, 0), (2, 2), (2, 2)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    return views.mean(axis=(3, 4)).astype("float32")


def number(data: np.ndarray, tile: Tile) -> np.ndarray:
    return np.full((1, *tile.shape), tile.index, "float32")


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(params=["threads", "client", "address"])
def where(request) -> dict:
    """The same call on threads, on a client, and at an address."""
    if request.param == "threads":
        return {"workers": 2}
    client = request.getfixturevalue("cluster")
    return {"client": client if request.param == "client" else client.scheduler.address}


def test_tiles_give_what_the_whole_gives(write_tif, noise, tmp_path, where: dict) -> None:
    data = noise(2, 200, 150)
    raster = open_raster(write_tif(data))
    writer = create_zarr(tmp_path / "out.zarr", raster.shape, "float32", chunk=32, shard=64)
    seen: list[tuple[int, int]] = []
    grid = writer.grid(halo=2, align=8)
    done = map_tiles(box_blur, raster, writer, grid, progress=lambda *x: seen.append(x), **where)
    assert done == len(grid) == 12 and seen == [(i + 1, 12) for i in range(12)]
    np.testing.assert_allclose(writer.publish().read(), box_blur(data, grid[0]), rtol=1e-6)


def test_a_failing_tile_is_named(write_tif, noise, tmp_path, where: dict) -> None:
    def fail(data: np.ndarray, tile: Tile) -> np.ndarray:
        if tile.index == 3:
            raise KeyError("no such weight")
        return data

    raster = open_raster(write_tif(noise(1, 64, 64)))
    grid = TileGrid(64, 64, 32)
    with pytest.raises(
        TileError, match=r"tile 3 \(rows 32-64, columns 32-64\) failed: KeyError: 'no such weight'"
    ):
        map_tiles(fail, raster, None, grid, retries=0, **where)


def test_results_of_the_core_alone_and_of_nothing(write_tif, noise, tmp_path) -> None:
    raster = open_raster(write_tif(noise(1, 70, 70)))
    writer = create_zarr(tmp_path / "out.zarr", (1, 70, 70), "float32", nodata=-1, chunk=32, shard=32)
    grid = writer.grid(halo=5)
    map_tiles(number, raster, writer, [tile for tile in grid if tile.index != 4])
    out = writer.publish().read()[0]
    for tile in grid:
        assert (out[tile.core.toslices()] == (-1 if tile.index == 4 else tile.index)).all()
    assert map_tiles(lambda data, tile: None, raster, writer, grid) == len(grid)


def test_results_of_another_size_are_refused(write_tif, noise, tmp_path) -> None:
    raster = open_raster(write_tif(noise(1, 64, 64)))
    writer = create_zarr(tmp_path / "out.zarr", (1, 64, 64), "uint8", chunk=32, shard=32)
    with pytest.raises(
        TileError, match=r"gave \(1, 16, 16\) for a padded window of 36 x 36 around a core of 32 x 32"
    ):
        map_tiles(lambda data, tile: data[:, :16, :16], raster, writer, writer.grid(halo=4))


@pytest.mark.parametrize("as_list", [True, False])
def test_tiles_that_share_a_shard_are_refused_before_any_work(
    write_tif, noise, tmp_path, as_list: bool
) -> None:
    raster = open_raster(write_tif(noise(1, 100, 100)))
    writer = create_zarr(tmp_path / "out.zarr", (1, 100, 100), "uint8", chunk=32, shard=32)
    grid = TileGrid(100, 100, (48, 100))
    called = []
    with pytest.raises(RasterError, match="cuts a shard of 32 x 32"):
        map_tiles(lambda *x: called.append(x), raster, writer, list(grid) if as_list else grid)
    assert not called
    map_tiles(lambda data, tile: data, raster, writer, TileGrid(100, 100, 100))


def test_only_so_many_tiles_are_under_way(cluster) -> None:
    class Nothing:
        def read(self, window: Window) -> np.ndarray:
            return np.zeros((1, 1, 1))

    most = 0

    def watch(done: int, total: int) -> None:
        nonlocal most
        most = max(most, sum(future.status == "pending" for future in cluster.futures.values()))

    assert (
        map_tiles(number, Nothing(), None, TileGrid(100, 100, 5), client=cluster, in_flight=6, progress=watch)
        == 400
    )
    assert 1 < most <= 7  # six tiles and the job they share


def test_a_hundred_thousand_tiles_are_no_giant_graph(monkeypatch) -> None:
    import dask

    sizes: list[int] = []
    compute = dask.compute

    def counted(*tasks, **options):
        sizes.append(len(tasks))
        return compute(*tasks, **options)

    monkeypatch.setattr(dask, "compute", counted)

    class Nothing:
        def read(self, window: Window) -> np.ndarray:
            return np.zeros((1, 1, 1))

    assert map_tiles(lambda *x: None, Nothing(), None, TileGrid(50, 60, 1), workers=2) == 3000
    assert max(sizes) <= 32


def test_threads_work_at_the_same_time(write_tif, noise) -> None:
    raster = open_raster(write_tif(noise(1, 64, 64)))
    together = threading.Barrier(2, timeout=20)  # breaks if one thread alone runs all tiles
    map_tiles(lambda data, tile: together.wait() and None, raster, None, TileGrid(64, 64, 32), workers=2)


def die_once(data: np.ndarray, tile: Tile) -> np.ndarray:
    """Kills its own worker the first time that tile 5 comes."""
    if tile.index == 5:
        try:
            os.close(os.open(os.environ["DIED"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return data


def test_a_dying_worker_costs_a_retry_not_the_job(write_tif, noise, tmp_path, monkeypatch) -> None:
    from distributed import Client, LocalCluster

    data = noise(1, 128, 128)
    raster = open_raster(write_tif(data))
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    writer = create_zarr(tmp_path / "out.zarr", raster.shape, "uint8", chunk=32, shard=32)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        assert map_tiles(die_once, raster, writer, writer.grid(), client=client) == 16
    assert (tmp_path / "died").exists() and np.array_equal(writer.publish().read(), data)


def test_a_scheduler_that_does_not_answer_is_named() -> None:
    from tiling import connect

    begin = time.monotonic()
    with pytest.raises(RasterError, match=r"tcp://127\.0\.0\.1:9: no dask scheduler answers there"):
        connect("tcp://127.0.0.1:9", timeout=0.5)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("address", ["nonsense", "ftp://x:1", "tcp://localhost", "tls://127.0.0.1:9"])
def test_an_address_that_is_none_is_named_before_a_client_is_made(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    from tiling import connect

    monkeypatch.setattr("distributed.Client", None)
    with pytest.raises(RasterError, match=f"{address}: no dask scheduler answers there: "):
        connect(address)


def test_after_a_failure_nothing_runs_on() -> None:
    running: list[int] = []
    started = threading.Event()

    class Flat:
        def read(self, window: Window) -> np.ndarray:
            return np.zeros((1, window.height, window.width))

    def fails_first(pixels: np.ndarray, tile: Tile) -> None:
        if tile.core.row_off == tile.core.col_off == 0:
            started.wait(10)
            raise ArithmeticError("the first tile")
        running.append(1)
        started.set()
        time.sleep(0.5)
        running.pop()

    with pytest.raises(Exception, match="first tile"):
        map_tiles(fails_first, Flat(), None, TileGrid(8, 8, 4), workers=2)
    assert not running
