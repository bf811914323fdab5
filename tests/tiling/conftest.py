"""Small rasters to test on."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

WriteTif = Callable[..., Path]


@pytest.fixture
def write_tif(tmp_path: Path) -> WriteTif:
    """Writes an array [B, H, W] as a GeoTIFF in EPSG:32633 with 10 m pixels, unless told otherwise."""

    def write(data: np.ndarray, name: str = "scene.tif", **options: Any) -> Path:
        mask, names = options.pop("mask", None), options.pop("names", None)
        bands, height, width = data.shape
        about = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 10, 10)} | options
        # Otherwise GDAL takes the fourth of four uint8 bands for alpha.
        about = {"photometric": "minisblack", "alpha": "no"} | about
        path = tmp_path / name
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(
                path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=data.dtype, **about
            ) as file,
        ):
            file.write(data)
            if mask is not None:
                file.write_mask(mask)
            for number, text in enumerate(names or (), 1):
                file.set_band_description(number, text)
        return path

    return write


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    """Random pixels from 1 to 200, the same for the same shape."""

    def make(bands: int = 3, height: int = 70, width: int = 90, dtype: str = "uint8") -> np.ndarray:
        random = np.random.default_rng(bands * 7 + height * 3 + width)
        return random.integers(1, 200, (bands, height, width)).astype(dtype)

    return make


# A process of its own, because GDAL waits for it with Python's lock held. Prints its port.
SERVER = r"""
import http.server, re, sys
from pathlib import Path

class Ranges(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.send_response(206 if asked else 200)
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        Path("sent").open("a").write(f"{len(content)}\n")

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()
