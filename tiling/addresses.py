"""Addresses of rasters, as they may be shown and stored, and what a raster is called.

Credentials and queries, which may hold a signature, are for opening only: `https://user:word@host/a.tif?sig=x`
is shown as `https://host/a.tif`. The query of `vrt://a.tif?bands=1` says which pixels are meant and stays.
"""

import re
from pathlib import Path
from urllib.parse import unquote

_END = r"\s'\"<>|"  # what ends an address within a sentence
_URL = re.compile(rf"(?<!vrt://)(?<![\w+.-])(?!vrt:)([a-zA-Z][\w+.-]+:/+)([^{_END}]*)", re.IGNORECASE)
_REMOTE = re.compile(
    rf"(/vsi(?:s3|gs|az|adls|oss|swift|hdfs|webhdfs)(?:_streaming)?/)([^{_END}]*)", re.IGNORECASE
)
_OPTIONS = re.compile(
    rf"(/vsi\w+)\?([^{_END}]*)", re.IGNORECASE
)  # /vsicurl?use_head=no&url=https%3A%2F%2F...
_KEY = re.compile(rf"(/vsicrypt/)[^{_END}]*?file=", re.IGNORECASE)
_PASSWORD = re.compile(r"\b(password|passwd|pwd)=[^\s'\",&]+", re.IGNORECASE)
_VRT = re.compile(rf"(vrt://)([^{_END}]*)", re.IGNORECASE)
_VRT_KEYS = (
    *(
        "bands",
        "ovr",
        "expand",
        "ot",
        "outsize",
        "projwin",
        "srcwin",
        "tr",
        "r",
        "scale",
        "unscale",
        "exponent",
    ),
    *("a_srs", "a_ullr", "a_gt", "a_scale", "a_offset", "a_nodata", "gcp", "nogcp", "sd", "sd_name"),
)
_STOPS = ":,.;)]"
# A part of a file, by GDAL's names: `netcdf:f.nc:Band1`, `HDF5:"f.h5"://a/b`, `GTIFF_DIR:2:f.tif`.
_PART = re.compile(r"([A-Za-z]\w+):(?!//)(.+)", re.DOTALL)


def without_secrets(text: str) -> str:
    """`text`, an address or a sentence with addresses in it, without their credentials and queries."""
    text = _OPTIONS.sub(lambda found: f"{found[1]}/{_inner(found[2])}", text)
    text = _VRT.sub(lambda found: found[1] + _part_of_vrt(found[2]), text)
    text = _URL.sub(lambda found: found[1] + _cut(re.sub(r"^[^/?#]*@", "", found[2])), text)
    text = _REMOTE.sub(lambda found: found[1] + _cut(found[2]), text)
    return _PASSWORD.sub(r"\1=...", _KEY.sub(r"\1", text))


def address_name(address: str) -> str:
    """What a raster is called: the last part of its address without its ending, whatever a query says.

    A part of a file is called after both: `netcdf:f.nc:Band1` is f_Band1, `vrt://f.tif?bands=2` f_bands_2.
    """
    if Path(address).name and _exists(address):
        return Path(address).stem
    plain = without_secrets(address)
    if plain.lstrip().startswith("<"):
        return "vrt"
    if plain.lower().startswith("vrt://"):
        file, _, chosen = plain[6:].partition("?")
        return _joined(_stem(file), chosen)
    part = _PART.fullmatch(plain)
    if part is None:
        return _stem(plain)
    pieces = re.findall(r'"[^"]*"|[^:"]+', part[2])
    at = next((k for k, piece in enumerate(pieces) if piece[0] == '"' or re.search(r"[./]", piece)), -1)
    rest = [piece for k, piece in enumerate(pieces) if k != at % len(pieces)]
    return _joined(_stem(pieces[at].strip('"')), *rest)


def _exists(address: str) -> bool:
    try:
        return Path(address).exists()
    except (OSError, ValueError):
        return False


def _joined(*words: str) -> str:
    return "_".join(plain for word in words if (plain := re.sub(r"[^\w.+-]+", "_", word).strip("_")))


def _stem(address: str) -> str:
    """Of a path, a URL, or a file in an archive (`zip://a.zip!b.tif`)."""
    last = re.split(r"[/!]", address.rstrip("/"))[-1]
    return Path(last).stem.strip(".") or "scene"


def _inner(options: str) -> str:
    """What a virtual file system with options reads."""
    found = re.search(r"(?:^|&)(?:url|file)=([^&]*)", options)
    return without_secrets(unquote(found[1])) if found else ""


def _part_of_vrt(rest: str) -> str:
    file, sign, query = rest.rpartition("?")
    if not sign:
        return rest
    keys = rf"(?:{'|'.join(_VRT_KEYS)})(?:_\d+)?=[^&]*"
    chosen = "&".join(pair for pair in query.split("&") if re.fullmatch(keys, pair))
    return without_secrets(file) + (f"?{chosen}" if chosen else "")


def _cut(rest: str) -> str:
    """What stands before a query; the stop that follows an address in a sentence stays."""
    kept, _, query = rest.partition("?")
    return kept + query[len(query.rstrip(_STOPS)) :]
