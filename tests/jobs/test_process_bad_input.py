"""Whatever is wrong ends in one sentence that names file and value; odd but valid input works."""

import json
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from process_networks import random_net
from process_scenes import TRANSFORM, random_pixels, read, whole_image, write_scene
from safetensors.torch import save_file

from bigvision.jobs.process import Options, process_scenes
from tiling import open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")
MODEL = f"{NETWORKS}:random_net?seed=6"
STRIDE = 4


def process(folder: Path, scene: Path | str, **more: Any) -> dict[str, Any]:
    """One scene's entry of the report."""
    options = Options(**{"model": MODEL, "dtype": "float32", "tile": 32} | more)
    ok = process_scenes([str(scene)], folder / "out", options, report=folder / "report.json")
    (entry,) = json.loads((folder / "report.json").read_text())["scenes"]
    assert ok == (entry["status"] != "failed")
    return entry


def error_of(folder: Path, scene: Path | str, **more: Any) -> str:
    entry = process(folder, scene, **more)
    assert entry["status"] == "failed"
    visible = [file for file in (folder / "out").iterdir() if not file.name.startswith(".")]
    assert not visible, "something stands under a final name"
    assert "\n" not in entry["error"]
    return str(entry["error"])


class TestScenesThatAreNone:
    def test_not_a_raster(self, tmp_path: Path) -> None:
        file = tmp_path / "notes.tif"
        file.write_text("no raster")
        assert "notes.tif: not a raster" in error_of(tmp_path, file)

    def test_absent(self, tmp_path: Path) -> None:
        assert "absent.tif" in error_of(tmp_path, tmp_path / "absent.tif")

    def test_zero_bytes(self, tmp_path: Path) -> None:
        file = tmp_path / "empty.tif"
        file.touch()
        assert "empty.tif: an empty file (0 bytes)" in error_of(tmp_path, file)

    def test_truncated(self, tmp_path: Path) -> None:
        file = write_scene(tmp_path / "cut.tif", random_pixels((3, 200, 200)))
        file.write_bytes(file.read_bytes()[:60_000])
        assert "cut.tif: truncated" in error_of(tmp_path, file)

    def test_damaged_within(self, tmp_path: Path) -> None:
        file = write_scene(
            tmp_path / "torn.tif", random_pixels((3, 200, 200)), compress="deflate", tiled=True
        )
        content = bytearray(file.read_bytes())
        content[20_000:-100] = b"\xff" * (len(content) - 20_100)
        file.write_bytes(content)
        assert "torn.tif" in error_of(tmp_path, file)

    def test_complex(self, tmp_path: Path) -> None:
        file = write_scene(tmp_path / "sar.tif", np.ones((3, 20, 20), np.complex64))
        assert "sar.tif" in (error := error_of(tmp_path, file)) and "complex" in error


class TestScenesThatDoNotFit:
    def test_band_count(self, tmp_path: Path) -> None:
        file = write_scene(tmp_path / "five.tif", random_pixels((5, 20, 20)))
        error = error_of(tmp_path, file)
        assert error.startswith(str(file)) and "takes 3 bands, the scene has 5" in error
        assert process(tmp_path, file, bands=(1, 3, 5))["status"] == "done"

    def test_unknown_band(self, tmp_path: Path) -> None:
        file = write_scene(tmp_path / "scene.tif", random_pixels((3, 20, 20)))
        assert "scene.tif: no band 9" in error_of(tmp_path, file, bands=(1, 2, 9))

    def test_mean_of_another_length(self, tmp_path: Path) -> None:
        file = write_scene(tmp_path / "scene.tif", random_pixels((3, 20, 20)))
        assert "scene.tif: --mean has 2 values, the scene 3 bands" in error_of(
            tmp_path, file, mean=(1.0, 2.0)
        )


class TestOddButValid:
    @pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 1), (1, 50)])
    def test_smaller_than_the_stride(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        pixels = random_pixels((3, *shape))
        file = write_scene(tmp_path / "tiny.tif", pixels)
        assert process(tmp_path, file, output="logits")["status"] == "done"
        expected = whole_image(random_net(6), pixels, STRIDE)
        np.testing.assert_allclose(read(tmp_path / "out/tiny.tif"), expected, rtol=1e-4, atol=1e-2)

    def test_all_nodata(self, tmp_path: Path) -> None:
        file = write_scene(tmp_path / "blank.tif", np.zeros((3, 50, 50), np.uint8), nodata=0)
        assert process(tmp_path, file, dtype="auto")["status"] == "done"
        result = open_raster(tmp_path / "out/blank.tif")
        assert result.nodata == 255
        assert (result.read() == 255).all()

    @pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("bands", [slice(None), 1])
    def test_nan_and_inf_stay_where_they_are(self, tmp_path: Path, broken: float, bands: Any) -> None:
        pixels = random_pixels((3, 40, 50), dtype="float32")
        pixels[bands, 7, 9] = broken
        process(tmp_path, write_scene(tmp_path / "scene.tif", pixels), output="logits", tile=16)
        result = read(tmp_path / "out/scene.tif")
        assert np.isnan(result[:, 7, 9]).all()
        pixels[:, 7, 9] = 0
        expected = whole_image(random_net(6), pixels, STRIDE)
        expected[:, 7, 9] = np.nan
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * np.nanmax(np.abs(expected)))

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
    def test_nodata_is_the_mean_inside_and_nodata_outside(self, tmp_path: Path, dtype: str) -> None:
        pixels = random_pixels((3, 40, 50), dtype=dtype)
        pixels[:, 5:25, 5:25] = 0
        file = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
        process(tmp_path, file, output="logits", mean=(100.0,), std=(50.0,), tile=16)
        result = open_raster(tmp_path / "out/scene.tif")
        normal = (pixels.astype(np.float32) - 100) / 50
        normal[:, 5:25, 5:25] = 0
        expected = whole_image(random_net(6), normal, STRIDE)
        expected[:, 5:25, 5:25] = np.nan
        np.testing.assert_allclose(result.read(), expected, rtol=0, atol=1e-4 * np.nanmax(np.abs(expected)))

    def test_a_mask_of_the_dataset(self, tmp_path: Path) -> None:
        file = write_scene(tmp_path / "scene.tif", random_pixels((3, 40, 50)))
        shown = np.ones((40, 50), np.uint8) * 255
        shown[:, 20:30] = 0
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, "r+") as dataset:
            dataset.write_mask(shown)
        process(tmp_path, file)
        np.testing.assert_array_equal(read(tmp_path / "out/scene.tif")[0] == 255, shown == 0)

    def test_an_alpha_band(self, tmp_path: Path) -> None:
        pixels = random_pixels((4, 40, 50))
        pixels[3] = 255
        pixels[3, :10] = 0
        file = write_scene(tmp_path / "scene.tif", pixels, photometric="RGB", alpha="YES")
        process(tmp_path, file)
        result = read(tmp_path / "out/scene.tif")[0]
        assert (result[:10] == 255).all() and (result[10:] != 255).all()

    def test_no_crs_is_a_warning(self, tmp_path: Path) -> None:
        file = write_scene(tmp_path / "scene.tif", random_pixels((3, 20, 20)), crs=None)
        entry = process(tmp_path, file)
        assert entry["status"] == "done" and "no CRS" in entry["warning"]

    @pytest.mark.parametrize(
        "transform",
        [Affine(8, 3, 1000, 3, -8, 2000), Affine(10, 0, 1000, 0, 10, 2000)],
        ids=["rotated", "south-up"],
    )
    def test_the_grid_is_kept(self, tmp_path: Path, transform: Affine) -> None:
        file = write_scene(tmp_path / "scene.tif", random_pixels((3, 40, 50)), transform=transform)
        process(tmp_path, file)
        result = open_raster(tmp_path / "out/scene.tif")
        assert result.transform.almost_equals(transform)
        assert result.crs == open_raster(file).crs
        assert result.shape == (1, 40, 50)


class TestModels:
    @pytest.fixture
    def scene(self, tmp_path: Path) -> Path:
        return write_scene(tmp_path / "scene.tif", random_pixels((3, 40, 50)))

    def test_a_factory_that_raises(self, tmp_path: Path, scene: Path) -> None:
        error = error_of(tmp_path, scene, model=f"{NETWORKS}:failing_factory")
        assert "failing_factory raised KeyError: 'no such backbone: resnet999'" in error

    def test_an_output_of_another_size(self, tmp_path: Path, scene: Path) -> None:
        error = error_of(tmp_path, scene, model=f"{NETWORKS}:halving_net")
        assert "turns 1 x 3 x 128 x 128 into (1, 2, 64, 64)" in error

    def test_weights_that_do_not_fit(self, tmp_path: Path, scene: Path) -> None:
        state = random_net(6).state_dict()
        state.pop("head.bias")
        state["extra.weight"] = torch.zeros(1)
        save_file(state, tmp_path / "w.safetensors")
        error = error_of(tmp_path, scene, weights=tmp_path / "w.safetensors")
        assert "w.safetensors don't fit the model: missing: head.bias; unknown: extra.weight" in error

    def test_a_one_channel_output_is_a_binary_map(self, tmp_path: Path, scene: Path) -> None:
        model = f"{NETWORKS}:random_net?seed=6&classes=1"
        process(tmp_path, scene, model=model, threshold=0.3)
        logits = whole_image(random_net(6, classes=1), open_raster(scene).read(), STRIDE)
        expected = 1 / (1 + np.exp(-logits)) > 0.3
        assert (read(tmp_path / "out/scene.tif") == expected).mean() > 0.999


class TestPlaces:
    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 40, 50)))
        (tmp_path / "out").write_text("in the way")
        with pytest.raises(OSError, match=r"out: can't be written to: it is a file, no folder"):
            process_scenes([str(scene)], tmp_path / "out", Options(model=MODEL))

    def test_a_scheduler_that_does_not_answer(self, tmp_path: Path) -> None:
        scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 40, 50)))
        with socket.socket() as taken:  # a port on which nobody listens
            taken.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ValueError, match=f"{address}: no dask scheduler answers"):
                process_scenes([str(scene)], tmp_path / "out", Options(model=MODEL, scheduler=address))

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """A limit on the size of files stands for it: writing fails half-way in the same manner."""
        scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 400, 400)))
        code = (
            "import sys; from bigvision.cli import main;"
            f"sys.argv = ['bigvision', 'process', {str(scene)!r}, '--model', {MODEL!r}, '--tile', '200',"
            f" '--output', 'logits', '--dtype', 'float32', '--out', {str(tmp_path / 'out')!r}]; main()"
        )
        limit = (200_000, 200_000)
        done = subprocess.run(
            [sys.executable, "-c", code],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "File too large" in done.stdout and "Traceback" not in done.stderr
        assert not (tmp_path / "out/scene.tif").exists()


class TestBatches:
    def test_a_failing_file_does_not_stop_the_rest(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in "ac":
            write_scene(tmp_path / f"{name}.tif", random_pixels((3, 20, 20)))
        (tmp_path / "b.tif").write_text("no raster")
        assert not process_scenes([str(tmp_path)], tmp_path / "out", Options(model=MODEL, dtype="float32"))
        table = capsys.readouterr().out
        assert [line.split()[:2] for line in table.splitlines()[1:4]] == [
            ["a.tif", "done"],
            ["b.tif", "failed"],
            ["c.tif", "done"],
        ]
        assert {file.name for file in (tmp_path / "out").glob("*.tif")} == {"a.tif", "c.tif"}

    def test_globs_and_one_result_for_two_scenes(self, tmp_path: Path) -> None:
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir()
            write_scene(tmp_path / folder / "scene.tif", random_pixels((3, 20, 20)))
        with pytest.raises(ValueError, match=r"would both become .*scene\.tif"):
            process_scenes([str(tmp_path / "*" / "scene.tif")], tmp_path / "out", Options(model=MODEL))
        with pytest.raises(ValueError, match="matches no file"):
            process_scenes([str(tmp_path / "*.jp2")], tmp_path / "out", Options(model=MODEL))

    def test_a_stack_of_single_bands(self, tmp_path: Path) -> None:
        pixels = random_pixels((3, 40, 50))
        files = [write_scene(tmp_path / f"b{i}.tif", pixels[i : i + 1]) for i in range(3)]
        options = Options(model=MODEL, stack=True, dtype="float32")
        assert process_scenes([str(file) for file in files], tmp_path / "out", options)
        whole = write_scene(tmp_path / "whole.tif", pixels)
        assert process_scenes([str(whole)], tmp_path / "out", Options(model=MODEL, dtype="float32"))
        assert (read(tmp_path / "out/b0.tif") == read(tmp_path / "out/whole.tif")).all()


def test_resolution_and_area_of_interest(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", random_pixels((3, 40, 60)))
    left, top = TRANSFORM * (10, 10)
    right, bottom = TRANSFORM * (50, 30)
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    area = {
        "type": "Polygon",
        "coordinates": [ring],
        "crs": {"type": "name", "properties": {"name": "EPSG:32633"}},
    }
    (tmp_path / "area.geojson").write_text(json.dumps(area))
    process(tmp_path, scene, resolution=20.0, aoi=tmp_path / "area.geojson")
    result = open_raster(tmp_path / "out/scene.tif")
    assert result.shape == (1, 10, 20)
    assert result.transform.almost_equals(Affine(20, 0, left, 0, -20, top))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory": "lots"}, "--memory 'lots'"),
        ({"tile": 0}, "--tile must be at least 1, got 0"),
        ({"std": (0.0,)}, "can't be 0"),
        ({"min_agreement": 1.5}, "--min-agreement is between 0 and 1, got 1.5"),
        ({"workers": 2, "scheduler": "tcp://x:1"}, "give one of them"),
        ({"resolution": -1.0}, "--resolution must be positive, got -1"),
    ],
)
def test_options_are_checked_before_anything_else(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Options(model=MODEL, **wrong)
