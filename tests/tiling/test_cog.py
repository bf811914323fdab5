import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.windows import Window
from rio_cogeo import cog_validate

from tiling import RasterError, create_zarr, open_raster, to_cog, to_zarr
from tiling.cog import convert


def valid(path) -> bool:
    ok, errors, warnings = cog_validate(path, strict=True)
    assert not errors and not warnings
    return ok


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64", "int8", "uint64"]
)
@pytest.mark.parametrize("bands", [1, 4, 7])
def test_pixels_and_description_survive_and_the_file_is_a_cog(
    write_tif, noise, tmp_path, dtype, bands
) -> None:
    data = (noise(bands, 600, 530, "uint8") // 2).astype(dtype)
    names = tuple(f"b{i}" for i in range(bands))
    source = open_raster(write_tif(data, nodata=1, names=names))
    cog = to_cog(source, tmp_path / "out.tif", blocksize=128, tags={"model": "unet", "exact": "yes"})
    assert valid(cog.name) and np.array_equal(cog.read(), data) and np.array_equal(cog.mask(), source.mask())
    for name in ("shape", "dtype", "crs", "transform", "nodata", "band_names"):
        assert getattr(cog, name) == getattr(source, name)
    assert cog.tags == {"model": "unet", "exact": "yes"} and cog.block_shape == (128, 128)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tif", "scene.tif"]
    with rasterio.open(cog.name) as file:
        assert file.overviews(1) and file.compression.name == "deflate"


@pytest.mark.parametrize("compress", ["deflate", "zstd", "lzw", "none"])
def test_compressions(write_tif, noise, tmp_path, compress: str) -> None:
    data = noise(2, 100, 100, "int16")
    cog = to_cog(open_raster(write_tif(data)), tmp_path / "out.tif", compress=compress)
    assert valid(cog.name) and np.array_equal(cog.read(), data)


def test_classes_keep_their_colours_and_are_not_averaged(tmp_path) -> None:
    colors = {0: (0, 0, 0, 255), 1: (34, 139, 34, 255), 9: (30, 144, 255, 255)}
    classes = np.zeros((1, 700, 700), "uint8")
    classes[:, ::2] = 9
    classes[:, :, 350:] = 1
    writer = create_zarr(tmp_path / "c.zarr", classes.shape, "uint8", nodata=255, colormap=colors)
    writer.write(classes, Window(0, 0, 700, 700))
    cog = to_cog(writer.publish(), tmp_path / "c.tif", blocksize=128)
    assert valid(cog.name) and np.array_equal(cog.read(), classes)
    assert cog.colormap is not None and {k: cog.colormap[k] for k in colors} == colors
    with rasterio.open(cog.name, overview_level=0) as file:
        assert set(np.unique(file.read())) <= {0, 1, 9}
    again = to_zarr(cog, tmp_path / "again.zarr")
    assert again.colormap is not None and again.colormap[9] == colors[9]


def test_masks_stay_masks(write_tif, noise, tmp_path) -> None:
    shown = np.zeros((600, 400), bool)
    shown[100:, 50:200] = True
    source = open_raster(write_tif(noise(3, 600, 400), mask=shown))
    cog = to_cog(source, tmp_path / "m.tif", blocksize=128)
    assert valid(cog.name) and cog.nodata is None and np.array_equal(cog.mask(), shown)
    assert np.array_equal(cog.read(), source.read())
    # With a nodata value given, the mask turns into it.
    cog = to_cog(source, tmp_path / "n.tif", nodata=255)
    assert cog.nodata == 255 and np.array_equal(cog.mask(), shown)


def test_an_area_of_interest_is_cut_out(write_tif, noise, tmp_path) -> None:
    from rasterio.warp import transform_geom

    ring = [[500_000, 4_999_600], [500_400, 4_999_600], [500_000, 5_000_000], [500_000, 4_999_600]]
    area = transform_geom("EPSG:32633", "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
    for nodata in (0, None):
        clipped = open_raster(write_tif(noise(), nodata=nodata), aoi=area)
        for copy in (
            to_cog(clipped, tmp_path / f"{nodata}.tif"),
            to_zarr(clipped, tmp_path / f"{nodata}.zarr"),
        ):
            assert copy.transform == clipped.transform and np.array_equal(copy.mask(), clipped.mask())


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (513, 1), (7, 5)])
def test_tiny_and_thin_rasters(write_tif, noise, tmp_path, size: tuple[int, int]) -> None:
    data = noise(2, *size)
    source = open_raster(write_tif(data))
    assert np.array_equal(to_cog(source, tmp_path / "out.tif").read(), data)
    assert np.array_equal(to_zarr(source, tmp_path / "out.zarr").read(), data)


@pytest.mark.parametrize(
    "transform", [Affine.rotation(20) @ Affine.scale(10, -10), Affine(10, 0, 5, 0, 10, 7), Affine.identity()]
)
def test_any_transform_and_no_crs_survive(write_tif, noise, tmp_path, transform: Affine) -> None:
    source = open_raster(write_tif(noise(1), transform=transform, crs=None))
    store = to_zarr(source, tmp_path / "s.zarr")
    cog = to_cog(store, tmp_path / "s.tif")
    for copy in (store, cog):
        assert copy.crs is None and copy.transform.almost_equals(transform, 1e-9)


def test_near_infrared_is_not_taken_for_alpha(write_tif, noise, tmp_path) -> None:
    cog = to_cog(open_raster(write_tif(noise(4))), tmp_path / "out.tif")
    assert cog.shape[0] == 4 and not cog.has_mask


def test_conversion_rounds_and_clips(write_tif, tmp_path) -> None:
    data = np.array([[[-3.0, 0.4, 0.6, 254.7, 300.0, np.inf, -np.inf, np.nan]]])
    cog = to_cog(open_raster(write_tif(data)), tmp_path / "out.tif", dtype="uint8", nodata=77)
    assert cog.dtype == np.uint8 and cog.read().ravel().tolist() == [0, 0, 1, 255, 255, 255, 0, 77]


@given(
    st.sampled_from(["uint8", "int16", "uint16", "int64", "float32"]),
    st.lists(st.integers(-(2**40), 2**40), min_size=1),
)
def test_converted_integers_are_the_nearest_that_fit(dtype: str, values: list[int]) -> None:
    result = convert(np.asarray(values), np.dtype(dtype)).tolist()
    if dtype == "float32":
        assert result == np.asarray(values, "float32").tolist()
    else:
        info = np.iinfo(dtype)
        assert result == [min(max(value, info.min), info.max) for value in values]


def test_bool_becomes_uint8(tmp_path) -> None:
    with create_zarr(tmp_path / "b.zarr", (1, 8, 8), "bool") as writer:
        writer.write(np.eye(8, dtype=bool)[None], Window(0, 0, 8, 8))
    cog = to_cog(open_raster(tmp_path / "b.zarr"), tmp_path / "b.tif")
    assert cog.dtype == np.uint8 and np.array_equal(cog.read()[0], np.eye(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "can't hold float16"),
        ({"nodata": 300}, "nodata 300 is no uint8 value"),
        ({"band_names": ("a",)}, "1 band names for 3 bands"),
        ({"colormap": {1: (1, 2, 3, 4)}}, "colour table goes with one uint8 or uint16 band, not 3 uint8"),
        ({"blocksize": 100}, "multiples of 16 pixels, got 100"),
        ({"compress": "zip"}, "compress 'zip' is none of"),
        ({"overviews": "magic"}, "overviews 'magic'"),
    ],
)
def test_what_a_cog_cannot_hold_is_refused(write_tif, noise, tmp_path, options: dict, message: str) -> None:
    with pytest.raises(RasterError, match=message):
        to_cog(open_raster(write_tif(noise(3))), tmp_path / "out.tif", **options)
    assert not (tmp_path / "out.tif").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_source_that_breaks_leaves_nothing_behind(write_tif, noise, tmp_path) -> None:
    raster = open_raster(
        write_tif(noise(1, 300, 300), tiled=True, blockxsize=64, blockysize=64, compress="lzw")
    )
    path = tmp_path / "scene.tif"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    path.write_bytes(content)
    for copy in (to_cog, to_zarr):
        with pytest.raises(RasterError, match=r"scene\.tif: can't read"):
            copy(raster, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]


def test_files_that_stand_there_are_replaced_only_when_asked(write_tif, noise, tmp_path) -> None:
    raster = open_raster(write_tif(noise(1)))
    to_cog(raster, tmp_path / "out.tif", tags={"n": "1"})
    with pytest.raises(RasterError, match=r"out\.tif: exists already"):
        to_cog(raster, tmp_path / "out.tif")
    assert to_cog(raster, tmp_path / "out.tif", tags={"n": "2"}, overwrite=True).tags == {"n": "2"}
    with pytest.raises(RasterError, match="doesn't exist"):
        to_cog(raster, tmp_path / "no" / "out.tif")


def test_progress_grows_to_one(write_tif, noise, tmp_path) -> None:
    seen: list[float] = []
    to_cog(open_raster(write_tif(noise(1, 900, 900))), tmp_path / "out.tif", progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 1


def test_unfinished_work_lies_in_a_scratch_folder(write_tif, noise, tmp_path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "out").mkdir()
    seen: list[list[str]] = []

    def look(fraction: float) -> None:
        seen.append([p.name for p in (tmp_path / "out").iterdir()])

    source = open_raster(write_tif(noise(1, 900, 900)))
    to_cog(source, tmp_path / "out" / "a.tif", scratch=tmp_path / "work", progress=look)
    assert seen[:-1] == [[]] * (len(seen) - 1) and seen[-1] == ["a.tif"]
    assert list((tmp_path / "work").iterdir()) == []


def test_missing_pixels_stay_missing_band_by_band_in_another_type(write_tif, tmp_path) -> None:
    data = np.full((2, 40, 50), 7.4, "float32")
    data[0, :3], data[1, 4] = np.nan, -1
    source = open_raster(write_tif(data, nodata=-1))
    cog = to_cog(source, tmp_path / "other.tif", dtype="uint8", nodata=255)
    expected = np.full((2, 40, 50), 7, "uint8")
    expected[0, :3], expected[1, 4] = 255, 255
    assert cog.nodata == 255 and np.array_equal(cog.read(), expected)
    same = to_cog(open_raster(write_tif(data, "255.tif", nodata=255)), tmp_path / "same.tif", dtype="uint8")
    assert (same.read()[0, :3] == 255).all()  # NaN is no data, though 255 was the nodata value all along


@pytest.mark.parametrize(("side", "magic"), [(300, b"II*\0"), (50_000, b"II+\0")])
def test_a_file_that_may_pass_4_gibibytes_is_a_bigtiff(write_tif, noise, tmp_path, side, magic) -> None:
    """Seen in the first bytes of the draft: its 2.5 GB are not written."""
    small = write_tif(noise(1, 64, 64), "small.tif")
    path = tmp_path / "large.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{small}</SourceFilename><SourceBand>1</SourceBand>"
        f'<DstRect xOff="0" yOff="0" xSize="{side}" ySize="{side}"/></SimpleSource></VRTRasterBand>'
        "</VRTDataset>"
    )
    seen = []

    def stop(share: float) -> None:
        (draft,) = tmp_path.glob(".out.tif.*/draft.tif")
        seen.append(draft.read_bytes()[:4])
        raise InterruptedError

    with pytest.raises((InterruptedError, RasterError)):
        to_cog(open_raster(path), tmp_path / "out.tif", progress=stop)
    assert seen == [magic]
    assert not list(tmp_path.glob(".out.tif.*"))
