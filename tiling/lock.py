"""A folder of unfinished work belongs to one process at a time."""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold the lock file `path`, which is made and removed again.

    A file system without locks is worked on with a warning: two processes are not kept apart there. The
    system lets go of the lock of a process that dies.

    Raises:
        ValueError: `taken`, while another process holds it.
    """
    file = _held(path, taken)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _held(path: Path, taken: str) -> IO[bytes]:
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(taken) from None
        except OSError as error:
            warnings.warn(
                f"{path.parent}: the file system has no locks ({error.strerror}); "
                "take care that no second command works on this",
                stacklevel=4,
            )
            return file
        if _is(path, file):
            return file
        file.close()  # its last holder has removed it since it was opened


def _is(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
