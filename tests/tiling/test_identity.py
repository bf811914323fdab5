"""Everything a raster is read from is found, and any change of it is seen."""

import gzip
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil

from tiling import RasterError, create_zarr, open_raster, to_zarr
from tiling.behind import behind, check_apart
from tiling.identity import identity

VRT = (
    '<VRTDataset rasterXSize="90" rasterYSize="70"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
    '<SourceFilename relativeToVRT="{}">{}</SourceFilename><SourceBand>1</SourceBand>'
    "</SimpleSource></VRTRasterBand></VRTDataset>"
)


def vrt(path: Path, source: str, *, relative: bool = False) -> Path:
    path.write_text(VRT.format(int(relative), source.replace('"', "&quot;")))
    return path


def zipped(folder: Path) -> str:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(folder / "scene.tif", "in/scene.tif")
    return str(folder / "a.zip")


def tarred(folder: Path) -> str:
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "scene.tif", "scene.tif")
    return str(folder / "a.tar")


def netcdf(folder: Path) -> str:
    rasterio.shutil.copy(folder / "scene.tif", folder / "a.nc", driver="netCDF", FORMAT="NC4")
    return str(folder / "a.nc")


def gzipped(folder: Path) -> str:
    (folder / "a.tif.gz").write_bytes(gzip.compress((folder / "scene.tif").read_bytes()))
    return str(folder / "a.tif.gz")


def stored(folder: Path) -> str:
    return to_zarr(open_raster(folder / "scene.tif"), folder / "a.zarr", overwrite=True).name


def nested(folder: Path) -> str:
    vrt(folder / "inner.vrt", "scene.tif", relative=True)
    (folder / "deep").mkdir(exist_ok=True)
    vrt(folder / "deep" / "mid.vrt", "../inner.vrt", relative=True)
    return str(vrt(folder / "outer.vrt", "deep/mid.vrt", relative=True))


# How scene.tif may be read: makes what lies between and returns the address. Called again after a change.
WAYS: dict[str, Callable[[Path], str]] = {
    "file": lambda folder: str(folder / "scene.tif"),
    "file://": lambda folder: f"file://{folder}/scene.tif",
    "vrt": lambda folder: str(vrt(folder / "a.vrt", "scene.tif", relative=True)),
    "vrt of a vrt of a vrt": nested,
    "vrt of a zip": lambda folder: str(vrt(folder / "a.vrt", f"/vsizip/{zipped(folder)}/in/scene.tif")),
    "vrt of a netcdf": lambda folder: str(vrt(folder / "a.vrt", f'NETCDF:"{netcdf(folder)}":Band1')),
    "vrt of a directory": lambda folder: str(vrt(folder / "a.vrt", f"GTIFF_DIR:1:{folder}/scene.tif")),
    "vrt as text": lambda folder: VRT.format(0, folder / "scene.tif"),
    "vrt://": lambda folder: f"vrt://{vrt(folder / 'a.vrt', 'scene.tif', relative=True)}?bands=1",
    "/vsizip/": lambda folder: f"/vsizip/{zipped(folder)}/in/scene.tif",
    "/vsizip/{}": lambda folder: f"/vsizip/{{{zipped(folder)}}}/in/scene.tif",
    "zip://": lambda folder: f"zip://{zipped(folder)}!in/scene.tif",
    "/vsitar/": lambda folder: f"/vsitar/{tarred(folder)}/scene.tif",
    "/vsigzip/": lambda folder: f"/vsigzip/{gzipped(folder)}",
    "/vsisubfile/": lambda folder: f"/vsisubfile/0_999999,{folder}/scene.tif",
    "/vsicached": lambda folder: f"/vsicached?file={folder}/scene.tif",
    "directory": lambda folder: f"GTIFF_DIR:1:{folder}/scene.tif",
    "netcdf": lambda folder: f"netcdf:{netcdf(folder)}:Band1",
    "hdf5": lambda folder: f'HDF5:"{netcdf(folder)}"://Band1',
    "zarr": stored,
    "group of a zarr": lambda folder: f"{stored(folder)}/0",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_replaced_source_is_another_scene(tmp_path: Path, write_tif, noise, way: str) -> None:
    write_tif(noise())
    address = WAYS[way](tmp_path)
    found = behind(address)
    before = identity(address)
    assert not before.unknown
    assert identity(address) == before, "unchanged, it is another"
    with pytest.raises(RasterError, match="is read to make it"):
        check_apart([Path(found.places[-1])], found.places)
    write_tif(noise()[:, ::-1])
    assert WAYS[way](tmp_path) == address
    assert identity(address).files != before.files


@pytest.mark.parametrize("way", ["file", "vrt of a vrt of a vrt", "directory"])
@pytest.mark.parametrize("sidecar", ["overviews", "mask", "nodata", "worldfile"])
def test_sidecars_are_part_of_it(tmp_path: Path, write_tif, noise, way: str, sidecar: str) -> None:
    scene = write_tif(noise(), **({"transform": None, "crs": None} if sidecar == "worldfile" else {}))
    address = WAYS[way](tmp_path)
    before = identity(address)
    with rasterio.Env(TIFF_USE_OVR=True, GDAL_TIFF_INTERNAL_MASK=False):
        if sidecar == "overviews":
            with rasterio.open(scene, "r+") as dataset:
                dataset.build_overviews([2])
        elif sidecar == "mask":
            rasterio.shutil.copy(scene, tmp_path / "copy.tif", driver="GTiff")
            with rasterio.open(tmp_path / "copy.tif", "r+") as dataset:
                dataset.write_mask(np.zeros((70, 90), bool))
            (tmp_path / "copy.tif.msk").rename(tmp_path / "scene.tif.msk")
    if sidecar == "nodata":
        (tmp_path / "scene.tif.aux.xml").write_text(
            '<PAMDataset><PAMRasterBand band="1"><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>'
        )
    if sidecar == "worldfile":
        (tmp_path / "scene.tfw").write_text("10\n0\n0\n-10\n5\n5\n")
    assert identity(address) != before


def test_statistics_of_a_viewer_are_not(tmp_path: Path, write_tif, noise) -> None:
    scene = write_tif(noise())
    before = identity(scene)
    (tmp_path / "scene.tif.aux.xml").write_text(
        '<PAMDataset>\n <PAMRasterBand band="1">\n  <Histograms><HistItem/></Histograms>\n  <Metadata>\n'
        '   <MDI key="STATISTICS_MEAN">7</MDI>\n  </Metadata>\n </PAMRasterBand>\n</PAMDataset>\n'
    )
    assert identity(scene) == before


def test_a_change_within_a_large_file_of_the_same_time(tmp_path: Path) -> None:
    place = tmp_path / "large.bin"
    place.write_bytes(bytes(9 * 2**20))
    time = place.stat().st_mtime_ns
    before = identity(place)
    content = bytearray(place.read_bytes())
    content[3 * 2**20 : 4 * 2**20] = b"\1" * 2**20
    place.write_bytes(content)
    os.utime(place, ns=(time, time))
    assert identity(place) != before


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('<GDAL_WMS><Service name="TMS"><ServerUrl>http://127.0.0.1:1/${z}</ServerUrl></Service><DataWindow>'
         "<UpperLeftX>-1</UpperLeftX><UpperLeftY>1</UpperLeftY><LowerRightX>1</LowerRightX><LowerRightY>-1"
         "</LowerRightY><TileLevel>1</TileLevel></DataWindow></GDAL_WMS>", "no VRT"),
        (VRT.format(0, "http://127.0.0.1:1/none.tif"), None),
        ("https://127.0.0.1:1/store.zarr", "a zarr store behind a URL"),
        ("/vsicurl/http://127.0.0.1:1/none.tif", "tells neither ETag nor time"),
    ],
)  # fmt: skip
def test_what_can_not_be_known_is_said(text: str, why: str | None) -> None:
    unknown = identity(text).unknown
    assert (why is None and not unknown) or any(str(why) in one for one in unknown)


def test_a_url_by_its_etag_or_time_and_not_by_its_signature(
    tmp_path: Path, write_tif, noise, server: str
) -> None:
    scene = write_tif(noise())
    before = identity(f"{server}/scene.tif?sig=a/b")
    assert not before.unknown and "sig" not in str(before)
    assert identity(f"{server}/scene.tif?sig=c/d") == before
    write_tif(noise()[:, ::-1])
    os.utime(scene, (1, 1))
    assert identity(f"{server}/scene.tif?sig=a/b") != before
    over = vrt(tmp_path / "a.vrt", f"/vsicurl/{server}/scene.tif?sig=a")
    known = identity(over)
    os.utime(scene, (2, 2))
    assert not known.unknown and identity(over) != known


def test_a_pipe_is_not_waited_for(tmp_path: Path, write_tif, noise) -> None:
    """In a process of its own: what went wrong here would wait for ever."""
    os.mkfifo(tmp_path / "pipe.tif")
    write_tif(noise(), "good.tif")
    os.mkfifo(tmp_path / "good.tif.ovr")
    vrt(tmp_path / "a.vrt", "pipe.tif", relative=True)
    create_zarr(tmp_path / "a.zarr", (1, 8, 8), "uint8").publish(pyramid=None)
    os.mkfifo(tmp_path / "a.zarr" / "0" / "shard")
    code = (
        "import sys; from tiling import open_raster; from tiling.identity import identity\n"
        "for name in ('pipe.tif', 'good.tif', 'a.vrt', 'a.zarr'):\n"
        "    for ask in (identity, open_raster) if name in ('pipe.tif', 'good.tif') else (identity,):\n"
        "        try: ask(name)\n"
        "        except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("a pipe, socket or device, not a file") == 6, done.stdout


class TestApart:
    """A result never takes the place of a file that it is made from."""

    @pytest.fixture
    def scene(self, write_tif, noise) -> Path:
        return write_tif(noise())

    def refused(self, result: Path | str, source: str | Path) -> None:
        with pytest.raises(RasterError, match="is read to make it; choose another place"):
            check_apart([Path(result)], behind(source).places)

    def test_however_it_is_spelled(
        self, tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "soft.tif").symlink_to(scene)
        os.link(scene, tmp_path / "hard.tif")
        (tmp_path / "folder").symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        for spelled in (
            "soft.tif",
            "hard.tif",
            "scene.tif",
            "folder/scene.tif",
            f"../{tmp_path.name}/soft.tif",
        ):
            self.refused(spelled, scene)
            self.refused(scene, spelled)

    def test_a_store_its_parts_and_what_holds_it(self, tmp_path: Path, scene: Path) -> None:
        store = tmp_path / "box" / "a.zarr"
        store.parent.mkdir()
        to_zarr(open_raster(scene), store)
        for result in (store, store / "0", store / "new.tif", tmp_path / "box"):
            self.refused(result, store)
        self.refused(store, store / "0")

    def test_others_may_be_written(self, tmp_path: Path, scene: Path) -> None:
        check_apart([tmp_path / "out.tif", tmp_path / "scene.tif.zarr", tmp_path / "x"], behind(scene).places)
