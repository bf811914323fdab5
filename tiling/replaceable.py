"""What a command may replace: only what the same kind of command wrote."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from tiling.behind import SIDECARS, behind, check_apart
from tiling.conventions import KEY
from tiling.errors import RasterError
from tiling.publish import check_free, check_room
from tiling.raster import Raster

# Files of a store: metadata of groups and arrays, shards, and shards whose writer was killed.
_PART_OF_STORE = re.compile(r"((mask/)?\d+/|mask/)?zarr\.json|(mask/)?\d+/c/[\d/]+|.+\.partial")


def check_result(
    path: Path,
    raster: Raster,
    foreign: Callable[[Path], str | None],
    overwrite: bool,
    advice: str = "give overwrite=True to replace it",
) -> None:
    """RasterError unless a copy of `raster` may be written to `path`.

    It must not take the place of anything that the raster is read from, whatever the flags, nor of anything
    that is `foreign`: no result of the same kind; and there must be room for it. foreign, advice: as
    `check_free` has them.
    """
    for address in raster.addresses:
        check_apart([path], behind(address).places)
    check_free(path, overwrite, foreign, advice)
    check_room(path, math.prod(raster.shape) * raster.dtype.itemsize)


def check_alone(path: Path) -> None:
    """RasterError where files lie beside a free `path` that GDAL would read as part of a TIFF there."""
    beside = [Path(f"{path}{ending}") for ending in SIDECARS if ending]
    found = next((file for file in beside if file.exists()), None)
    if found is not None and not path.exists():
        raise RasterError(
            f"{path}: {found} would be read as a part of it; move that away, or give another name"
        )


def drop_sidecars(path: Path) -> None:
    """Remove what told of the TIFF that stood at `path`: its successor has its own masks and overviews."""
    for ending in SIDECARS:
        if ending:
            Path(f"{path}{ending}").unlink(missing_ok=True)


def not_a_tiff(path: Path) -> str | None:
    """Why what stands at `path` is no TIFF; an empty file has nothing to lose and passes for one."""
    if not path.is_file():
        return "a folder" if path.is_dir() else "no ordinary file"
    with path.open("rb") as file:
        start = file.read(4)
    if start and start not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a file that is no TIFF"
    return None


def not_a_store(path: Path) -> str | None:
    """Why what stands at `path` is not a store of `create_zarr` and nothing else, None where it is.

    An empty folder has nothing to lose and passes for one.
    """
    if not path.is_dir():
        return "a file and no zarr store"
    entries = sorted(entry.name for entry in path.iterdir())
    if not entries:
        return None
    try:
        about = json.loads((path / "zarr.json").read_bytes())
        known = KEY in about["attributes"]
    except (OSError, ValueError, LookupError, TypeError):
        known = False
    if not known:
        return f"a folder that is no store of this kind (it holds {entries[0]})"
    for file in path.rglob("*"):
        inside = file.relative_to(path).as_posix()
        if not file.is_dir() and not _PART_OF_STORE.fullmatch(inside):
            return f"a store with a file that is no part of it ({inside})"
    return None
