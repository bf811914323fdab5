"""Which files a raster is read from, all the way down: sources of virtual rasters, archives, sidecars."""

import os
import re
import stat
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

from tiling.addresses import without_secrets
from tiling.errors import RasterError
from tiling.virtual import read_start
from tiling.zarr_source import is_zarr

# Formats whose driver names every file that it reads; of others (services, indexes) it can't be known.
_NAMED = {
    *(
        "GTiff",
        "COG",
        "VRT",
        "DERIVED",
        "netCDF",
        "HDF5",
        "HDF5Image",
        "HDF4",
        "HDF4Image",
        "BAG",
        "S102",
        "S104",
    ),
    *(
        "JP2OpenJPEG",
        "JP2ECW",
        "JP2KAK",
        "JP2MrSID",
        "JPEG",
        "PNG",
        "BMP",
        "GIF",
        "BIGGIF",
        "WEBP",
        "PNM",
        "TGA",
    ),
    *("HFA", "ENVI", "EHdr", "ERS", "PCIDSK", "RST", "SAGA", "ILWIS", "RMF", "MFF", "MFF2", "AAIGrid", "AIG"),
    *(
        "GRIB",
        "NITF",
        "DTED",
        "SRTMHGT",
        "USGSDEM",
        "XYZ",
        "GSAG",
        "GSBG",
        "GS7BG",
        "SIGDEM",
        "BT",
        "ROI_PAC",
    ),
    *(
        "GPKG",
        "MBTiles",
        "PDS",
        "PDS4",
        "ISIS2",
        "ISIS3",
        "VICAR",
        "SAFE",
        "SENTINEL2",
        "DIMAP",
        "TSX",
        "RS2",
    ),
    *("JAXAPALSAR", "SAR_CEOS", "CEOS", "COSAR", "RIK", "BSB", "KRO", "LCP", "FIT", "ISCE", "RRASTER", "GXF"),
}
SIDECARS = ("", ".aux.xml", ".ovr", ".msk")  # endings of what GDAL opens by itself beside a file
_DEEPEST = 20  # virtual rasters of virtual rasters
_XML_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Behind:
    """What a raster is read from.

    files: by the system's or GDAL's names, the raster's own first; a folder stands for all that is in it.
    texts: descriptions that are no file (a VRT given as text). unknown: why there may be more files.
    """

    files: tuple[str, ...]
    texts: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @cached_property
    def places(self) -> tuple[Path, ...]:
        """Files and folders of this machine; of what lies in an archive, the archive."""
        return tuple(dict.fromkeys(place for file in self.files if (place := local_place(file)) is not None))


def behind(address: str | os.PathLike[str]) -> Behind:
    """Everything that `address` (a path, URL, part of a file or virtual raster) is read from.

    Raises:
        RasterError: one of the files is a pipe or a device, which would be waited for.
    """
    walk = _Walk()
    walk.visit(os.fspath(address), 0)
    return Behind(tuple(dict.fromkeys(walk.files)), tuple(walk.texts), tuple(walk.unknown))


def local_place(name: str) -> Path | None:
    """The file or folder of this machine that a name of GDAL leads to; None where there is none."""
    if name.startswith("file://"):
        name = name[len("file://") :]
    if not name.startswith("/vsi"):
        return Path(name) if "://" not in name and _lexists(name) else None
    inner = re.sub(r"^(?:/?vsi\w+(?:\?(?:.*&)?(?:file|url)=|/+(?=/|vsi)|/))+", "", name)
    inner = re.sub(r"^[\d_]+,|^key=.*?file=", "", inner)  # /vsisubfile/, /vsicrypt/
    parts = inner.strip("{").split("/")
    for stop in range(len(parts), 0, -1):
        place = "/".join(parts[:stop]).removesuffix("}")
        if place and Path(place).is_file():
            return Path(place)
    return None


def members(folder: Path) -> Iterator[Path]:
    """Every file in a folder and in those below, in order; RasterError at a pipe or device."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if len(Path(parent).relative_to(folder).parts) > _DEEPEST:
            raise RasterError(f"{folder}: folders lie more than {_DEEPEST} deep; does a link lead back?")
        for name in sorted(files):
            check_file(Path(parent, name))
            yield Path(parent, name)


def check_file(path: Path) -> None:
    """RasterError for a named pipe, socket or device: reading one may wait for ever."""
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):
        return  # who reads it says what is wrong
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise RasterError(f"{path}: a pipe, socket or device, not a file")


def check_apart(results: Iterable[Path], sources: Iterable[Path]) -> None:
    """RasterError where writing one of `results` would take the place of one of `sources`, or of part of it.

    However they are spelled: links, `..`, another case. A result in a folder that is read from (a zarr store)
    and one whose folder holds what is read are refused, too.
    """
    results = list(results)
    for source in sources:
        for result in results:
            if _same(result, source) or _within(result, source) or _within(source, result):
                told = "it" if _same(result, source) or str(result) == str(source) else str(source)
                raise RasterError(
                    f"{result}: can't be written, because {told} is read to make it; choose another place"
                )


class _Walk:
    """From a raster to its files and on to theirs."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.texts: list[str] = []
        self.unknown: list[str] = []
        self._seen: set[str] = set()

    def visit(self, name: str, depth: int) -> None:
        """Note a raster, or any file of one, with all that it names."""
        if name in self._seen:
            return
        self._seen.add(name)
        if depth > _DEEPEST:
            self._doubt(name, f"virtual rasters lie more than {_DEEPEST} deep")
            return
        if name.lstrip().startswith("<"):
            self.texts.append(name)
            if not name.lstrip().startswith("<VRTDataset"):
                self._doubt("a description given as text", "no VRT, so that it may lead anywhere")
            self._sources(name, "", depth)
            return
        if name.lower().startswith("vrt://"):  # GDAL names what the raster meant is read from, but not itself
            self.visit(name[len("vrt://") :].rpartition("?")[0] or name[len("vrt://") :], depth + 1)
        place = local_place(name)
        if place is not None:
            for sidecar in SIDECARS:
                check_file(Path(f"{place}{sidecar}"))
        if is_zarr(name):
            self._store(name)
            return
        if place is not None or name.startswith("/vsi"):
            self.files.append(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset = rasterio.open(name)
        except (RasterioError, CPLE_BaseError, OSError, ValueError):
            if name not in self.files:
                self.files.append(name)  # that it is absent is known, too
            return
        with dataset:
            self._open(name, dataset, depth)

    def _open(self, name: str, dataset: DatasetReader, depth: int) -> None:
        if dataset.driver not in _NAMED:
            self._doubt(name, f"files of the format {dataset.driver} can lead to others")
        files = [str(file) for file in dataset.files]
        if not files and dataset.driver not in ("VRT", "DERIVED"):
            self._doubt(name, "GDAL names no file")
        for file in files:
            self.visit(file, depth + 1)
        if dataset.driver == "VRT":
            for text, folder in _descriptions(name, files):
                self._sources(text, folder, depth)

    def _sources(self, text: str, folder: str, depth: int) -> None:
        """What a VRT names. GDAL's own list leaves out what it can't find on a disk."""
        try:
            nodes = list(ElementTree.fromstring(text).iter())
        except ElementTree.ParseError as error:
            self._doubt(folder or "VRT", f"a VRT that only GDAL can read ({error})")
            return
        for node in nodes:
            tag, value = node.tag.lower(), (node.text or "").strip()
            if tag == "pixelfunctionlanguage" and value.lower() == "python":
                self._doubt("VRT", "its pixel function is Python code")
            argument = tag == "argument" and "filename" in node.get("name", "").lower()
            if not value or not (argument or tag.endswith(("filename", "sourcedataset"))):
                continue
            relative = "1" in (node.get("relativeToVRT", "0"), node.get("relativetoVRT", "0"))
            self.visit(_from(folder, value) if relative else value, depth + 1)

    def _store(self, name: str) -> None:
        """A zarr store, which stands for all of its files."""
        place = local_place(name)
        if place is None:
            self._doubt(name, "a zarr store behind a URL can't be asked for its changes")
        else:
            self.files.append(str(place))

    def _doubt(self, name: str, why: str) -> None:
        self.unknown.append(f"{without_secrets(name)}: {why}")


def _descriptions(name: str, files: list[str]) -> Iterator[tuple[str, str]]:
    """The text of a VRT and the folder that its names count from."""
    if name.lstrip().startswith("<") or name.startswith("vrt://") or not files:
        return
    text = read_start(files[0], _XML_BYTES)
    if text is not None:
        yield text.decode(errors="replace"), files[0].rpartition("/")[0]


def _from(folder: str, name: str) -> str:
    """A name that counts from a folder; in a part of a file (`NETCDF:"f.nc":b`), the file does."""
    if not folder or name.startswith("/") or "://" in name:
        return name
    part = re.fullmatch(r'([A-Za-z]\w+:(?:off:)?(?:\d+:)?"?)([^:"]+)(.*)', name, re.DOTALL)
    return f"{part[1]}{folder}/{part[2]}{part[3]}" if part else f"{folder}/{name}"


def _lexists(name: str) -> bool:
    try:
        return os.path.lexists(name)
    except ValueError:
        return False


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


def _within(inner: Path, outer: Path) -> bool:
    """Whether a path lies below a folder, however both are spelled."""
    if not outer.is_dir():
        return False
    return any(_same(parent, outer) for parent in Path(os.path.realpath(inner)).parents)
