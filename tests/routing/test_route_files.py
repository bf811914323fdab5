"""ROUTE.toml, records of decisions, and grids that are shifted."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.warp import Resampling, reproject
from rasterio.windows import Window

from bigvision.routing.grids import GridError, check_same_grid, grid_shift, resampled, under
from bigvision.routing.record import RouteRecord, load_record, route_summary
from bigvision.routing.route_file import RouteSpec, load_route, read_route, write_route
from tiling import Raster, open_raster

GOOD = 'region = 64\ngate = "margin"\nbudget = 0.1\n[cheap]\nmodel = "a.b:c"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "ROUTE.toml"
    path.write_text(text)
    return path


def test_a_route_is_read_with_paths_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "g.safetensors").touch()
    text = (
        'gate = "learned"\n[cheap]\nmodel = "a.b:c"\nweights = "w.safetensors"\n'
        '[learned]\nweights = "g.safetensors"\n'
    )
    spec = load_route(write(tmp_path, text))
    assert spec == RouteSpec(
        "a.b:c", tmp_path / "w.safetensors", gate="learned", gate_weights=tmp_path / "g.safetensors"
    )
    assert load_route(write(tmp_path, GOOD)) == RouteSpec("a.b:c", region=64, gate="margin", budget=0.1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("0.1", "1.5"), ["budget", "0..1", "1.5"]),
        (GOOD.replace("0.1", '"much"'), ["budget", "'much'"]),
        (GOOD.replace("64", "0"), ["region", "0"]),
        (GOOD.replace("64", "64.5"), ["region", "64.5"]),
        (GOOD.replace("margin", "guess"), ["'guess'", "entropy, margin, learned"]),
        (GOOD.replace("margin", "learned"), ["'learned'", "weights"]),
        (GOOD.replace("[cheap]", "threshold = -0.5\n[cheap]"), ["threshold", "-0.5"]),
        (GOOD.replace("budget", "bugdet"), ["bugdet", "budget"]),
        (GOOD.replace("model", "network"), ["[cheap]", "network"]),
        (GOOD + 'weights = "none.safetensors"\n', ["none.safetensors"]),
        ("region = [", ["not a TOML file"]),
        ("cheap = 3", ["[cheap]", "3"]),
        ("region = 64", ["model is missing"]),
    ],
)
def test_a_bad_route_is_refused_with_file_and_value(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        load_route(write(tmp_path, text))
    assert all(word in str(refusal.value) for word in ["ROUTE.toml", *words]), refusal.value


def test_a_gate_still_to_be_trained_is_read_but_not_routed_by(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("margin", "learned"))
    assert read_route(path) == RouteSpec("a.b:c", region=64, gate="learned", budget=0.1)
    with pytest.raises(ValueError, match=r"ROUTE\.toml.*train --route"):
        load_route(path)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 9999), st.floats(0, 1),
    st.none() | st.floats(0, 1), st.booleans(),
)  # fmt: skip
def test_a_written_route_reads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    region: int,
    budget: float,
    threshold: float | None,
    learned: bool,
) -> None:
    folder = tmp_path_factory.mktemp("route")
    (folder / "gate.safetensors").touch()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "w.safetensors"
    elsewhere.touch()
    spec = RouteSpec(model, elsewhere, region, "margin", budget, threshold)
    if learned:
        spec = replace(spec, gate="learned", gate_weights=folder / "gate.safetensors")
    write_route(spec, folder / "ROUTE.toml", folder=folder)
    assert load_route(folder / "ROUTE.toml") == spec
    assert not learned or '"gate.safetensors"' in (folder / "ROUTE.toml").read_text()


def test_a_missing_route_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.toml: can't be read"):
        load_route(tmp_path / "nothing.toml")


def record(expert: list[list[int]]) -> RouteRecord:
    grid = np.array(expert, np.int16)
    transform = Affine(5.0, 0, 100.0, 0, -5.0, 900.0)
    return RouteRecord(
        grid,
        grid.astype(np.float32) / 4,
        ("cheap", "full"),
        16,
        (20, 40),
        transform,
        CRS.from_epsg(26914),
        "me",
    )


def test_a_record_is_georeferenced_and_comes_back(tmp_path: Path) -> None:
    one = record([[0, 1, -1], [1, 0, 0]])
    one.save(tmp_path / "route.tif")
    back = load_record(tmp_path / "route.tif")
    assert np.array_equal(back.expert, one.expert) and np.allclose(back.score, one.score)
    assert (back.names, back.region, back.size, back.made_by) == (one.names, 16, (20, 40), "me")
    assert back.crs == one.crs and back.transform == one.transform
    with rasterio.open(tmp_path / "route.tif") as file:
        assert file.xy(0, 0) == (140.0, 860.0)  # the centre of a region of 16 pixels of 5 m
        assert file.descriptions == ("expert", "score")
    one.picture(tmp_path / "route.png", scale=4)
    with rasterio.open(tmp_path / "route.png") as file:
        assert file.shape == (8, 12) and (file.read()[:, 0, 8] == 0).all()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["route.png", "route.tif"]
    assert route_summary(one) == "6 regions of 16 px: cheap 3 (50%), full 2 (33%), nodata 1 (17%)"


def test_a_changed_route_makes_stale_just_what_goes_elsewhere() -> None:
    before, after = record([[0, 1, -1], [1, 0, 0]]), record([[0, 0, -1], [1, 1, 0]])
    assert before.stale(after).tolist() == [[False, True, False], [False, True, False]]
    other = RouteRecord(before.expert, before.score, ("cheap", "dear"), 16, (20, 40))
    with pytest.raises(ValueError, match=r"'full'.*'dear'"):
        before.stale(other)


def test_records_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    grid = np.zeros((2, 2), np.int16)
    with pytest.raises(ValueError, match=r"2 x 3.*\(2, 2\)"):
        RouteRecord(grid, grid.astype(np.float32), ("a",), 16, (20, 40))
    with pytest.raises(ValueError, match=r"-1\.\.0.*7"):
        RouteRecord(grid + 7, grid.astype(np.float32), ("a",), 16, (20, 20))
    (tmp_path / "no.tif").write_text("no")
    with pytest.raises(ValueError, match=r"no\.tif is no route"):
        load_record(tmp_path / "no.tif")


def raster(path: Path, left: float, top: float, size: float = 5.0, epsg: int = 26914) -> Raster:
    data = np.arange(80, dtype=np.uint8).reshape(1, 8, 10)
    with rasterio.open(
        path, "w", driver="GTiff", height=8, width=10, count=1, dtype="uint8", crs=CRS.from_epsg(epsg),
        transform=Affine(size, 0, left, 0, -size, top),
    ) as file:  # fmt: skip
        file.write(data)
    return open_raster(path)


def test_shifted_grids_are_refused_with_the_shift_and_resampled_when_asked(tmp_path: Path) -> None:
    one = raster(tmp_path / "a.tif", 100, 900)
    check_same_grid(one, raster(tmp_path / "same.tif", 100, 900))
    other = raster(tmp_path / "b.tif", 102, 897)
    assert grid_shift(other, one) == pytest.approx((0.4, 0.6))
    with pytest.raises(GridError, match=r"0\.4 columns and 0\.6 rows \(2 and -3"):
        check_same_grid(other, one)
    with pytest.raises(GridError, match=r"5 x -5.*10 x -10"):
        check_same_grid(one, raster(tmp_path / "c.tif", 100, 900, 10.0))
    with pytest.raises(GridError, match=r"26914.*32614"):
        check_same_grid(one, raster(tmp_path / "d.tif", 100, 900, epsg=32614))
    whole = raster(tmp_path / "e.tif", 105, 895)
    found = resampled(whole, one, Window(2, 3, 4, 5), method="nearest")
    assert np.array_equal(found, whole.read(Window(1, 2, 4, 5)))
    assert not resampled(one, raster(tmp_path / "f.tif", 9000, 900), Window(0, 0, 4, 4)).any()


def test_another_crs_is_resampled_window_by_window_as_at_once(tmp_path: Path) -> None:
    utm = raster(tmp_path / "utm.tif", 500_000, 4_600_000)
    path, into = tmp_path / "degrees.tif", np.zeros((1, 12, 9), np.uint8)
    # The scene, 50 x 40 m, lies across these pixels of about 4 x 6 m from the third row and column on.
    degrees = Affine(5e-5, 0, -99.0001, 0, -5e-5, 41.55192)
    with rasterio.open(
        path, "w", driver="GTiff", height=12, width=9, count=1, dtype="uint8", crs="EPSG:4326",
        transform=degrees,
    ) as file:  # fmt: skip
        file.write(into)
    like = open_raster(path)
    reproject(
        utm.read(), into, src_transform=utm.transform, src_crs=utm.crs, dst_transform=degrees,
        dst_crs="EPSG:4326", resampling=Resampling.nearest,
    )  # fmt: skip
    assert into.any() and not into.all()
    found = np.zeros_like(into)
    for row in range(0, 12, 4):
        for col in range(0, 9, 3):
            found[:, row : row + 4, col : col + 3] = resampled(
                utm, like, Window(col, row, 3, 4), method="nearest"
            )
    assert np.array_equal(found, into)
    with pytest.raises(GridError, match=r"utm\.tif is in EPSG:26914, .*nowhere\.tif in None"):
        under(utm, _nowhere(tmp_path / "nowhere.tif"), Window(0, 0, 4, 4))


def _nowhere(path: Path) -> Raster:
    with rasterio.open(
        path, "w", driver="GTiff", height=8, width=10, count=1, dtype="uint8", transform=Affine.scale(2)
    ) as file:
        file.write(np.zeros((1, 8, 10), np.uint8))
    return open_raster(path)


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations((2009, 2012, 2015, 2017, 2018, 2020), 2)), ids=str
)
def test_real_revisits(shared_data: Path, one: int, other: int) -> None:
    """Of the six dates two pairs share a grid; the others lie a part of a pixel apart."""
    (a,), (b,) = (list((shared_data / "rasters" / "naip").glob(f"*_{year}*.tif")) for year in (one, other))
    if (one, other) in ((2012, 2015), (2017, 2018)):
        check_same_grid(open_raster(a), open_raster(b))
    else:
        with pytest.raises(GridError, match=r"by -?0(\.\d)? columns and -?0\.\d rows"):
            check_same_grid(open_raster(a), open_raster(b))
