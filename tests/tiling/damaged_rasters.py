"""Damaged rasters, for tests: bytes cut off or flipped, and metadata with values of any kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.control import GroundControlPoint

from tiling import open_raster, to_zarr

ODD = [
    None,
    True,
    -1,
    0,
    3,
    1.5,
    10**30,
    "x",
    "",
    "NaN",
    [],
    {},
    [1, 2],
    {"a": 1},
    ["x"] * 6,
    [[]],
    [0] * 6,
    [1e308] * 6,
]


def sound_rasters(folder: Path) -> dict[str, Path]:
    """A GeoTIFF in tiles with a mask, one in strips with control points, a VRT with masks, a zarr store."""
    random = np.random.default_rng(0)
    pixels = random.integers(1, 200, (3, 130, 150)).astype("uint16")
    tiled = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    places = [(0.0, 0.0), (0.0, 150.0), (130.0, 0.0), (130.0, 150.0)]
    gcps = [GroundControlPoint(row=r, col=c, x=10 + c / 9, y=50 - r / 9, z=1.0) for r, c in places]
    layouts: dict[str, dict[str, Any]] = {
        "tiles": {**tiled, "crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)},
        "strips": {"gcps": gcps, "crs": "EPSG:4326", "nodata": 7},
    }
    made = {}
    for name, layout in layouts.items():
        made[name] = folder / f"{name}.tif"
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(
                made[name], "w", driver="GTiff", count=3, height=130, width=150, dtype="uint16", **layout
            ) as file,
        ):
            file.write(pixels)
            file.update_tags(1, wavelength="red & wide")
            file.scales, file.offsets, file.units = (0.1, 0.2, 0.3), (1, 2, 3), ("m", "K", "s")
            if name == "tiles":
                file.write_mask(random.random((130, 150)) < 0.9)
    made["virtual"] = folder / "virtual.vrt"
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{band}"><NoDataValue>{band}</NoDataValue><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">tiles.tif</SourceFilename><SourceBand>{band}</SourceBand>'
        '<SrcRect xOff="0" yOff="0" xSize="150" ySize="130"/>'
        '<DstRect xOff="0" yOff="0" xSize="150" ySize="130"/>'
        '</SimpleSource><MaskBand><VRTRasterBand dataType="Byte"><SimpleSource><SourceFilename '
        f'relativeToVRT="1">tiles.tif</SourceFilename><SourceBand>mask,{band}</SourceBand></SimpleSource>'
        "</VRTRasterBand></MaskBand></VRTRasterBand>"
        for band in (1, 2)
    )
    made["virtual"].write_text(
        '<VRTDataset rasterXSize="150" rasterYSize="130"><SRS>EPSG:32633</SRS>'
        f"<GeoTransform>500000,10,0,5000000,0,-10</GeoTransform>{bands}</VRTDataset>"
    )
    made["store"] = folder / "store.zarr"
    to_zarr(open_raster(made["tiles"]), made["store"], chunk=32, shard=64)
    return made


def damaged(random: np.random.Generator, sound: dict[str, Path], folder: Path) -> tuple[Path, bool]:
    """A copy of one of them with one damage; and whether only bytes are missing at its end."""
    name = str(random.choice(list(sound)))
    copy = folder / sound[name].name
    if copy.is_dir():
        shutil.rmtree(copy)
    if name == "virtual":
        shutil.copy(sound["tiles"], folder / "tiles.tif")
    victim = copy
    if sound[name].is_dir():
        shutil.copytree(sound[name], copy)
        victim = random.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        if random.random() < 0.6:
            victim = copy / random.choice(["zarr.json", "0/zarr.json", "mask/zarr.json", "mask/0/zarr.json"])
    else:
        shutil.copy(sound[name], copy)
    content = victim.read_bytes()
    if victim.suffix == ".json" and random.random() < 0.7:
        victim.write_text(json.dumps(_odd(random, json.loads(content))))
        return copy, False
    if random.random() < 0.4:
        victim.write_bytes(content[: int(random.integers(0, len(content)))])
        return copy, True
    changed = bytearray(content)
    # Headers lie at the start or the end.
    reach = min(len(changed), 1500)
    for _ in range(int(random.integers(1, 6))):
        place = int(random.integers(reach))
        changed[place if random.random() < 0.6 else len(changed) - 1 - place] = int(random.integers(256))
    victim.write_bytes(changed)
    return copy, False


def _odd(random: np.random.Generator, value: Any) -> Any:
    """One value somewhere inside replaced, removed, or of another kind."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = str(random.choice(list(value)))
        if random.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _odd(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.7:
        place = int(random.integers(len(value)))
        return [*value[:place], _odd(random, value[place]), *value[place + 1 :]]
    return ODD[random.integers(len(ODD))]
