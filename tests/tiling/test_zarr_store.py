import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import zarr
import zarr_cm
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.windows import Window

from tiling import RasterError, ZarrWriter, build_pyramid, create_zarr, open_raster, resume_zarr, to_zarr
from tiling.pyramid import halve, level_sizes

UTM = Affine(10, 0, 500_000, 0, -10, 5_000_000)


def test_a_raster_comes_back_whole(write_tif, noise, tmp_path) -> None:
    data = noise(4, 300, 500, "uint16")
    data[:, :50, :60] = 0
    raster = open_raster(write_tif(data, nodata=0, names=("r", "g", "b", "nir")))
    store = to_zarr(raster, tmp_path / "scene.zarr", chunk=64, shard=128, tags={"model": "x"})
    assert np.array_equal(store.read(), data) and np.array_equal(store.mask(), raster.mask())
    for name in ("shape", "dtype", "crs", "transform", "nodata", "band_names", "bounds"):
        assert getattr(store, name) == getattr(raster, name)
    assert store.block_shape == (64, 64) and store.tags == {"model": "x"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.tif", "scene.zarr"]


def test_stores_are_zarr_v3_sharded_and_follow_the_conventions(write_tif, noise, tmp_path) -> None:
    store = to_zarr(open_raster(write_tif(noise(3, 600, 900))), tmp_path / "s.zarr", chunk=128, shard=256)
    group = zarr.open_group(store.name, mode="r")
    assert group.metadata.zarr_format == 3
    assert (group["0"].chunks, group["0"].shards) == ((3, 128, 128), (3, 256, 256))
    assert group["0"].metadata.dimension_names == ("band", "y", "x")
    attributes = json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())["attributes"]
    found = zarr_cm.detect_revisions(attributes)
    assert set(found) == {"proj", "spatial", "multiscales"} and None not in found.values()
    zarr_cm.validate_all(attributes)
    for level in ("0", "1", "2"):
        node = json.loads((tmp_path / "s.zarr" / level / "zarr.json").read_text())
        zarr_cm.spatial.validate_array_metadata(node)
        zarr_cm.proj.validate_array_metadata(node)
    assert attributes["proj:code"] == "EPSG:32633"
    assert attributes["spatial:transform"] == [10, 0, 500_000, 0, -10, 5_000_000]
    layout = attributes["multiscales"]["layout"]
    assert [item["asset"] for item in layout] == ["0", "1", "2"]
    assert [item["spatial:shape"] for item in layout] == [[600, 900], [300, 450], [150, 225]]
    assert layout[2]["derived_from"] == "1" and layout[2]["transform"]["scale"] == [2, 2]
    assert layout[2]["spatial:transform"] == [40, 0, 500_000, 0, -40, 5_000_000]


def test_a_crs_without_a_code_is_kept_as_wkt(tmp_path) -> None:
    crs = "+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84"
    with create_zarr(tmp_path / "a.zarr", (1, 4, 4), "uint8", crs=crs) as writer:
        writer.write(np.ones((1, 4, 4), "uint8"), Window(0, 0, 4, 4))
    raster = open_raster(tmp_path / "a.zarr")
    assert raster.crs is not None and raster.crs.to_dict()["proj"] == "laea"


def _fill(work: tuple[ZarrWriter, int]) -> None:
    writer, index = work
    tile = writer.grid()[index]
    writer.write(np.full((2, *tile.shape), index + 1, "uint8"), tile.core)


def test_several_processes_fill_one_store(tmp_path) -> None:
    writer = create_zarr(tmp_path / "a.zarr", (2, 300, 200), "uint8", chunk=32, shard=64)
    assert not (tmp_path / "a.zarr").exists()
    count = len(writer.grid())
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_fill, [(writer, index) for index in range(count)]))
    raster = writer.publish()
    expected = np.zeros((300, 200), "uint8")
    for tile in writer.grid():
        expected[tile.core.toslices()] = tile.index + 1
    assert np.array_equal(raster.read(), np.stack([expected, expected]))


def test_every_shard_is_one_file_and_one_tile(tmp_path) -> None:
    writer = create_zarr(tmp_path / "a.zarr", (1, 100, 130), "uint8", chunk=16, shard=(32, 64))
    for number, tile in enumerate(writer.grid(), 1):
        writer.write(np.ones((1, *tile.shape), "uint8"), tile.core)
        files = [p for p in (writer.staging / "0" / "c").rglob("*") if p.is_file()]
        assert len(files) == number


def test_windows_that_cut_a_shard_are_refused(tmp_path) -> None:
    writer = create_zarr(tmp_path / "a.zarr", (1, 100, 100), "uint8", chunk=32, shard=64)
    for window in (
        Window(0, 0, 32, 64),
        Window(32, 0, 64, 64),
        Window(0, 64, 64, 32),
        Window(64, 64, 64, 64),
    ):
        with pytest.raises(RasterError, match=r"a\.zarr.*whole shards of 64 x 64"):
            writer.write(np.ones((1, window.height, window.width), "uint8"), window)
    writer.write(np.ones((1, 36, 36), "uint8"), Window(64, 64, 36, 36))


def test_wrong_shapes_and_lossy_dtypes_are_refused(tmp_path) -> None:
    writer = create_zarr(tmp_path / "a.zarr", (1, 10, 10), "uint8")
    with pytest.raises(RasterError, match=r"got \(2, 10, 10\)"):
        writer.write(np.ones((2, 10, 10), "uint8"), Window(0, 0, 10, 10))
    for dtype in ("int64", "float32", "uint16"):
        with pytest.raises(RasterError, match=f"{dtype} pixels would lose values as uint8"):
            writer.write(np.ones((1, 10, 10), dtype), Window(0, 0, 10, 10))


def test_full_width_shards_for_bands_of_rows(tmp_path) -> None:
    writer = create_zarr(tmp_path / "a.zarr", (1, 1000, 333), "uint8", chunk=64, shard=(128, 333))
    grid = writer.grid(tile=(200, 333), halo=10, align=32)
    assert grid.tile[0] == 256 and grid.shape == (4, 1)  # rounded up to whole shards
    for tile in grid:
        writer.write(np.ones((1, *tile.shape), "uint8"), tile.core)


def test_unwritten_pixels_are_nodata(tmp_path) -> None:
    with create_zarr(
        tmp_path / "a.zarr", (1, 40, 40), "float32", nodata=np.nan, chunk=16, shard=16
    ) as writer:
        writer.write(np.ones((1, 16, 16), "float32"), Window(0, 0, 16, 16))
    raster = open_raster(tmp_path / "a.zarr")
    assert np.isnan(raster.nodata) and raster.mask().sum() == 256


def test_masks_are_kept_by_nodata_or_by_a_mask_of_their_own(write_tif, noise, tmp_path) -> None:
    shown = np.zeros((400, 300), bool)
    shown[100:, 50:200] = True
    raster = open_raster(write_tif(noise(3, 400, 300), mask=shown))
    store = to_zarr(raster, tmp_path / "m.zarr", chunk=64, shard=128)
    assert store.nodata is None and store.has_mask and np.array_equal(store.mask(), shown)
    assert np.array_equal(store.read(), raster.read())
    coarse = zarr.open_array(tmp_path / "m.zarr" / "mask" / "1", mode="r")
    assert np.array_equal(coarse[:], shown[::2, ::2])
    again = to_zarr(store, tmp_path / "again.zarr")
    assert np.array_equal(again.mask(), shown)


def test_a_failed_block_leaves_nothing_behind(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), create_zarr(tmp_path / "a.zarr", (1, 4, 4), "uint8"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_replaced_only_when_asked_and_complete(write_tif, noise, tmp_path) -> None:
    raster = open_raster(write_tif(noise(1)))
    to_zarr(raster, tmp_path / "a.zarr", tags={"n": "1"})
    with pytest.raises(RasterError, match=r"a\.zarr: exists already"):
        to_zarr(raster, tmp_path / "a.zarr")
    writer = create_zarr(tmp_path / "a.zarr", (1, 4, 4), "uint8", overwrite=True)
    assert open_raster(tmp_path / "a.zarr").tags == {"n": "1"}  # until the new one is complete
    writer.publish(tags={"n": "2"})
    assert open_raster(tmp_path / "a.zarr").tags == {"n": "2"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "scene.tif"]


def test_an_interrupted_store_goes_on_under_a_known_name(tmp_path) -> None:
    place = tmp_path / "work"
    first = create_zarr(
        tmp_path / "a.zarr", (1, 64, 64), "uint8", chunk=32, shard=32, staging=place, nodata=9
    )
    first.write(np.ones((1, 32, 32), "uint8"), Window(0, 0, 32, 32))
    with pytest.raises(RasterError, match="resume_zarr"):
        create_zarr(tmp_path / "a.zarr", (1, 64, 64), "uint8", staging=place)
    second = resume_zarr(tmp_path / "a.zarr", place)
    assert second.shard == (32, 32) and second.profile.nodata == 9
    assert np.array_equal(second.read(Window(0, 0, 64, 32))[0, 0], [1] * 32 + [9] * 32)
    assert np.array_equal(second.raster().read(), second.read(Window(0, 0, 64, 64)))
    second.publish()
    assert open_raster(tmp_path / "a.zarr").mask().sum() == 1024 and not place.exists()


def test_writers_are_pickled_without_their_arrays(tmp_path) -> None:
    writer = create_zarr(tmp_path / "a.zarr", (1, 16, 16), "uint8")
    writer.write(np.ones((1, 16, 16), "uint8"), Window(0, 0, 16, 16))
    copy = pickle.loads(pickle.dumps(writer))
    assert copy == writer and len(pickle.dumps(writer)) < 5000
    assert copy.read(Window(0, 0, 16, 16)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (1, 0, 4)}, r"shape \(1, 0, 4\)"),
        ({"nodata": 256}, "nodata 256 is no uint8 value"),
        ({"nodata": 0.5}, "nodata 0.5 is no uint8 value"),
        ({"nodata": float("nan")}, "nodata nan is no uint8 value"),
        ({"band_names": ("a", "b")}, "2 band names for 1 bands"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"shard": (0, 4)}, "shard must be at least 1"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path, arguments: dict, message: str
) -> None:
    with pytest.raises(RasterError, match=message):
        create_zarr(tmp_path / "a.zarr", **({"shape": (1, 4, 4), "dtype": "uint8"} | arguments))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_there_are_named(tmp_path) -> None:
    with pytest.raises(RasterError, match=r"the folder .*nowhere doesn't exist"):
        create_zarr(tmp_path / "nowhere" / "a.zarr", (1, 4, 4), "uint8")


# --- plain zarr arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
def test_plain_arrays_with_proj_and_spatial_attributes(tmp_path, noise, flat: bool) -> None:
    data = noise(2, 40, 50)
    stored = data[0] if flat else data
    array = zarr.create_array(tmp_path / "p.zarr", shape=stored.shape, chunks=stored.shape, dtype="uint8")
    array[:] = stored
    array.attrs.update({"proj:code": "EPSG:32633", "spatial:transform": list(UTM[:6]), "nodata": 7})
    raster = open_raster(tmp_path / "p.zarr")
    assert raster.crs.to_epsg() == 32633 and raster.transform == UTM and raster.nodata == 7
    assert np.array_equal(raster.read(), data[:1] if flat else data)
    assert np.array_equal(raster.read(bands=[1, 1], window=Window(3, 4, 5, 6)), data[[0, 0], 4:10, 3:8])


def test_arrays_without_attributes_are_rasters_without_crs(tmp_path) -> None:
    zarr.create_array(tmp_path / "p.zarr", shape=(5, 6), chunks=(5, 6), dtype="float32")
    raster = open_raster(tmp_path / "p.zarr")
    assert raster.shape == (1, 5, 6) and raster.crs is None and raster.transform == Affine.identity()


@pytest.mark.parametrize(
    ("shape", "dtype", "attributes", "message"),
    [
        ((4,), "uint8", {}, "2 or 3 axes, this array has 1"),
        ((4, 4), "complex64", {}, r"complex pixels \(complex64\)"),
        ((4, 4), "uint8", {"proj:code": "EPSG:0"}, "proj:code is no CRS: 'EPSG:0'"),
        ((4, 4), "uint8", {"spatial:transform": [1, 2]}, "six numbers"),
        ((4, 4), "uint8", {"spatial:dimensions": ["y", "x"], "_ARRAY_DIMENSIONS": ["x", "y"]}, "last axes"),
    ],
)
def test_arrays_that_are_no_rasters(tmp_path, shape, dtype, attributes: dict, message: str) -> None:
    array = zarr.create_array(tmp_path / "p.zarr", shape=shape, chunks=shape, dtype=dtype)
    array.attrs.update(attributes)
    with pytest.raises(RasterError, match=message):
        open_raster(tmp_path / "p.zarr")


def test_a_damaged_store_is_named(tmp_path) -> None:
    (tmp_path / "p.zarr").mkdir()
    (tmp_path / "p.zarr" / "zarr.json").write_text("{")
    with pytest.raises(RasterError, match=r"p\.zarr: not a zarr store"):
        open_raster(tmp_path / "p.zarr")


# --- pyramids ---------------------------------------------------------------------------------------------


def slow_halve(data: np.ndarray, valid: np.ndarray, method: str, nodata: float) -> np.ndarray:
    """A loop over output pixels."""
    bands, height, width = data.shape
    out = np.full((bands, -(-height // 2), -(-width // 2)), nodata, data.dtype)
    for band, row, column in np.ndindex(*out.shape):
        block = (band, slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        values = data[block][valid[block]]
        if method == "nearest":
            if valid[band, 2 * row, 2 * column]:
                out[band, row, column] = data[band, 2 * row, 2 * column]
        elif values.size and method == "average":
            out[band, row, column] = np.rint(values.mean())
        elif values.size:
            # An odd edge's pixels stand for themselves twice, which changes no vote.
            out[band, row, column] = max(values, key=list(values).count)
    return out


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["nearest", "average", "mode"]),
    st.integers(0, 2**32 - 1),
)
def test_halving_matches_a_loop_over_pixels(shape: tuple[int, int, int], method: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    data = (
        random.integers(0, 4, shape).astype("uint8") * 8
    )  # multiples of 8: means are never ties of rounding
    valid = random.random(shape) < 0.7
    out, some = halve(data, valid, method, 99)
    assert np.array_equal(out, slow_halve(data, valid, method, 99))
    assert np.array_equal(some, out != 99)


@pytest.mark.parametrize("method", ["nearest", "average", "mode"])
def test_levels_built_shard_by_shard_are_those_built_whole(tmp_path, noise, method: str) -> None:
    data = noise(2, 601, 777)
    data[:, 100:300, 200:500] = 0
    writer = create_zarr(tmp_path / "a.zarr", data.shape, "uint8", nodata=0, chunk=64, shard=128)
    for tile in writer.grid():
        writer.write(data[:, *tile.core.toslices()], tile.core)
    seen: list[tuple[int, int]] = []
    raster = writer.publish(pyramid=method, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and seen
    group, valid = zarr.open_group(raster.name, mode="r"), data != 0
    for level in ("1", "2"):
        data, valid = halve(data, valid, method, 0)
        assert np.array_equal(group[level][:], data)
    assert level_sizes(601, 777) == [(601, 777), (301, 389), (151, 195)] and "3" not in group


def test_auto_votes_on_classes_and_averages_images(tmp_path) -> None:
    for colormap, expected in (({1: (255, 0, 0, 255)}, 1), (None, 2)):
        writer = create_zarr(tmp_path / "a.zarr", (1, 512, 512), "uint8", colormap=colormap, overwrite=True)
        data = np.ones((1, 512, 512), "uint8")
        data[:, ::2, ::2] = 5  # one of four
        writer.write(data, Window(0, 0, 512, 512))
        raster = writer.publish()
        assert (zarr.open_array(f"{raster.name}/1", mode="r")[:] == expected).all()
        assert open_raster(raster.name).colormap == colormap


def test_a_pyramid_can_be_built_again_and_unknown_methods_are_refused(write_tif, noise, tmp_path) -> None:
    store = to_zarr(open_raster(write_tif(noise(1, 300, 300))), tmp_path / "a.zarr", pyramid=None)
    assert "1" not in zarr.open_group(store.name, mode="r")
    assert build_pyramid(store.name) == 2 and build_pyramid(store.name, method="nearest") == 2
    assert np.array_equal(zarr.open_array(f"{store.name}/1", mode="r")[:], store.read()[:, ::2, ::2])
    with pytest.raises(RasterError, match="'cubic' is none of average, nearest, mode"):
        build_pyramid(store.name, method="cubic")


def test_xarray_opens_the_store(write_tif, noise, tmp_path) -> None:
    import xarray

    data = noise(2)
    store = to_zarr(open_raster(write_tif(data)), tmp_path / "a.zarr")
    opened = xarray.open_zarr(store.name, consolidated=False)
    assert np.array_equal(opened["0"].values, data)


def test_shards_torn_by_a_kill_are_not_published(tmp_path) -> None:
    writer = create_zarr(tmp_path / "a.zarr", (1, 8, 8), "uint8")
    writer.write(np.ones((1, 8, 8), "uint8"), Window(0, 0, 8, 8))
    (writer.staging / "0" / "c" / "0.abc.partial").touch()
    writer.publish()
    assert not list((tmp_path / "a.zarr").rglob("*.partial"))
