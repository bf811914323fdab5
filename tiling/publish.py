"""Files and folders that appear under their final name only when they are complete."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from tiling.errors import RasterError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system or GDAL says of a failed write into one RasterError that names `path`."""
    try:
        yield
    except RasterError:
        raise
    except (RasterioError, CPLE_BaseError, OSError) as error:
        raise RasterError(f"{path}: can't be written: {' '.join(str(error).split())}") from error


def staging_name(path: Path) -> Path:
    """A hidden sibling of `path`, unlike any other, to write to until the work is complete."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def check_free(path: Path, overwrite: bool) -> None:
    """RasterError unless `path` may be written: its folder is there and nothing stands in the way."""
    if not path.parent.is_dir():
        raise RasterError(f"{path}: the folder {path.parent} doesn't exist")
    if not os.access(path.parent, os.W_OK):
        raise RasterError(f"{path}: the folder {path.parent} can't be written to")
    if os.path.lexists(path) and not overwrite:
        raise RasterError(f"{path}: exists already; give overwrite=True to replace it")


def publish(staging: Path, path: Path, *, replace: bool = True) -> None:
    """Flush `staging` to the disk and move it to `path`, replacing what is there.

    replace: False leaves what appeared there since it was looked for, with a RasterError; `staging` stays.
    """
    for part in [staging, *staging.rglob("*")]:
        flush(part)
    if not replace:
        _move_beside(staging, path)
        flush(path.parent)
        return
    old = None
    if path.is_dir() and not path.is_symlink():
        # A folder can't replace a full folder in one step: the old one makes room first.
        old = staging_name(path)
        path.replace(old)
    staging.replace(path)
    flush(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _move_beside(staging: Path, path: Path) -> None:
    """Give `staging` a name that nothing has."""
    taken = RasterError(f"{path}: appeared while it was being made, and stays; move it away and try again")
    if not staging.is_dir():
        try:
            os.link(staging, path, follow_symlinks=False)
        except FileExistsError:
            raise taken from None
        except OSError:
            pass  # a file system without hard links
        else:
            staging.unlink()
            return
    if os.path.lexists(path):
        raise taken
    staging.rename(path)


def discard(staging: Path) -> None:
    """Remove what was begun."""
    if staging.is_dir():
        shutil.rmtree(staging, ignore_errors=True)
    else:
        staging.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """What was written to a file, or which files a folder has, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
