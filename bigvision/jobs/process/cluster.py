"""Where units run: in this process, in workers that this job starts, or behind a scheduler's address."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

from bigvision.jobs.process.options import Options
from tiling.mapping import connect

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

_AT_ONCE = 2  # units under way in one worker: one computes while the other reads or writes


@contextmanager
def open_client(options: Options) -> "Iterator[Client | None]":
    """A client of `--scheduler` or of `--workers` processes started here; None for neither.

    A worker that dies is started again and its unit goes to another. Raises ValueError where the scheduler
    doesn't answer.
    """
    if options.scheduler is not None:
        with connect(options.scheduler) as client:
            yield client
    elif options.workers is not None:
        from distributed import Client

        with _local_cluster(options.workers) as cluster, Client(cluster, set_as_default=False) as client:
            yield client
    else:
        yield None


def _local_cluster(workers: int) -> "LocalCluster":
    """Processes that nobody but this job can talk to: what a worker is told to run, it runs.

    Every connection needs a key that this call makes up and keeps in memory (TLS both ways), and no page on
    the cluster's state is served.
    """
    import dask
    from distributed import LocalCluster

    unserved: dict[str, list[str]] = {
        f"distributed.{who}.http.routes": [] for who in ("scheduler", "worker", "nanny")
    }
    with dask.config.set(unserved), _interrupts_kept():
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=_AT_ONCE,
            processes=True,
            security=True,
            dashboard_address=None,
            # Its server begins to listen all the same, on port 8787 where nothing else is said.
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0", "dashboard": False},
            memory_limit=None,
            silence_logs=50,
        )
    assert cluster.scheduler is not None
    cluster.scheduler.http_server.stop()
    return cluster


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Ctrl-C, which a terminal sends to all processes, reaches this one alone, after the block.

    The thread that starts worker processes, and starts them again, begins in the block: it keeps the signal
    blocked, and they have that from it.
    """
    resource_tracker.ensure_running()  # starting it later would end the blocking in that thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def threads_each(options: Options) -> int | None:
    """Threads for the kernels of one local worker: the cores shared evenly. None leaves it to the process."""
    return None if options.workers is None else max(1, len(os.sched_getaffinity(0)) // options.workers)
