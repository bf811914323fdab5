"""What a raster says about its pixels and its place beyond grid, CRS and nodata: to keep it in every copy.

Physical units by band (scale, offset, unit), tags and colours of bands, ground control points (GCPs),
rational polynomial coefficients (RPCs), and whether a pixel is an area or a point.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader

# Coefficients that count pixels: (offset, scale) of lines and of samples.
_RPC_LINES, _RPC_SAMPLES = ("LINE_OFF", "LINE_SCALE"), ("SAMP_OFF", "SAMP_SCALE")


@dataclass(frozen=True)
class BandAbout:
    """Of one band: a pixel x means scale * x + offset in `unit`; color: by GDAL's name; tags: its own."""

    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""
    color: str = "undefined"
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def scaled(self) -> bool:
        """Whether pixels aren't the physical values themselves."""
        return (self.scale, self.offset) != (1.0, 0.0)


@dataclass(frozen=True)
class Metadata:
    """Of a raster.

    bands: one a band, or none where nothing is known. gcps: as GDAL has them, (row, col) of pixel corners.
    gcp_crs: what they are in. rpcs: texts by GDAL's names. point: whether pixels are samples at points.
    """

    bands: tuple[BandAbout, ...] = ()
    gcps: tuple[GroundControlPoint, ...] = ()
    gcp_crs: CRS | None = None
    rpcs: dict[str, str] = field(default_factory=dict)
    point: bool = False

    @property
    def scaled(self) -> bool:
        """Whether any band has a scale or an offset."""
        return any(band.scaled for band in self.bands)

    def chosen(self, bands: tuple[int, ...]) -> "Metadata":
        """With some of the bands, by position from 0."""
        return replace(self, bands=tuple(self.bands[band] for band in bands) if self.bands else ())

    def on_grid(self, change: Affine) -> "Metadata":
        """Of a part or a resampling of the raster: `change` leads from its pixels to the raster's.

        Only moved and scaled grids have rows and columns that GCPs and RPCs can count.
        """
        if change == Affine.identity():
            return self
        bands = tuple(replace(band, tags=_not_counted(band.tags)) for band in self.bands)
        if change.b or change.d:
            return replace(self, bands=bands, gcps=(), gcp_crs=None, rpcs={})
        gcps = []
        for point in self.gcps:
            col, row = ~change @ (point.col, point.row)
            gcps.append(GroundControlPoint(row, col, point.x, point.y, point.z, point.id, point.info))
        rpcs = dict(self.rpcs)
        for (offset, scale), start, step in (
            (_RPC_LINES, change.f, change.e),
            (_RPC_SAMPLES, change.c, change.a),
        ):
            if offset in rpcs and scale in rpcs:
                # They count from the centre of the first pixel.
                rpcs[offset] = repr((_number(rpcs[offset]) + 0.5 - start) / step - 0.5)
                rpcs[scale] = repr(_number(rpcs[scale]) / step)
        return replace(self, bands=bands, gcps=tuple(gcps), rpcs=rpcs)

    def place(self) -> "Metadata":
        """What a result of other pixels on the same grid keeps: GCPs and RPCs."""
        return Metadata(gcps=self.gcps, gcp_crs=self.gcp_crs, rpcs=self.rpcs)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it; empty where there is nothing to tell."""
        told: dict[str, Any] = {}
        if any(band != BandAbout() for band in self.bands):
            told["bands"] = [asdict(band) for band in self.bands]
        if self.gcps:
            told["gcps"] = [point.asdict() for point in self.gcps]
            told["gcp_crs"] = None if self.gcp_crs is None else self.gcp_crs.to_wkt(version="WKT2_2019")
        if self.rpcs:
            told["rpcs"] = dict(self.rpcs)
        if self.point:
            told["point"] = True
        return told


def from_json(told: Mapping[str, Any], bands: int) -> Metadata:
    """The inverse of `Metadata.to_json`; ValueError, TypeError or KeyError for what isn't its result."""
    about = tuple(
        BandAbout(
            scale=float(one.get("scale", 1.0)),
            offset=float(one.get("offset", 0.0)),
            unit=str(one.get("unit", "")),
            color=ColorInterp[one.get("color", "undefined")].name,
            tags={str(key): str(value) for key, value in one.get("tags", {}).items()},
        )
        for one in told.get("bands", ())
    )
    if about and len(about) != bands:
        raise ValueError(f"metadata of {len(about)} bands for {bands}")
    crs = told.get("gcp_crs")
    return Metadata(
        bands=about,
        gcps=tuple(GroundControlPoint(**point) for point in told.get("gcps", ())),
        gcp_crs=None if crs is None else CRS.from_user_input(crs),
        rpcs={str(key): str(value) for key, value in told.get("rpcs", {}).items()},
        point=bool(told.get("point", False)),
    )


def metadata_of(dataset: DatasetReader, indexes: tuple[int, ...]) -> Metadata:
    """Of bands of an open file, by number from 1."""
    colors = dataset.colorinterp
    bands = tuple(
        BandAbout(
            scale=dataset.scales[i - 1],
            offset=dataset.offsets[i - 1],
            unit=dataset.units[i - 1] or "",
            # An alpha band that is asked for as data is no alpha any more.
            color="undefined" if colors[i - 1] == ColorInterp.alpha else colors[i - 1].name,
            tags=dataset.tags(i),
        )
        for i in indexes
    )
    gcps, gcp_crs = dataset.gcps
    return Metadata(
        bands=bands,
        gcps=tuple(gcps),
        gcp_crs=gcp_crs if gcps else None,
        rpcs=dataset.tags(ns="RPC"),
        point=dataset.tags().get("AREA_OR_POINT") == "Point",
    )


def write_metadata(file: Any, about: Metadata) -> None:
    """Into a GeoTIFF open for writing; GCPs are left to `with_gcps`."""
    if about.point:
        file.update_tags(AREA_OR_POINT="Point")
    if about.rpcs:
        file.update_tags(ns="RPC", **about.rpcs)
    if not about.bands:
        return
    file.scales = [band.scale for band in about.bands]
    file.offsets = [band.offset for band in about.bands]
    for index, band in enumerate(about.bands, 1):
        if band.unit:
            file.set_band_unit(index, band.unit)
        if band.tags:
            file.update_tags(index, **band.tags)
    file.colorinterp = [ColorInterp[band.color] for band in about.bands]


def with_gcps(vrt: str, about: Metadata) -> str:
    """A VRT's text with ground control points in the place of its grid.

    They go this way into a file, because GDAL moves those of pixels that are points when it makes a GeoTIFF.
    """
    from xml.etree import ElementTree

    tree = ElementTree.fromstring(vrt)
    for tag in ("SRS", "GeoTransform", "GCPList"):
        for node in tree.findall(tag):
            tree.remove(node)
    listed = ElementTree.Element("GCPList")
    if about.gcp_crs is not None:
        listed.set("Projection", about.gcp_crs.to_wkt(version="WKT2_2019"))
    for number, point in enumerate(about.gcps, 1):
        values = {"Pixel": point.col, "Line": point.row, "X": point.x, "Y": point.y, "Z": point.z or 0.0}
        texts = {"Id": point.id or str(number), "Info": point.info or ""}
        ElementTree.SubElement(listed, "GCP", texts | {key: repr(float(v)) for key, v in values.items()})
    tree.insert(0, listed)
    return ElementTree.tostring(tree, encoding="unicode")


def _not_counted(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags without those that were counted over all pixels."""
    return {key: value for key, value in tags.items() if not key.startswith("STATISTICS_")}


def _number(text: str) -> float:
    return float(text.split()[0])
