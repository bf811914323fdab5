"""Files and folders that appear under their final name only when they are complete."""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from tiling.errors import RasterError

# Work without a lock (of an earlier version, or begun this moment) that nobody touched for so long is dead.
_ABANDONED_S = 3600.0
# Open lock files of this process, by the folder of unfinished work that they guard.
_HELD: dict[Path, int] = {}
_EXCHANGE = 2
# No raster of the world compresses better than this.
_COMPRESSED = 200


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


def followed(path: Path) -> Path:
    """What is written where `path` is a link: the place that it points to, so that the link stays."""
    return path.resolve() if path.is_symlink() else path


def check_free(
    path: Path,
    overwrite: bool,
    foreign: Callable[[Path], str | None] | None = None,
    advice: str = "give overwrite=True to replace it",
) -> None:
    """RasterError unless `path` may be written: its folder is there and nothing stands in the way.

    foreign: says of what stands there why it isn't the kind of thing that is written now, None where it is;
        without it only files may be replaced. advice: how to replace it, for what may be.
    """
    if not path.parent.is_dir():
        raise RasterError(f"{path}: the folder {path.parent} doesn't exist")
    if not os.access(path.parent, os.W_OK):
        raise RasterError(f"{path}: the folder {path.parent} can't be written to")
    reason = (foreign or _not_a_file)(path) if path.exists() else None
    if reason is not None:
        raise RasterError(f"{path}: exists already as {reason}, which is never replaced")
    if os.path.lexists(path) and not overwrite:
        raise RasterError(f"{path}: exists already; {advice}")


def check_room(path: Path, pixels: int) -> None:
    """RasterError where `pixels`, a raster's bytes, would not fit beside `path` however well compressed."""
    free = shutil.disk_usage(path.parent).free
    if pixels > _COMPRESSED * free:
        raise RasterError(
            f"{path}: {pixels / 2**30:,.0f} GiB of pixels don't fit into the {free / 2**30:,.1f} GiB that "
            f"are free there, not even compressed {_COMPRESSED} to 1"
        )


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A place to write a file or folder to, of the same name as `path`.

    When the block ends well it is flushed and moved to `path`, replacing what is there; else nothing is left.
    """
    path = followed(path)
    work = begin(path)
    try:
        yield work / path.name
        publish(work / path.name, path)
    finally:
        discard(work)


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
    if path.is_dir() and not path.is_symlink():
        _swap(staging, path)
    else:
        staging.replace(path)
    flush(path.parent)


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


def begin(path: Path) -> Path:
    """A new hidden folder beside `path` for unfinished work; `discard` removes it.

    What a killed command left there for the same `path` is removed first; the work of a living one stays.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.partial"):
        if _is_dead(left):
            discard(left)
    for old in path.parent.glob(f".{glob.escape(path.name)}.????????.replaced"):
        # Its successor didn't come: killed between two steps of a file system that has no exchange.
        discard(old) if path.exists() else old.replace(path)
    place = staging_name(path)
    place.mkdir()
    try:
        _hold(place)
    except BaseException:
        discard(place)
        raise
    return place


def discard(staging: Path) -> None:
    """Remove what was begun: a file, or a folder with everything in it."""
    descriptor = _HELD.pop(staging, None)
    if staging.is_dir():
        shutil.rmtree(staging, ignore_errors=True)
    else:
        staging.unlink(missing_ok=True)
    if descriptor is not None:
        os.close(descriptor)


def flush(path: Path) -> None:
    """What was written to a file, or which files a folder has, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hold(place: Path) -> None:
    """Lock `place` until `discard`: the lock file has its name only once it is locked."""
    hold = place / f"{uuid.uuid4().hex}.lock"
    descriptor = _HELD[place] = os.open(hold, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(OSError):  # where the file system knows no locks, host and process tell who lives
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, f"{socket.gethostname()} {os.getpid()}".encode())
    hold.replace(place / "lock")


def _is_dead(place: Path) -> bool:
    """Whether the process that began `place` is no more."""
    if place in _HELD:
        return False
    try:
        descriptor = os.open(place / "lock", os.O_RDWR)
    except OSError:
        with suppress(OSError):
            return time.time() - place.stat().st_mtime > _ABANDONED_S
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        return _owner_is_gone(os.read(descriptor, 1024).decode(errors="replace"))
    finally:
        os.close(descriptor)
    return True


def _owner_is_gone(owner: str) -> bool:
    host, _, process = owner.rpartition(" ")
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _not_a_file(path: Path) -> str | None:
    return None if path.is_file() else "a folder" if path.is_dir() else "no ordinary file"


def _swap(staging: Path, path: Path) -> None:
    """A folder takes the place of a full one: in one step where the file system can, else in two."""
    if _rename(staging, path, _EXCHANGE):
        discard(staging)
        return
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.replaced")
    path.replace(old)
    staging.replace(path)
    discard(old)


def _rename(one: Path, other: Path, flag: int) -> bool:
    """renameat2(2); False where system or file system don't know it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(one), here, os.fsencode(other), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
