"""A function applied to every tile of a raster, with dask: threads here, a cluster elsewhere, the same
call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from rasterio.windows import Window

from tiling.errors import RasterError, TileError
from tiling.grid import Tile, TileGrid
from tiling.source import Array

if TYPE_CHECKING:
    from distributed import Client

TileFunction = Callable[[Array, Tile], Array | None]
Tiles = TileGrid | list[Tile]
Progress = Callable[[int, int], object]


class Readable(Protocol):
    """What tiles are read from: a `Raster`, or anything else with this method."""

    def read(self, window: Window) -> Array:
        """Pixels [B, H, W]."""


class Writable(Protocol):
    """What tiles are written to, from any thread: a `ZarrWriter`, or anything else with this method."""

    def write(self, data: Array, window: Window) -> None:
        """Store pixels [B, H, W]."""


def map_tiles(
    fn: TileFunction,
    source: Readable,
    destination: Writable | None,
    grid: TileGrid | Iterable[Tile],
    *,
    client: Client | str | None = None,
    workers: int | None = None,
    in_flight: int | None = None,
    retries: int = 2,
    progress: Progress | None = None,
) -> int:
    """`destination[tile.core] = fn(source[tile.padded], tile)` for every tile; returns how many there were.

    fn: takes pixels [B, h, w] of the padded window and the tile; gives pixels [B', ...] of the padded window
        (which are cropped) or of the core, or None to write nothing. Where both have one size there is no
        crop. Where it has a method `stop`, that is called when a tile fails or the user interrupts: tiles
        under way are then waited for, and may end early.
    grid: a `TileGrid`, or some of its tiles (those that are left after an interruption).
    client: a `distributed.Client` or a scheduler's address runs tiles there; source, destination and fn
        must be picklable, the files visible to every worker. Otherwise dask's threads run them here.
    workers: threads here, by default as many as dask takes. in_flight: tiles handed to dask at once, by
        default 16 a thread or 4 a thread of the cluster, so that a scheduler never sees a graph of 100000
        tiles.
    retries: how often the cluster tries a tile again after an error; a dead worker's tiles move to others.
    progress: called with (tiles done, tiles in all) after each tile.

    Raises RasterError before any work if two tiles would share a shard of the destination, and TileError,
    which names the tile, when `fn`, reading or writing fails; the remaining tiles are then not begun.
    """
    tiles = grid if isinstance(grid, TileGrid) else list(grid)
    shard = getattr(destination, "shard", None)
    if shard is not None and destination is not None:
        _check_shards(tiles, shard, destination)
    job = _Job(fn, source, destination)
    if client is None:
        return _on_threads(job, tiles, workers, in_flight, progress)
    from distributed import Client

    if isinstance(client, Client):
        return _on_cluster(job, tiles, client, in_flight, retries, progress)
    with connect(client) as opened:
        return _on_cluster(job, tiles, opened, in_flight, retries, progress)


def connect(address: str, timeout: float = 10.0) -> Client:
    """A client of a scheduler; RasterError where none answers at the address within `timeout` seconds."""
    from distributed import Client
    from distributed.comm import get_address_host_port
    from distributed.security import Security

    try:
        if not address.startswith("inproc://"):
            # Before a client that could never connect lingers for 20 s.
            get_address_host_port(address)
            keys: Any = Security
            if address.startswith("tls://") and not keys().get_connection_args("client")["ssl_context"]:
                raise ValueError("dask's configuration names no keys for tls (distributed.comm.tls)")
        return Client(address, timeout=timeout, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        raise RasterError(f"{address}: no dask scheduler answers there: {error}") from error


class _Job:
    """One tile's work: read, compute, crop, write."""

    def __init__(self, fn: TileFunction, source: Readable, destination: Writable | None) -> None:
        self.fn, self.source, self.destination = fn, source, destination

    def stop(self) -> None:
        """Where the function can be stopped, stop it."""
        if hasattr(self.fn, "stop"):
            self.fn.stop()

    def __call__(self, tile: Tile) -> int:
        try:
            result = self.fn(self.source.read(tile.padded), tile)
            if result is not None and self.destination is not None:
                self.destination.write(_cropped(result, tile), tile.core)
        except Exception as error:
            raise TileError(f"{tile} failed: {type(error).__name__}: {error}") from error
        return tile.index


def _cropped(result: Array, tile: Tile) -> Array:
    if result.shape[-2:] == (tile.padded.height, tile.padded.width):
        return result[..., *tile.crop]
    if result.shape[-2:] == tile.shape:
        return result
    raise ValueError(
        f"the function gave {result.shape} for a padded window of {tile.padded.height} x {tile.padded.width} "
        f"around a core of {tile.shape[0]} x {tile.shape[1]}"
    )


def _check_shards(tiles: Iterable[Tile], shard: tuple[int, int], destination: Any) -> None:
    """Every core made of whole shards, or ending where the raster does: then no two tiles share a shard."""
    _, height, width = destination.shape
    spacing = tiles.tile if isinstance(tiles, TileGrid) else None
    if spacing is not None:
        # A regular grid is told by its tile size alone; a tile as large as the raster has no neighbour.
        uneven = [t % s and t < whole for t, s, whole in zip(spacing, shard, (height, width), strict=True)]
        if not any(uneven):
            return
    for tile in tiles:
        for part, step, whole in zip(tile.core.toslices(), shard, (height, width), strict=True):
            if part.start % step or (part.stop % step and part.stop != whole):
                raise RasterError(
                    f"{tile} cuts a shard of {shard[0]} x {shard[1]} pixels, which writers never share; "
                    f"use the destination's grid()"
                )


def _on_threads(
    job: _Job,
    tiles: Tiles,
    workers: int | None,
    in_flight: int | None,
    progress: Progress | None,
) -> int:
    """Batches through dask's threaded scheduler: the next begins when the last is done."""
    import dask
    from dask.system import CPU_COUNT

    count = workers or dask.config.get("num_workers", None) or CPU_COUNT
    counter = _Counter(len(tiles), progress)

    def run(tile: Tile) -> int:
        index = job(tile)
        counter.count()
        return index

    delayed: Any = dask.delayed(run, pure=False, traverse=False)
    compute: Any = dask.compute
    waiting = iter(tiles)
    pool = ThreadPoolExecutor(count, thread_name_prefix="tiles")
    try:
        while batch := list(islice(waiting, in_flight or 16 * count)):
            compute(*[delayed(tile) for tile in batch], scheduler="threads", pool=pool)
    except BaseException:
        job.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure nothing writes on behind the caller's back
    return counter.done


def _on_cluster(
    job: _Job,
    tiles: Tiles,
    client: Any,
    in_flight: int | None,
    retries: int,
    progress: Progress | None,
) -> int:
    """A bounded number of tiles with the scheduler: each that comes back makes room for the next."""
    from distributed import as_completed

    window = in_flight or 4 * max(1, sum(client.nthreads().values()))
    counter = _Counter(len(tiles), progress)
    # The job is a task of its own: sent once, kept by the workers, computed anew if one dies with it.
    shared = client.submit(_same, job, pure=False)
    waiting = iter(tiles)
    first = [_submit(client, shared, tile, retries) for tile in islice(waiting, window)]
    running: Any = as_completed(first, loop=client.loop)  # type: ignore[no-untyped-call]
    try:
        for future in running:
            future.result()
            counter.count()
            for tile in islice(waiting, 1):
                running.add(_submit(client, shared, tile, retries))
    except BaseException:
        with suppress(Exception):  # workers that don't answer have nothing to stop
            client.sync(client._run, _stop_there, shared.key, on_error="ignore", callback_timeout=5)
        client.cancel([*running.futures, shared])
        raise
    return counter.done


def _stop_there(key: str, dask_worker: Any) -> None:
    """In a worker: tiles under way are no more wanted."""
    job = dask_worker.data.get(key)
    if job is not None:
        job.stop()


def _submit(client: Any, shared: Any, tile: Tile, retries: int) -> Any:
    return client.submit(_call, shared, tile, pure=False, retries=retries)


def _same(job: _Job) -> _Job:
    return job


def _call(job: _Job, tile: Tile) -> int:
    return job(tile)


class _Counter:
    """Counts finished tiles from any thread."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done = total, progress, 0
        self.lock = threading.Lock()

    def count(self) -> None:
        with self.lock:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)
