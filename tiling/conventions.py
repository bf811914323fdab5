"""A raster's description as zarr attributes: GeoZarr's proj, spatial and multiscales conventions, and back.

The conventions are written by `zarr_cm`, scale, offset and unit of all bands as CF has them; what there are
no words for (nodata, band names, colours, tags, control points) stands under one key of its own, `tiling`.
"""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import zarr_cm
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError

from tiling.errors import RasterError
from tiling.metadata import BandAbout, Metadata, from_json
from tiling.source import Colormap, Profile

Attributes = dict[str, Any]
KEY = "tiling"


def describe(profile: Profile) -> Attributes:
    """Attributes of a raster's array or group: proj, spatial and `tiling`."""
    _, height, width = profile.shape
    a, b, c, d, e, f = profile.transform[:6]
    corners = [profile.transform @ corner for corner in ((0, 0), (width, 0), (0, height), (width, height))]
    xs, ys = zip(*corners, strict=True)
    spatial = zarr_cm.spatial.create(
        dimensions=["y", "x"],
        bbox=[min(xs), min(ys), max(xs), max(ys)],
        transform_type="affine",
        transform=[a, b, c, d, e, f],
        shape=[height, width],
        registration="pixel",
    )
    conventions: dict[Any, Any] = {"spatial": spatial}
    if profile.crs is not None:
        conventions["proj"] = _proj(profile.crs)
    own: Attributes = {"band_names": list(profile.band_names), "tags": dict(profile.tags)}
    if profile.nodata is not None:
        own["nodata"] = number_to_json(profile.nodata)
    if profile.colormap is not None:
        own["colormap"] = {str(value): list(color) for value, color in sorted(profile.colormap.items())}
    if about := profile.metadata.to_json():
        own["metadata"] = about
    return {**zarr_cm.create_many(conventions), **_cf(profile.metadata), KEY: own}


def _cf(metadata: Metadata) -> Attributes:
    """Scale, offset and unit as CF has them, where they are those of all bands."""
    if not metadata.bands or len({(band.scale, band.offset, band.unit) for band in metadata.bands}) > 1:
        return {}
    band = metadata.bands[0]
    scaled = {"scale_factor": band.scale, "add_offset": band.offset} if band.scaled else {}
    return scaled | ({"units": band.unit} if band.unit else {})


def read_metadata(attributes: Mapping[str, Any], bands: int) -> Metadata:
    """What `tiling` or else CF attributes tell."""
    own = attributes.get(KEY, {}).get("metadata")
    if own is not None:
        return from_json(own, bands)
    scale, offset = float(attributes.get("scale_factor", 1.0)), float(attributes.get("add_offset", 0.0))
    band = BandAbout(scale=scale, offset=offset, unit=str(attributes.get("units", "")))
    return Metadata() if band == BandAbout() else Metadata((band,) * bands)


def describe_levels(profile: Profile, levels: Sequence[tuple[int, int]], resampling: str) -> Attributes:
    """Attributes of the group: those of its finest level and the list of all, each half as fine as the last.

    levels: (height, width) of each level, finest first.
    """
    layout: list[Any] = []
    for number, (height, width) in enumerate(levels):
        scale = float(2**number)
        relative = 2.0 if number else 1.0
        transform = profile.transform @ Affine.scale(scale)
        item: Attributes = {
            "asset": str(number),
            "transform": {"scale": [relative, relative], "translation": [0.0, 0.0]},
            "spatial:shape": [height, width],
            "spatial:transform": list(transform[:6]),
        }
        if number:
            item["derived_from"] = str(number - 1)
            item["resampling_method"] = resampling
        layout.append(item)
    multiscales = zarr_cm.multiscales.create(layout=tuple(layout), resampling_method=resampling)
    attributes: Attributes = describe(profile)
    return dict(zarr_cm.insert_many(attributes, {"multiscales": multiscales}))  # type: ignore[dict-item]


def read_crs(attributes: Mapping[str, Any], name: str) -> CRS | None:
    """The CRS that proj attributes name; None without them; RasterError where it makes no sense."""
    for key in ("proj:code", "proj:wkt2", "proj:projjson"):
        value = attributes.get(key)
        if value:
            try:
                return CRS.from_user_input(value)
            except (CRSError, ValueError) as error:
                raise RasterError(f"{name}: {key} is no CRS: {value!r}") from error
    return None


def read_transform(attributes: Mapping[str, Any], name: str) -> Affine:
    """The affine transform of spatial attributes; the identity without them, as for any image."""
    values = attributes.get("spatial:transform")
    if values is None:
        return Affine.identity()
    if not isinstance(values, list) or len(values) != 6:
        raise RasterError(f"{name}: spatial:transform must be six numbers, got {values!r}")
    return Affine(*[float(value) for value in values])


def read_colormap(own: Mapping[str, Any]) -> Colormap | None:
    """The colour table of `tiling` attributes."""
    colors = own.get("colormap")
    if not colors:
        return None
    return {int(value): (c[0], c[1], c[2], c[3]) for value, c in colors.items()}


def number_to_json(value: float) -> float | int | str:
    """A number as JSON has it: NaN and infinities become text, whole numbers stay whole."""
    if isnan(value):
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return int(value) if value == int(value) else float(value)


def _proj(crs: CRS) -> Any:
    authority = crs.to_authority(confidence_threshold=100)
    if authority is not None:
        return zarr_cm.proj.create(code=f"{authority[0]}:{authority[1]}")
    return zarr_cm.proj.create(wkt2=crs.to_wkt(version="WKT2_2019"))
