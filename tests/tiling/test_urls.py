"""Rasters behind a URL, read by ranges from a server on this machine."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from rasterio.windows import Window

from tiling import RasterError, open_raster, to_cog

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


def test_a_cog_behind_a_url_is_read_in_parts(write_tif, noise, tmp_path, server: str) -> None:
    data = noise(2, 1500, 1500)
    to_cog(open_raster(write_tif(data)), tmp_path / "cog.tif", blocksize=256)
    raster = open_raster(f"{server}/cog.tif")
    window = Window(700, 300, 50, 40)
    assert np.array_equal(raster.read(window), data[:, *window.toslices()])
    sent = sum(int(line) for line in (tmp_path / "sent").read_text().split())
    assert 0 < sent < (tmp_path / "cog.tif").stat().st_size / 2


def test_a_url_that_leads_nowhere_is_named(server: str) -> None:
    with pytest.raises(
        RasterError, match=r"http://127\.0\.0\.1:\d+/none\.tif: not a raster that can be read"
    ):
        open_raster(f"{server}/none.tif")
