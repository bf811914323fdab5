"""GDAL's virtual file systems (archives, URLs, buckets), asked for what rasterio has no function for.

The functions are those of the very library that rasterio has loaded: its settings and credentials hold.
"""

import ctypes
from functools import cache

import rasterio._base

_AT_ONCE = 2**20


def read_start(path: str, limit: int) -> bytes | None:
    """The first `limit` bytes of a file by GDAL's name; None where it can't be opened."""
    gdal = _gdal()
    file = gdal.VSIFOpenL(path.encode(), b"rb")
    if not file:
        return None
    try:
        content = b""
        room = ctypes.create_string_buffer(min(limit, _AT_ONCE))
        while limit > len(content):
            got = gdal.VSIFReadL(room, 1, min(_AT_ONCE, limit - len(content)), file)
            if not got:
                break
            content += room.raw[:got]
        return content
    finally:
        gdal.VSIFCloseL(file)


def remote_headers(path: str) -> dict[str, str]:
    """What the server says now of a file of `/vsicurl/`, `/vsis3/` ...: headers by their names in lower case.

    Empty where it doesn't answer. What GDAL remembers of the file is forgotten, its pixels too.
    """
    gdal = _gdal()
    gdal.VSICurlPartialClearCache(path.encode())
    found = gdal.VSIGetFileMetadata(path.encode(), b"HEADERS", None)
    headers: dict[str, str] = {}
    if found:
        at = 0
        while found[at]:
            name, _, value = found[at].decode(errors="replace").partition("=")
            headers[name.lower()] = value.strip()
            at += 1
        gdal.CSLDestroy(found)
    return headers


@cache
def _gdal() -> ctypes.CDLL:
    """Symbols of GDAL, which the extension modules of rasterio are linked to."""
    gdal = ctypes.CDLL(rasterio._base.__file__)
    gdal.VSIFOpenL.restype, gdal.VSIFOpenL.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p]
    gdal.VSIFReadL.restype = ctypes.c_size_t
    gdal.VSIFReadL.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    gdal.VSIFCloseL.argtypes = [ctypes.c_void_p]
    gdal.VSIGetFileMetadata.restype = ctypes.POINTER(ctypes.c_char_p)
    gdal.VSIGetFileMetadata.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    gdal.CSLDestroy.argtypes = [ctypes.POINTER(ctypes.c_char_p)]
    gdal.VSICurlPartialClearCache.argtypes = [ctypes.c_char_p]
    return gdal
