import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from tiling import Raster, RasterError, open_raster, to_zarr


def test_import_is_quick_because_it_imports_no_torch_dask_or_zarr() -> None:
    code = (
        "import sys, tiling; print([m for m in ('torch', 'dask', 'zarr', 'distributed') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_raster_tells_what_it_is(write_tif, noise) -> None:
    path = write_tif(
        noise(3), names=("red", "green", "blue"), nodata=0, tiled=True, blockxsize=16, blockysize=32
    )
    raster = open_raster(path)
    assert raster.shape == (3, 70, 90) and raster.ndim == 3 and (raster.height, raster.width) == (70, 90)
    assert raster.dtype == np.uint8 and raster.crs.to_epsg() == 32633 and raster.nodata == 0
    assert raster.transform == Affine(10, 0, 500_000, 0, -10, 5_000_000)
    assert raster.bounds == (500_000, 4_999_300, 500_900, 5_000_000)
    assert raster.band_names == ("red", "green", "blue") and raster.block_shape == (32, 16)
    assert raster.name == str(path) and "3 x 70 x 90, uint8, EPSG:32633, nodata 0" in repr(raster)


def test_a_raster_is_immutable(write_tif, noise) -> None:
    raster = open_raster(write_tif(noise()))
    for name in ("shape", "nodata", "anything"):
        with pytest.raises(AttributeError):
            setattr(raster, name, 1)


def test_read_windows_and_bands_by_number_and_name(write_tif, noise) -> None:
    data = noise(4)
    raster = open_raster(write_tif(data, names=("r", "g", "b", "nir")))
    assert np.array_equal(raster.read(), data)
    assert np.array_equal(raster.read(Window(5, 9, 30, 20)), data[:, 9:29, 5:35])
    assert np.array_equal(raster.read(bands=["nir", 1]), data[[3, 0]])
    assert raster.read(Window(5, 9, 0, 20)).shape == (4, 20, 0)
    chosen = open_raster(raster.name, bands=["nir", 2])
    assert chosen.band_names == ("nir", "g") and np.array_equal(chosen.read(), data[[3, 1]])
    assert np.array_equal(chosen.read(bands=[2]), data[[1]])


@pytest.mark.parametrize(
    "window",
    [
        Window(0, 0, 91, 1),
        Window(-1, 0, 5, 5),
        Window(0, 0.5, 5, 5),
        Window(0, 70, 1, 1),
    ],
)
def test_windows_beyond_the_raster_are_refused(write_tif, noise, window: Window) -> None:
    raster = open_raster(write_tif(noise()))
    with pytest.raises(RasterError, match=r"scene\.tif.*70 x 90"):
        raster.read(window)


@pytest.mark.parametrize("bands", [[0], [4], ["nir"], [-1], []])
def test_bands_that_are_not_there_are_refused(write_tif, noise, bands: list) -> None:
    with pytest.raises(RasterError, match=r"scene\.tif: no band"):
        open_raster(write_tif(noise(3)), bands=bands)


axis = st.one_of(
    st.integers(-3, 2),
    st.slices(9),
    st.builds(slice, st.none() | st.integers(-12, 12), st.none() | st.integers(-12, 12)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(axis, max_size=3), st.booleans(), st.integers(0, 3))
def test_slicing_is_numpys(write_tif, noise, keys: list, ellipsis: bool, at: int) -> None:
    data = noise(3, 8, 9)
    raster = open_raster(write_tif(data))
    if ellipsis and len(keys) < 3:
        keys.insert(min(at, len(keys)), ...)
    expected = data[tuple(keys)]
    assert np.array_equal(raster[tuple(keys)], expected) and raster[tuple(keys)].shape == expected.shape


def test_too_many_or_too_large_indices_are_index_errors(write_tif, noise) -> None:
    raster = open_raster(write_tif(noise(3, 8, 9)))
    for key in ((0, 0, 0, 0), 3, (0, -9), (0, 0, 9)):
        with pytest.raises(IndexError):
            raster[key]


def test_many_threads_read_one_raster_and_leave_no_file_open(write_tif, noise) -> None:
    data = noise(3, 300, 200)
    path = write_tif(data, tiled=True, blockxsize=16, blockysize=16)
    raster = open_raster(path)
    windows = [Window(x, y, 30, 50) for x in range(0, 170, 10) for y in range(0, 250, 25)]
    with ThreadPoolExecutor(8) as pool:
        for window, read in zip(windows, pool.map(raster.read, windows), strict=True):
            assert np.array_equal(read, data[:, *window.toslices()])
        assert _open_files(path) > 0
    gc.collect()
    assert _open_files(path) == 0  # each thread's file went with its thread
    assert np.array_equal(raster[:, :5], data[:, :5]) and _open_files(path) == 1
    raster.close()
    assert _open_files(path) == 0
    raster[0, 0]
    del raster
    gc.collect()
    assert _open_files(path) == 0


def _open_files(path: Path) -> int:
    opened = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            opened += link.readlink() == path
        except OSError:
            continue
    return opened


def _read_sum(raster: Raster) -> int:
    return int(raster.read().sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_forked_and_spawned_processes_read_the_same(
    write_tif, noise, tmp_path, method: str, kind: str
) -> None:
    data = noise(2, 200, 150)
    raster = open_raster(write_tif(data))
    raster = to_zarr(raster, tmp_path / "scene.zarr") if kind == "zarr" else raster
    raster.read()  # opened in this process before the other begins
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        assert pool.map(_read_sum, [raster] * 4) == [data.sum(dtype=int)] * 4


def test_a_forked_child_reads_through_the_inherited_object(write_tif, noise) -> None:
    data = noise(1, 64, 64)
    raster = open_raster(write_tif(data))
    raster.read()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, str(_read_sum(raster)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(send)
    with os.fdopen(receive) as answer:
        assert int(answer.read()) == data.sum(dtype=int)
    assert np.array_equal(raster.read(), data)


def test_pickles_are_small_and_read_the_same(write_tif, noise) -> None:
    raster = open_raster(write_tif(noise(), nodata=0), bands=[2])
    raster.read()
    data = pickle.dumps(raster)
    copy = pickle.loads(data)
    assert len(data) < 5000 and repr(copy) == repr(raster) and np.array_equal(copy.read(), raster.read())


def test_mask_by_nodata_value(write_tif, noise) -> None:
    data = noise(2)
    data[:, :10, :10] = 0
    data[0, 20:30] = 0  # one band alone: the pixel has data
    raster = open_raster(write_tif(data, nodata=0))
    expected = np.ones((70, 90), bool)
    expected[:10, :10] = False
    assert np.array_equal(raster.mask(), expected)
    assert np.array_equal(raster.mask(Window(5, 5, 20, 30)), expected[5:35, 5:25])
    assert np.array_equal(raster.mask(data=data), expected)
    masked = raster.read(masked=True)
    assert np.array_equal(np.ma.getmaskarray(masked), data == 0)
    assert not raster.has_mask


@pytest.mark.parametrize("nodata", [None, np.nan, -9999.0])
def test_nan_never_counts_as_data(write_tif, noise, nodata: float | None) -> None:
    data = noise(2, dtype="float32")
    data[:, 0, 0] = np.nan
    data[1, 0, 1] = np.nan
    data[:, 0, 2] = -9999
    raster = open_raster(write_tif(data, nodata=nodata))
    assert raster.mask()[0, :4].tolist() == [False, True, nodata != -9999, True]


@pytest.mark.parametrize("nodata", [-3.4028235e38, 0.1])
def test_nodata_values_that_float32_rounds_are_found(write_tif, noise, nodata: float) -> None:
    data = noise(1, dtype="float32")
    data[0, 5, 6] = nodata
    raster = open_raster(write_tif(data, nodata=nodata))
    assert np.argwhere(~raster.mask()).tolist() == [[5, 6]]


def test_mask_by_per_dataset_mask(write_tif, noise) -> None:
    shown = np.zeros((70, 90), bool)
    shown[10:60, 20:] = True
    raster = open_raster(write_tif(noise(3), mask=shown))
    assert raster.has_mask and np.array_equal(raster.mask(), shown)
    assert np.array_equal(raster.mask(Window(10, 5, 20, 20)), shown[5:25, 10:30])


def test_an_alpha_band_is_the_mask_unless_asked_for_as_data(write_tif, noise) -> None:
    data = noise(4)
    data[3] = np.arange(90) % 3 * 100
    path = write_tif(data, photometric="RGB", alpha="yes")
    with rasterio.open(path) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    raster = open_raster(path)
    assert raster.shape == (3, 70, 90) and np.array_equal(raster.mask(), data[3] > 0)
    whole = open_raster(path, bands=[1, 2, 3, 4])
    assert np.array_equal(whole.read(), data) and whole.mask().all() and not whole.has_mask


def test_a_nodata_value_that_the_pixels_cannot_hold_hides_nothing(write_tif, noise, tmp_path) -> None:
    path = tmp_path / "odd.vrt"
    scene = write_tif(noise(1))
    path.write_text(
        '<VRTDataset rasterXSize="90" rasterYSize="70"><VRTRasterBand dataType="Byte" band="1">'
        f"<NoDataValue>-9999</NoDataValue><SimpleSource><SourceFilename>{scene}</SourceFilename>"
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    assert open_raster(path).mask().all()


def test_to_dask_is_lazy_and_the_same(write_tif, noise) -> None:
    data = noise(2, 300, 200)
    lazy = open_raster(write_tif(data)).to_dask((128, 64))
    assert lazy.chunks == ((2,), (128, 128, 44), (64, 64, 64, 8)) and lazy.dtype == np.uint8
    assert np.array_equal(lazy[1, 10:250:3].compute(scheduler="threads"), data[1, 10:250:3])


def test_to_xarray_has_coordinates_of_pixel_centres_and_the_crs(write_tif, noise) -> None:
    data = noise(2)
    array = open_raster(write_tif(data, names=("red", "nir"), nodata=0)).to_xarray()
    assert array.dims == ("band", "y", "x") and array.band.values.tolist() == ["red", "nir"]
    assert float(array.x[0]) == 500_005 and float(array.y[-1]) == 5_000_000 - 695
    assert "WGS 84 / UTM zone 33N" in array.spatial_ref.attrs["crs_wkt"] and array.attrs["_FillValue"] == 0
    assert np.array_equal(array.sel(band="nir").values, data[1])


@pytest.mark.parametrize(
    "transform", [Affine.rotation(30) @ Affine.scale(10, -10), Affine(10, 0, 5, 0, 10, 7), Affine.identity()]
)
def test_any_transform_is_kept(write_tif, noise, transform: Affine) -> None:
    raster = open_raster(write_tif(noise(), transform=transform, crs=None))
    assert raster.transform.almost_equals(transform) and raster.crs is None
    part = raster.select(window=Window(3, 4, 10, 20))
    assert part.shape == (3, 20, 10) and part.transform.almost_equals(transform @ Affine.translation(3, 4))
    assert np.array_equal(part.read(), raster[:, 4:24, 3:13])
    assert np.array_equal(part.select([3], Window(1, 1, 2, 2))[0], raster[2, 5:7, 4:6])
