"""Stacks, resolutions and areas of interest."""

import json

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.transform import from_origin
from rasterio.warp import transform_geom
from rasterio.windows import Window

from tiling import RasterError, open_raster, to_cog, to_zarr

UTM = "EPSG:32633"


def box(left: float, bottom: float, right: float, top: float) -> dict:
    ring = [[left, bottom], [right, bottom], [right, top], [left, top], [left, bottom]]
    return {"type": "Polygon", "coordinates": [ring]}


def in_degrees(geometry: dict) -> dict:
    return transform_geom(UTM, "EPSG:4326", geometry)


# --- stacks -----------------------------------------------------------------------------------------------


def test_single_band_files_on_one_grid_are_stacked(write_tif, noise) -> None:
    data = noise(4)
    paths = [write_tif(data[i : i + 1], f"b0{i}.tif", nodata=0) for i in range(4)]
    raster = open_raster(paths)
    assert raster.shape == (4, 70, 90) and raster.band_names == ("b00", "b01", "b02", "b03")
    assert np.array_equal(raster.read(), data) and np.array_equal(raster.read(bands=[3, "b00"]), data[[2, 0]])
    assert np.array_equal(open_raster(paths, bands=["b03", 1]).read(), data[[3, 0]])
    assert np.array_equal(raster[1:3, 5:9], data[1:3, 5:9])


def test_coarser_bands_come_to_the_finest_grid(write_tif, noise) -> None:
    fine, coarse = noise(1, 60, 80), noise(1, 30, 40)
    paths = [
        write_tif(coarse, "b11.tif", transform=from_origin(500_000, 5_000_000, 20, 20)),
        write_tif(fine, "b02.tif"),
    ]
    raster = open_raster(paths)
    assert raster.shape == (2, 60, 80) and raster.transform.a == 10
    assert np.array_equal(raster.read()[1], fine[0])
    assert np.array_equal(raster.read()[0], coarse[0].repeat(2, axis=0).repeat(2, axis=1))
    window = Window(13, 7, 20, 30)
    assert np.array_equal(raster.read(window), raster.read()[:, *window.toslices()])


def test_dtypes_of_a_stack_are_promoted_and_missing_extent_is_masked(write_tif, noise) -> None:
    whole, half = noise(1, 40, 40), noise(1, 40, 20, "uint16")
    raster = open_raster([write_tif(whole, "a.tif"), write_tif(half, "b.tif")])
    assert raster.dtype == np.uint16 and raster.shape == (2, 40, 40)
    masked = raster.read(masked=True)
    assert np.array_equal(masked.mask[1], np.arange(40)[None].repeat(40, axis=0) >= 20)
    assert not masked.mask[0].any() and raster.mask().all()
    assert np.array_equal(masked.data[1][:, :20], half[0])


def test_a_file_without_crs_cannot_be_stacked_with_one_that_has(write_tif, noise) -> None:
    with pytest.raises(RasterError, match=r"a\.tif.*b\.tif.*CRS"):
        open_raster([write_tif(noise(1), "a.tif"), write_tif(noise(1, 35, 45), "b.tif", crs=None)])


# --- resolution -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_average_to_half_the_resolution(write_tif, noise, tmp_path, kind: str) -> None:
    data = noise(2, 64, 96, "float32")
    path = write_tif(data)
    path = to_zarr(open_raster(path), tmp_path / "s.zarr").name if kind == "zarr" else path
    raster = open_raster(path, resolution=20, resampling="average")
    assert raster.shape == (2, 32, 48) and raster.transform == Affine(20, 0, 500_000, 0, -20, 5_000_000)
    expected = data.reshape(2, 32, 2, 48, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(raster.read(), expected, rtol=1e-5)
    window = Window(11, 5, 20, 13)
    np.testing.assert_allclose(raster.read(window), expected[:, *window.toslices()], rtol=1e-5)


@pytest.mark.parametrize("kind", ["tif", "zarr"])
@pytest.mark.parametrize("resampling", ["nearest", "bilinear", "cubic"])
def test_windows_of_a_resampled_raster_fit_together(
    write_tif, noise, tmp_path, kind: str, resampling: str
) -> None:
    path = write_tif(noise(1, 50, 70, "float64"))
    path = to_zarr(open_raster(path), tmp_path / "s.zarr").name if kind == "zarr" else path
    raster = open_raster(path, resolution=(6.5, 7), resampling=resampling)
    assert raster.shape == (1, 72, 108)  # 500 m / 7 and 700 m / 6.5, rounded up
    whole = raster.read()
    for window in (Window(0, 0, 30, 72), Window(29, 31, 50, 20), Window(100, 60, 8, 12)):
        np.testing.assert_allclose(raster.read(window), whole[:, *window.toslices()], rtol=1e-6)


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
def test_zarr_and_tiff_resample_alike(write_tif, noise, tmp_path, resampling: str) -> None:
    path = write_tif(noise(1, 50, 70, "float32"), nodata=-1.0)
    store = to_zarr(open_raster(path), tmp_path / "s.zarr")
    options = {"resolution": 4.0, "resampling": resampling}
    tiff, zarr = open_raster(path, **options), open_raster(store.name, **options)
    inner = (slice(None), slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(tiff.read()[inner], zarr.read()[inner], rtol=1e-4)
    assert np.array_equal(tiff.mask()[4:-4, 4:-4], zarr.mask()[4:-4, 4:-4])


@pytest.mark.parametrize("shift", [0, 3, -700, 1e5])
def test_a_stack_by_nearest_reaches_beyond_a_file(write_tif, noise, shift: float) -> None:
    """Each pixel is the one of the coarse file that its centre lies in; there is none beyond the file."""
    fine, coarse = noise(1, 40, 60), noise(1, 13, 17)
    paths = [
        write_tif(fine, "fine.tif"),
        write_tif(coarse, "coarse.tif", transform=from_origin(500_000 + shift, 5_000_000 + shift, 30, 30)),
    ]
    read = open_raster(paths).read(masked=True)
    for row in range(40):
        for column in range(60):
            x, y = 500_000 + 10 * (column + 0.5), 5_000_000 - 10 * (row + 0.5)
            i, j = int((5_000_000 + shift - y) // 30), int((x - 500_000 - shift) // 30)
            if 0 <= i < 13 and 0 <= j < 17:
                assert read[1, row, column] == coarse[0, i, j]
            else:
                assert np.ma.getmaskarray(read)[1, row, column]


def test_resampling_keeps_nodata_apart(write_tif, noise) -> None:
    data = noise(1, 40, 40)
    data[:, :, :20] = 0
    raster = open_raster(write_tif(data, nodata=0), resolution=20, resampling="average")
    assert raster.nodata == 0
    assert np.array_equal(raster.mask(), np.arange(20)[None].repeat(20, axis=0) >= 10)


def test_rasters_without_crs_or_turned_on_end_are_resampled_too(write_tif, noise) -> None:
    data = noise(1, 40, 60)
    plain = open_raster(write_tif(data, crs=None), resolution=20)
    assert plain.shape == (1, 20, 30) and plain.crs is None and plain.read().any()
    up = open_raster(write_tif(data, transform=Affine(10, 0, 5e5, 0, 10, 5e6)), resolution=5)
    assert up.shape == (1, 80, 120) and up.transform.e == 5
    assert np.array_equal(up.read(), data.repeat(2, axis=1).repeat(2, axis=2))


def test_the_same_resolution_changes_nothing(write_tif, noise) -> None:
    data = noise()
    assert np.array_equal(open_raster(write_tif(data), resolution=10).read(), data)


# --- area of interest -------------------------------------------------------------------------------------


def test_an_area_in_degrees_clips_to_the_pixels_it_covers(write_tif, noise) -> None:
    data = noise(2)
    geometry = in_degrees(box(500_103, 4_999_503, 500_296, 4_999_896))
    raster = open_raster(write_tif(data), aoi=geometry)
    assert raster.shape == (2, 40, 20)  # rows 10 to 50, columns 10 to 30
    assert raster.transform == Affine(10, 0, 500_100, 0, -10, 4_999_900)
    assert np.array_equal(raster.read(), data[:, 10:50, 10:30]) and np.array_equal(
        raster[0, 3], data[0, 13, 10:30]
    )
    assert raster.mask().all() and raster.has_mask


def test_pixels_whose_centre_lies_outside_are_masked(write_tif, noise) -> None:
    corner = {
        "type": "Polygon",
        "coordinates": [[[500_000, 4_999_600], [500_400, 4_999_600], [500_000, 5_000_000]]],
    }
    corner["coordinates"][0].append(corner["coordinates"][0][0])
    raster = open_raster(write_tif(noise(), nodata=0), aoi=in_degrees(corner))
    x, y = np.meshgrid(np.arange(raster.width) + 0.5, np.arange(raster.height) + 0.5)
    mask, edge = raster.mask(), np.abs(x - y) < 1  # centres on the very diagonal may fall on either side
    assert raster.shape[1:] == (40, 40) and np.array_equal(mask[~edge], (x < y)[~edge])
    window = Window(5, 7, 20, 13)
    assert np.array_equal(raster.mask(window), mask[window.toslices()])
    assert np.array_equal(np.ma.getmaskarray(raster.read(window, masked=True))[0], ~mask[window.toslices()])


def test_areas_come_as_files_text_features_collections_and_other_crs(write_tif, noise, tmp_path) -> None:
    path, utm = write_tif(noise()), box(500_100, 4_999_500, 500_300, 4_999_900)
    geometry = in_degrees(utm)
    feature = {"type": "Feature", "properties": {}, "geometry": geometry}
    collection = {"type": "FeatureCollection", "features": [feature]}
    file = tmp_path / "area.geojson"
    file.write_text(json.dumps(collection))
    named = utm | {"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}}
    group = {"type": "GeometryCollection", "geometries": [geometry]}
    multi = {"type": "MultiPolygon", "coordinates": [geometry["coordinates"]]}
    for aoi in (geometry, feature, collection, file, str(file), json.dumps(feature), named, group, multi):
        assert open_raster(path, aoi=aoi).shape == (3, 40, 20)


def test_area_and_resolution_together_on_zarr(write_tif, noise, tmp_path) -> None:
    store = to_zarr(open_raster(write_tif(noise(1, 80, 80))), tmp_path / "s.zarr")
    raster = open_raster(
        store.name, resolution=20, aoi=in_degrees(box(500_100, 4_999_500, 500_300, 4_999_900))
    )
    assert raster.shape == (1, 20, 10) and raster.bounds == (500_100, 4_999_500, 500_300, 4_999_900)
    assert np.array_equal(raster.read(), open_raster(store.name, resolution=20)[:, 5:25, 5:15])


@pytest.mark.parametrize(
    ("aoi", "message"),
    [
        (box(0, 0, 1, 1), "doesn't meet the raster"),
        ({"type": "Point", "coordinates": [0, 0]}, "polygons, not of 'Point'"),
        ({"type": "FeatureCollection", "features": []}, "no polygon"),
        ('{"type": "Polygon", ', "not GeoJSON"),
        ("missing.geojson", r"missing\.geojson: can't read"),
        (box(0, 0, 1, 1) | {"crs": {"properties": {"name": "EPSG:0"}}}, "unknown CRS 'EPSG:0'"),
    ],
)
def test_areas_that_make_no_sense_are_refused(write_tif, noise, aoi: dict | str, message: str) -> None:
    with pytest.raises(RasterError, match=message):
        open_raster(write_tif(noise()), aoi=aoi)


def test_an_area_needs_a_crs_to_be_placed(write_tif, noise) -> None:
    with pytest.raises(RasterError, match=r"scene\.tif: has no CRS"):
        open_raster(write_tif(noise(), crs=None), aoi=box(0, 0, 1, 1))


# --- real files -------------------------------------------------------------------------------------------


def test_real_files_read_as_rasterio_reads_them(shared_data) -> None:
    for path in sorted((shared_data / "rasters").glob("*.tif")):
        raster = open_raster(path)
        window = Window(raster.width // 3, raster.height // 3, 200, 150)
        with rasterio.open(path) as file:
            assert raster.shape == (file.count, file.height, file.width) and raster.crs == file.crs
            assert np.array_equal(raster.read(window), file.read(window=window))
            assert np.array_equal(raster.mask(window), file.dataset_mask(window=window) > 0)


def test_all_naip_dates_stack_on_one_grid(shared_data) -> None:
    paths = sorted((shared_data / "rasters" / "naip").glob("*.tif"))
    raster = open_raster(paths, resampling="bilinear")
    assert raster.shape[0] == 4 * len(paths) and raster.read(Window(100, 100, 50, 50)).min() > 0


def test_coarse_views_of_a_store_read_its_pyramid(write_tif, noise, tmp_path) -> None:
    store = to_zarr(open_raster(write_tif(noise(2, 1100, 900))), tmp_path / "s.zarr", chunk=128)
    view = open_raster(store.name, resolution=40, resampling="average")
    assert view.shape == (2, 275, 225) and view.transform.a == 40
    import zarr

    assert np.array_equal(view.read(), zarr.open_array(f"{store.name}/2", mode="r")[:])
    # Three times as coarse: from the level that is twice as coarse.
    third = open_raster(store.name, resolution=30, resampling="average").read().astype(float)
    exact = store.read()[:, :1098].reshape(2, 366, 3, 300, 3).mean(axis=(2, 4))
    assert np.abs(third[:, :366] - exact).mean() < 12 and np.abs((third[:, :366] - exact).mean()) < 0.5


def test_nearest_pixels_of_a_store_are_pixels_of_it_and_not_averages(write_tif, tmp_path) -> None:
    classes = np.random.default_rng(0).choice([0, 9], (1, 1024, 1024)).astype("uint8")
    store = to_zarr(open_raster(write_tif(classes)), tmp_path / "s.zarr")  # its pyramid averages
    assert set(np.unique(open_raster(store.name, resolution=40).read())) == {0, 9}
    assert set(np.unique(open_raster(store.name, resolution=40, resampling="mode").read())) == {0, 9}


def test_resampling_piece_by_piece_gives_the_same(write_tif, noise, tmp_path, monkeypatch) -> None:
    store = to_zarr(open_raster(write_tif(noise(2, 120, 90))), tmp_path / "s.zarr")
    raster = open_raster(store.name, resolution=15, resampling="bilinear")
    whole, mask = raster.read(), raster.mask()
    monkeypatch.setattr("tiling.resample._MOST_PIXELS", 2000)
    assert np.array_equal(raster.read(), whole) and np.array_equal(raster.mask(), mask)


@pytest.mark.parametrize("write", [to_zarr, to_cog])
def test_bands_with_nodata_values_of_their_own_stay_missing_in_a_copy(
    write_tif, noise, tmp_path, write
) -> None:
    """One file says 0, the other 255: no missing pixel turns into data, and none the other way."""
    first, second = noise(1, 40, 50), noise(1, 40, 50)[:, ::-1]
    first[0, :3], second[0, 5:9] = 0, 255
    stack = open_raster([write_tif(first, "a.tif", nodata=0), write_tif(second, "b.tif", nodata=255)])
    missing = np.ma.getmaskarray(stack.read(masked=True))
    assert missing[0, :3].all() and missing[1, 5:9].all() and missing.sum() == 7 * 50
    copy = write(stack, tmp_path / "copy.tif")
    assert stack.nodata is None and copy.nodata == (0 if write is to_cog else None)
    assert np.array_equal(np.ma.getmaskarray(copy.read(masked=True)), missing)
    assert np.array_equal(copy.read()[~missing], stack.read()[~missing])


def test_a_band_that_ends_earlier_is_missing_there_in_a_copy(write_tif, noise, tmp_path) -> None:
    """The second file covers the left half only; without a nodata value of its own its rest isn't 0."""
    whole, half = noise(1, 40, 50, "int16"), noise(1, 40, 25, "int16")
    stack = open_raster([write_tif(whole, "a.tif", nodata=-1), write_tif(half, "b.tif")])
    for copy in (to_zarr(stack, tmp_path / "copy.zarr"), to_cog(stack, tmp_path / "copy.tif")):
        shown = ~np.ma.getmaskarray(copy.read(masked=True))
        assert shown[0].all() and shown[1, :, :25].all() and not shown[1, :, 25:].any()


def test_a_stack_has_a_nodata_value_only_where_it_is_that_of_every_band(write_tif, noise) -> None:
    zero, one, none = (write_tif(noise(1), f"{nodata}.tif", nodata=nodata) for nodata in (0, 1, None))
    wide = write_tif(noise(1, dtype="int16"), "wide.tif", nodata=0)
    assert open_raster([zero, wide]).nodata == 0 and not open_raster([zero, wide]).has_mask
    for paths in ([zero, one], [zero, none], [none, zero]):
        assert open_raster(paths).nodata is None and open_raster(paths).has_mask
    assert open_raster([zero, one]).select(bands=[2]).nodata == 1


@pytest.mark.parametrize(
    "coordinates",
    [None, [], [[]], [[[15, 45], [16, 45], [15, 45]]], [[["a", "b"]] * 4], 5, [[[15, float("nan")]] * 4]],
)
def test_a_polygon_without_rings_is_named(write_tif, noise, coordinates) -> None:
    aoi = {"type": "Polygon", "coordinates": coordinates}
    with pytest.raises(RasterError, match="no rings of at least four points"):
        open_raster(write_tif(noise()), aoi=aoi)


def test_an_area_as_large_as_the_world_takes_all_of_a_raster(write_tif, noise) -> None:
    raster = open_raster(write_tif(noise()), aoi=box(-180, -90, 180, 90))
    assert raster.shape == (3, 70, 90) and raster.mask().all()


def test_a_large_area_with_a_hole_keeps_its_hole(write_tif, noise) -> None:
    """A continent with a hole inside the raster: cut near the raster, the hole is that of a small area."""
    around, hole = box(0, 30, 40, 60), in_degrees(box(500_200, 4_999_600, 500_400, 4_999_800))
    ring = hole["coordinates"][0]
    raster = open_raster(
        write_tif(noise()), aoi={"type": "Polygon", "coordinates": [around["coordinates"][0], ring]}
    )
    shown = np.ones((70, 90), bool)
    shown[20:40, 20:40] = False
    assert np.array_equal(raster.mask(), shown)


def test_an_area_on_the_other_side_of_the_world_meets_nothing(write_tif, noise) -> None:
    with pytest.raises(RasterError, match="doesn't meet the raster"):
        open_raster(write_tif(noise()), aoi=box(-170, -40, -160, -30))
