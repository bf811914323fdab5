"""Which pixels have data: as GDAL tells it, and the same in every copy."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.transform import from_origin
from rasterio.windows import Window

from tiling import RasterError, open_raster, to_cog, to_zarr

SIZE = (19, 23)
GRID = {
    "driver": "GTiff",
    "height": SIZE[0],
    "width": SIZE[1],
    "crs": "EPSG:32633",
    "transform": from_origin(5e5, 5e6, 10, 10),
}
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
VRT_TYPES = {"uint8": "Byte", "uint16": "UInt16", "int16": "Int16", "int32": "Int32", "float32": "Float32"}


def told_by_gdal(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and validity [B, H, W] of all bands but alpha, by rasterio alone."""
    with rasterio.open(path) as file:
        alphas = [i for i, color in enumerate(file.colorinterp, 1) if color == ColorInterp.alpha]
        indexes = [i for i in range(1, file.count + 1) if i not in alphas] or list(range(1, file.count + 1))
        data, valid = file.read(indexes), file.read_masks(indexes) > 0
        for k, index in enumerate(indexes):
            if alphas and alphas[0] not in indexes and MaskFlags.all_valid in file.mask_flag_enums[index - 1]:
                valid[k] &= file.read(alphas[0]) > 0
    return data, valid & ~np.isnan(data.astype("float64"))


def random_file(random: np.random.Generator, path: Path, dtypes: tuple[str, ...] = DTYPES) -> Path:
    """A GeoTIFF with few values, and any of: nodata, a mask, an alpha band, NaN."""
    dtype, bands = str(random.choice(dtypes)), int(random.integers(1, 6))
    data = random.integers(0, 4, (bands, *SIZE)).astype(dtype)
    if dtype.startswith(("int", "float")):
        data -= 1
    if dtype.startswith("float") and random.random() < 0.4:
        data[data == 2] = np.nan
    about = {"photometric": "minisblack", "alpha": "no"}
    if bands > 1 and random.random() < 0.4:
        about["alpha"] = "yes"
    choices = [None, None, 0, 1] + ([-1, float("nan")] if dtype.startswith("float") else [3])
    nodata = choices[random.integers(len(choices))]
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=bool(random.random() < 0.5)),
        rasterio.open(path, "w", count=bands, dtype=dtype, nodata=nodata, **GRID, **about) as file,
    ):
        file.write(data)
        if random.random() < 0.3:
            file.write_mask(random.random(SIZE) < 0.7)
    return path


def random_vrt(random: np.random.Generator, path: Path, source: Path) -> Path:
    """Every band with a nodata value or a mask of its own, or neither."""
    bands = []
    dtype = str(random.choice(list(VRT_TYPES)))
    with rasterio.open(source) as file:
        count = file.count
    for number in range(1, int(random.integers(1, 5)) + 1):
        pixels = (
            f"<SimpleSource><SourceFilename>{source}</SourceFilename><SourceBand>"
            f"{random.integers(1, count + 1)}</SourceBand></SimpleSource>"
        )
        inner = random.choice(
            [
                "",
                f"<NoDataValue>{random.integers(0, 4)}</NoDataValue>",
                "<NoDataValue>-9999</NoDataValue>",
                f'<MaskBand><VRTRasterBand dataType="Byte">{pixels}</VRTRasterBand></MaskBand>',
            ]
        )
        color = f"<ColorInterp>{'Alpha' if random.random() < 0.2 else 'Gray'}</ColorInterp>"
        bands.append(
            f'<VRTRasterBand dataType="{VRT_TYPES[dtype]}" band="{number}">{color}{inner}{pixels}'
            "</VRTRasterBand>"
        )
    path.write_text(
        f'<VRTDataset rasterXSize="{SIZE[1]}" rasterYSize="{SIZE[0]}"><SRS>EPSG:32633</SRS>'
        f"<GeoTransform>500000,10,0,5000000,0,-10</GeoTransform>{''.join(bands)}</VRTDataset>"
    )
    return path


def check_copies(raster, data: np.ndarray, valid: np.ndarray, folder: Path) -> None:
    """`raster` says what GDAL says, and so does each of its copies and their copies."""
    read = raster.read(masked=True)
    assert np.array_equal(~np.ma.getmaskarray(read), valid)
    assert np.array_equal(read.data[valid], data[valid])
    if raster.nodata is not None:
        assert not (data[valid] == raster.nodata).any()
    store = to_zarr(raster, folder / "copy.zarr", overwrite=True)
    file = to_cog(store, folder / "copy.tif", overwrite=True)
    direct = to_cog(raster, folder / "direct.tif", overwrite=True)
    again = to_zarr(file, folder / "again.zarr", overwrite=True)
    for copy in (store, file, direct, again):
        pixels = copy.read(masked=True)
        assert copy.dtype == raster.dtype and copy.shape == raster.shape
        assert np.array_equal(~np.ma.getmaskarray(pixels), valid), copy
        assert np.array_equal(pixels.data[valid], data[valid]), copy
    for path in (file.name, direct.name):
        pixels, shown = told_by_gdal(path)
        assert np.array_equal(shown, valid) and np.array_equal(pixels[valid], data[valid])


@pytest.mark.parametrize("seed", range(24))
def test_copies_miss_the_pixels_that_gdal_misses(tmp_path, seed: int) -> None:
    random = np.random.default_rng(seed)
    path = random_file(random, tmp_path / "a.tif")
    if seed % 2:
        path = random_vrt(random, tmp_path / "a.vrt", path)
    data, valid = told_by_gdal(path)
    check_copies(open_raster(path), data, valid, tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_copies_of_stacks_miss_what_each_file_misses(tmp_path, seed: int) -> None:
    random = np.random.default_rng(1000 + seed)
    paths = [random_file(random, tmp_path / f"{k}.tif", ("uint8", "int16", "float32")) for k in range(3)]
    read = [told_by_gdal(path) for path in paths]
    data = np.concatenate([pixels for pixels, _ in read])
    check_copies(open_raster(paths), data, np.concatenate([valid for _, valid in read]), tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_every_layout_can_be_resampled_and_keeps_its_missing_pixels(tmp_path, seed: int) -> None:
    """Pixels half as large, by nearest: each is one of the file's, four times."""
    random = np.random.default_rng(2000 + seed)
    path = random_file(random, tmp_path / "a.tif")
    if seed % 2:
        path = random_vrt(random, tmp_path / "a.vrt", path)
    data, valid = (part.repeat(2, axis=1).repeat(2, axis=2) for part in told_by_gdal(path))
    raster = open_raster(path, resolution=5)
    read = raster.read(masked=True)
    assert np.array_equal(~np.ma.getmaskarray(read), valid) and np.array_equal(read.data[valid], data[valid])
    window = Window(7, 3, 11, 20)
    assert np.array_equal(raster.mask(window), valid.any(axis=0)[3:23, 7:18])
    coarse = to_cog(open_raster(path, resolution=35, resampling="average"), tmp_path / "coarse.tif")
    assert np.array_equal(
        np.ma.getmaskarray(coarse.read(masked=True)),
        np.ma.getmaskarray(open_raster(path, resolution=35, resampling="average").read(masked=True)),
    )


def test_sea_level_is_no_nodata_beside_a_band_that_says_so(write_tif, noise, tmp_path) -> None:
    """B04 with 0 and a terrain model with -9999: its zeros stay, here and in every copy."""
    red, terrain = noise(1, dtype="int16"), noise(1, dtype="int16")
    red[0, :9], terrain[0, 5:20], terrain[0, 30:33] = 0, 0, -9999
    stack = open_raster([write_tif(red, "b04.tif", nodata=0), write_tif(terrain, "dem.tif", nodata=-9999)])
    valid = np.concatenate([red != 0, terrain != -9999])
    check_copies(stack, np.concatenate([red, terrain]), valid, tmp_path)


def test_where_no_value_is_free_a_file_is_refused_and_a_store_is_not(write_tif, tmp_path) -> None:
    every = np.arange(256, dtype="uint8").reshape(1, 16, 16)
    some = every % 2
    stack = open_raster([write_tif(every, "every.tif"), write_tif(some, "some.tif", nodata=0)])
    with pytest.raises(RasterError, match=r"every\.tif.*every uint8 value is in use"):
        to_cog(stack, tmp_path / "no.tif")
    store = to_zarr(stack, tmp_path / "s.zarr")
    wide = to_cog(store, tmp_path / "wide.tif", dtype="int16")
    for copy in (store, wide):
        read = copy.read(masked=True)
        assert np.array_equal(read.data[0], every[0]) and not np.ma.getmaskarray(read)[0].any()
        assert np.array_equal(np.ma.getmaskarray(read)[1], some[0] == 0)


def test_a_mask_goes_before_a_nodata_value(write_tif, noise) -> None:
    data, shown = noise(2), np.zeros((70, 90), bool)
    data[:, 20:40], shown[10:30] = 0, True
    raster = open_raster(write_tif(data, nodata=0, mask=shown))
    assert raster.nodata is None and np.array_equal(raster.mask(), shown)


def test_a_nodata_value_that_pixels_with_data_would_take_is_refused(write_tif, noise, tmp_path) -> None:
    shown = np.zeros((70, 90), bool)
    shown[10:30] = True
    raster = open_raster(write_tif(np.full((1, 70, 90), 7, "uint8"), mask=shown))
    with pytest.raises(RasterError, match=r"scene\.tif: 1800 pixels with data .* are 7 as uint8"):
        to_cog(raster, tmp_path / "a.tif", nodata=7)
    assert to_cog(raster, tmp_path / "a.tif", nodata=8).nodata == 8


@pytest.mark.parametrize(("kind", "nodata"), [("int16", 0), ("float32", 0.0)])
def test_a_mean_that_meets_the_nodata_value_stays_data(write_tif, tmp_path, kind: str, nodata: float) -> None:
    data = np.tile(np.array([[-5, 5], [-5, 5]], kind), (1, 300, 300))
    path = write_tif(data, nodata=nodata)
    assert open_raster(path, resolution=20, resampling="average").mask().all()
    store = to_zarr(open_raster(path), tmp_path / "a.zarr")
    assert open_raster(store.name, resolution=20, resampling="average").mask().all()


@pytest.mark.parametrize("seed", range(4))
def test_stacks_over_other_grids_miss_what_each_file_misses(tmp_path, seed: int) -> None:
    """The second file's pixels are twice as large; any layout of masks and alpha."""
    random = np.random.default_rng(3000 + seed)
    fine, coarse = (random_file(random, tmp_path / f"{name}.tif") for name in ("fine", "coarse"))
    with rasterio.open(coarse, "r+") as file:
        file.transform = from_origin(5e5, 5e6, 20, 20)
    data, valid = told_by_gdal(fine)
    other, shown = (part.repeat(2, 1).repeat(2, 2)[:, : SIZE[0], : SIZE[1]] for part in told_by_gdal(coarse))
    read = open_raster([fine, coarse]).read(masked=True)
    known = np.concatenate([valid, shown])
    assert np.array_equal(~np.ma.getmaskarray(read), known)
    expected = np.concatenate([data, other]).astype(read.dtype)
    assert np.array_equal(read.data[known], expected[known])
