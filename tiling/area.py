"""An area of interest: the window around it, and which pixels of a window lie inside."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import array_bounds
from rasterio.warp import transform_bounds, transform_geom
from rasterio.windows import Window

from tiling.errors import RasterError
from tiling.longitudes import TURN, Polygon, around
from tiling.source import Profile

Geometry = dict[str, Any]
_WGS84 = CRS.from_epsg(4326)


@dataclass(frozen=True)
class Area:
    """A window of a source and, in the source's CRS, the polygons that count within it (None: all of it)."""

    window: Window
    geometry: tuple[Geometry, ...] | None = None

    def inside(self, window: Window, transform: Affine) -> NDArray[np.bool_]:
        """True [H, W] where the centre of a pixel of `window` lies inside the polygons."""
        if self.geometry is None or not window.height or not window.width:
            return np.ones((window.height, window.width), bool)
        from rasterio.features import geometry_mask

        shifted = transform @ Affine.translation(window.col_off, window.row_off)
        inside: NDArray[np.bool_] = geometry_mask(
            self.geometry, (window.height, window.width), shifted, invert=True
        )
        return inside


def find_area(aoi: Geometry | str | Path, profile: Profile, name: str) -> Area:
    """The part of a raster that an area of interest covers.

    aoi: GeoJSON (a geometry, feature or collection; a dict, text or a file's path) in EPSG:4326 as its
    standard says, or in the CRS that an old `crs` member names. Raises RasterError where it can't be read or
    placed, or where it doesn't meet the raster.
    """
    document, origin = _load(aoi)
    geometries = tuple(_geometries(document, origin))
    if not geometries:
        raise RasterError(f"{origin}: no polygon in this area of interest")
    if profile.crs is None:
        raise RasterError(f"{name}: has no CRS, so the area of interest {origin} can't be placed on it")
    crs = _crs_of(document, origin)
    polygons = [polygon for geometry in geometries for polygon in _polygons(geometry)]
    if crs.is_geographic:
        polygons = list(around(polygons))
    if crs != profile.crs:
        try:
            near = _near(polygons, crs, profile)
            polygons = [polygon for one in near for polygon in _reprojected(one, crs, profile.crs)]
        except Exception as error:  # whatever PROJ has to say, of another planet for one
            raise RasterError(
                f"{name}: the area of interest {origin} in {crs.to_string()} can't be placed on a raster in "
                f"{profile.crs.to_string()}: {error}"
            ) from error
    met = [(polygon, box) for polygon in polygons if (box := _box(polygon, profile)) is not None]
    geometries = tuple({"type": "Polygon", "coordinates": polygon} for polygon, _ in met)
    window = _union([box for _, box in met])
    if window is None:
        raise RasterError(f"{name}: the area of interest {origin} doesn't meet the raster")
    return Area(window, geometries)


def _load(aoi: Geometry | str | Path) -> tuple[Geometry, str]:
    if isinstance(aoi, dict):
        return aoi, "given as a dict"
    text, origin = str(aoi), str(aoi)
    if text.lstrip().startswith("{"):
        origin = "given as text"
    else:
        try:
            text = Path(aoi).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RasterError(f"{origin}: can't read this area of interest: {error}") from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise RasterError(f"{origin}: not GeoJSON: {error}") from error
    if not isinstance(document, dict):
        raise RasterError(f"{origin}: not GeoJSON: {type(document).__name__} at the top")
    return document, origin


def _geometries(document: Geometry, origin: str) -> Iterator[Geometry]:
    kind = document.get("type")
    if kind == "FeatureCollection":
        for feature in document.get("features") or []:
            yield from _geometries(feature, origin)
    elif kind == "Feature":
        yield from _geometries(document.get("geometry") or {"type": "GeometryCollection"}, origin)
    elif kind == "GeometryCollection":
        for geometry in document.get("geometries") or []:
            yield from _geometries(geometry, origin)
    elif kind in ("Polygon", "MultiPolygon"):
        _check_rings(document, origin)
        yield {"type": kind, "coordinates": document["coordinates"]}
    else:
        raise RasterError(f"{origin}: an area of interest is made of polygons, not of {kind!r}")


def _check_rings(polygon: Geometry, origin: str) -> None:
    """RasterError unless the coordinates are closed rings of finite points."""
    try:
        coordinates = polygon["coordinates"]
        polygons = coordinates if polygon["type"] == "MultiPolygon" else [coordinates]
        rings = [np.asarray([point[:2] for point in ring], float) for rings in polygons for ring in rings]
        fine = all(len(rings) for rings in polygons) and bool(rings)
        fine = fine and all(r.ndim == 2 and len(r) > 3 and bool(np.isfinite(r).all()) for r in rings)
    except (KeyError, TypeError, ValueError, IndexError):
        fine = False
    if not fine:
        text = str(polygon.get("coordinates"))
        raise RasterError(f"{origin}: no rings of at least four points in this polygon: {text[:80]}")


def _crs_of(document: Geometry, origin: str) -> CRS:
    named = document.get("crs")
    if not named:
        return _WGS84
    text = named.get("properties", {}).get("name", "") if isinstance(named, dict) else str(named)
    # OGC:CRS84 is EPSG:4326 with longitude first, which is what GeoJSON always has.
    if "CRS84" in text:
        return _WGS84
    try:
        return CRS.from_user_input(text)
    except ValueError as error:
        raise RasterError(f"{origin}: unknown CRS {text!r}") from error


def _polygons(geometry: Geometry) -> list[Polygon]:
    """The rings of each polygon, of points (x, y)."""
    multi = geometry["type"] == "MultiPolygon"
    polygons = geometry["coordinates"] if multi else [geometry["coordinates"]]
    return [[[[float(v) for v in point[:2]] for point in ring] for ring in polygon] for polygon in polygons]


def _near(polygons: list[Polygon], crs: CRS, profile: Profile) -> list[Polygon]:
    """What of polygons is near the raster: projections turn far places into nonsense, or have no room for
    them."""
    bounds = array_bounds(profile.shape[1], profile.shape[2], profile.transform)
    left, bottom, right, top = transform_bounds(profile.crs, crs, *bounds)
    if crs.is_geographic and left > right:  # the raster itself crosses the antimeridian
        right += TURN
    if not (left < right and bottom < top and np.isfinite([left, bottom, right, top]).all()):
        return polygons  # around a pole, where a box is no simple one
    across, up = right - left, top - bottom
    west, east = left - across, right + across
    if crs.is_geographic and left >= -TURN / 2 and right <= TURN / 2:
        west, east = max(west, -TURN / 2), min(east, TURN / 2)  # beyond, a projection begins anew
    limits = ((0, west, 1), (0, east, -1), (1, bottom - up, 1), (1, top + up, -1))
    kept = []
    for polygon in polygons:
        rings = polygon
        for limit in limits:
            rings = [_clip(ring, *limit) for ring in rings]
        if rings[0]:
            kept.append([ring for ring in rings if ring])
    return kept


def _clip(ring: list[list[float]], axis: int, limit: float, sign: int) -> list[list[float]]:
    """A closed ring cut at a line, one side of Sutherland and Hodgman 1974; empty where all is beyond."""
    out: list[list[float]] = []
    for (a, b), (da, db) in zip(
        pairwise(ring), pairwise(sign * (point[axis] - limit) for point in ring), strict=True
    ):
        if da >= 0:
            out.append(a)
        if (da >= 0) != (db >= 0):
            share = da / (da - db)
            out.append([p + share * (q - p) for p, q in zip(a, b, strict=True)])
    return [*out, out[0]] if out else []


def _reprojected(polygon: Polygon, source: CRS, destination: CRS) -> list[Polygon]:
    dense = [_densify(ring) for ring in polygon]
    return _polygons(transform_geom(source, destination, {"type": "Polygon", "coordinates": dense}))


def _densify(ring: list[list[float]], pieces: int = 16) -> list[list[float]]:
    """Points along each edge, because a straight edge bends under reprojection."""
    points = np.asarray([point[:2] for point in ring], float)
    steps = np.arange(pieces)[None, :, None] / pieces
    dense = points[:-1, None] + steps * (points[1:] - points[:-1])[:, None]
    result: list[list[float]] = np.concatenate([dense.reshape(-1, 2), points[-1:]]).tolist()
    return result


def _box(polygon: Polygon, profile: Profile) -> Window | None:
    """The window around what of a polygon lies in the raster; None where nothing does."""
    columns, rows = np.asarray([(~profile.transform) @ (point[0], point[1]) for point in polygon[0]]).T
    if not (np.isfinite(columns).all() and np.isfinite(rows).all()):
        return None
    # A thousandth of a pixel: edges that lie on pixel edges stay there in spite of rounding and bending.
    left, right = max(0, np.floor(columns.min() + 1e-3)), min(profile.shape[2], np.ceil(columns.max() - 1e-3))
    top, bottom = max(0, np.floor(rows.min() + 1e-3)), min(profile.shape[1], np.ceil(rows.max() - 1e-3))
    if left >= right or top >= bottom:
        return None
    return Window(int(left), int(top), int(right - left), int(bottom - top))


def _union(boxes: list[Window]) -> Window | None:
    """The window around all of them; None of none."""
    if not boxes:
        return None
    left, top = min(box.col_off for box in boxes), min(box.row_off for box in boxes)
    right = max(box.col_off + box.width for box in boxes)
    bottom = max(box.row_off + box.height for box in boxes)
    return Window(left, top, right - left, bottom - top)
