"""Areas across the antimeridian, in every spelling, on rasters of every kind of grid there."""

from typing import Any

import numpy as np
import pytest
from affine import Affine
from rasterio.warp import transform

from tiling import RasterError, open_raster


def ring(west: float, east: float, south: float, north: float) -> list[list[float]]:
    corners = [(west, south), (east, south), (east, north), (west, north), (west, south)]
    return [list(corner) for corner in corners]


def polygon(*rings: list[list[float]]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


SOUTH, NORTH = -17.5, -16.2
SPELLINGS = {
    "cut": {
        "type": "MultiPolygon",
        "coordinates": [[ring(179.2, 180, SOUTH, NORTH)], [ring(-180, -179.4, SOUTH, NORTH)]],
    },
    "on": polygon(ring(179.2, 180.6, SOUTH, NORTH)),
    "back": polygon(ring(-180.8, -179.4, SOUTH, NORTH)),
    "jump": polygon(ring(179.2, -179.4, SOUTH, NORTH)),
}
GRIDS = {
    "degrees east": ("EPSG:4326", Affine(0.05, 0, 178, 0, -0.05, -15)),
    "degrees west": ("EPSG:4326", Affine(0.05, 0, -182, 0, -0.05, -15)),
    "degrees to 180": ("EPSG:4326", Affine(0.05, 0, 176, 0, -0.05, -15)),
    "other degrees": ("EPSG:4269", Affine(0.05, 0, 178, 0, -0.05, -15)),
    "zone 1": ("EPSG:32701", Affine(5000, 0, 0, 0, -5000, 8350000)),
    "zone 60": ("EPSG:32760", Affine(5000, 0, 600000, 0, -5000, 8350000)),
    "mercator to 180": ("EPSG:3857", Affine(5000, 0, 20037508.34 - 400000, 0, -5000, -1700000)),
    "mercator from -180": ("EPSG:3857", Affine(5000, 0, -20037508.34, 0, -5000, -1700000)),
    "the world from 0": ("EPSG:4326", Affine(0.5, 0, 0, 0, -0.5, 10)),
}
WIDE = {"the world from 0": 720}


def in_the_area(crs: str, at: Affine, rows: int, columns: int) -> np.ndarray:
    """Pixel by pixel, by the longitude and latitude of its centre."""
    j, i = np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5)
    x, y = at.a * j + at.c, at.e * i + at.f
    lon, lat = (np.array(v).reshape(x.shape) for v in transform(crs, "EPSG:4326", x.ravel(), y.ravel()))
    lon = np.mod(lon, 360)
    return (lon > 179.2) & (lon < 180.6) & (lat > SOUTH) & (lat < NORTH)


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_the_right_side_is_taken(write_tif, grid: str, spelling: str) -> None:
    crs, at = GRIDS[grid]
    columns = WIDE.get(grid, 80)
    path = write_tif(np.ones((1, 80, columns), np.uint8), crs=crs, transform=at)
    whole, cut = open_raster(path), open_raster(path, aoi=SPELLINGS[spelling])
    window = cut.area.window
    shown = np.zeros(whole.shape[1:], bool)
    shown[window.toslices()] = cut.mask()
    expected = in_the_area(crs, at, 80, columns)
    assert expected.any()
    # A pixel whose centre lies on the edge may go either way: edges are straight in one CRS only.
    differ = np.argwhere(shown != expected)
    assert len(differ) <= 0.02 * expected.sum()
    assert window.height * window.width <= 2 * expected.sum() + 2 * (80 + columns)


def test_a_hole_goes_with_its_ring(write_tif) -> None:
    at = Affine(0.05, 0, 178, 0, -0.05, -15)
    path = write_tif(np.ones((1, 80, 80), np.uint8), crs="EPSG:4326", transform=at)
    for west, east in ((179.6, -179.8), (179.6, 180.2), (-180.4, -179.8)):
        aoi = polygon(ring(179.2, -179.4, SOUTH, NORTH), ring(west, east, -17, -16.6))
        cut = open_raster(path, aoi=aoi)
        left = cut.area.window.col_off
        row = cut.mask()[round((-16.8 + 16.2) / -0.05)]
        gap = np.flatnonzero(~row) + left
        assert (gap.min(), gap.max()) == (32, 43)


def test_the_whole_world_stays_the_whole_world(write_tif) -> None:
    path = write_tif(
        np.ones((1, 18, 36), np.uint8), crs="EPSG:4326", transform=Affine(10, 0, -180, 0, -10, 90)
    )
    raster = open_raster(path, aoi=polygon(ring(-180, 180, -90, 90)))
    assert raster.shape == (1, 18, 36) and raster.mask().all()


@pytest.mark.parametrize("crs", ["IAU_2015:30100", "ESRI:104903", "IAU_2015:49900"])
def test_an_area_on_another_planet_is_refused(write_tif, crs: str) -> None:
    aoi = polygon(ring(15, 16, 45, 46)) | {"crs": {"type": "name", "properties": {"name": crs}}}
    path = write_tif(
        np.ones((1, 8, 8), np.uint8), crs="EPSG:32633", transform=Affine(10, 0, 5e5, 0, -10, 5e6)
    )
    with pytest.raises(
        RasterError, match=rf"area of interest .* in {crs} can't be placed on a raster in EPSG:32633"
    ):
        open_raster(path, aoi=aoi)
