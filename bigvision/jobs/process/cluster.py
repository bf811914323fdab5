"""Where units run: in this process, in workers that this job starts, or behind a scheduler's address."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bigvision.jobs.process.options import Options
from tiling.mapping import connect

if TYPE_CHECKING:
    from distributed import Client

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
        from distributed import Client, LocalCluster

        with (
            LocalCluster(
                n_workers=options.workers,
                threads_per_worker=_AT_ONCE,
                processes=True,
                dashboard_address=None,
                memory_limit=None,
                silence_logs=50,
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            yield client
    else:
        yield None


def threads_each(options: Options) -> int | None:
    """Threads for the kernels of one local worker: the cores shared evenly. None leaves it to the process."""
    return None if options.workers is None else max(1, len(os.sched_getaffinity(0)) // options.workers)
