"""Scenes on disk hold what the scene computes, with its georeference."""

from pathlib import Path

import numpy as np
import pytest

from datasets.scene_files import write_scene
from datasets.scenes import BANDS, COLOURS, Scene
from tiling import RasterError

SCENE = Scene(1100, 1300, seed=5, resolution=2.0)


@pytest.mark.parametrize("suffix", [".zarr", ".tif"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_holds_the_scene(tmp_path: Path, suffix: str, workers: int) -> None:
    image, labels = SCENE.read(0, 0, 1100, 1300)
    written = write_scene(SCENE, tmp_path / f"scene{suffix}", workers=workers)
    np.testing.assert_array_equal(written.read(), image)
    assert written.band_names == BANDS and written.nodata == 0
    assert written.crs.to_epsg() == 32633 and written.transform == SCENE.transform
    truth = write_scene(SCENE, tmp_path / f"labels{suffix}", labels=True, workers=workers)
    np.testing.assert_array_equal(truth.read()[0], labels)
    assert truth.nodata == 255 and truth.colormap is not None
    assert truth.colormap[2][:3] == COLOURS[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"labels{suffix}", f"scene{suffix}"]


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "scene.tif").write_text("precious")
    with pytest.raises(RasterError, match=r"scene\.tif: exists already"):
        write_scene(SCENE, tmp_path / "scene.tif")
    assert (tmp_path / "scene.tif").read_text() == "precious"
    with pytest.raises(ValueError, match=r"not '\.png'"):
        write_scene(SCENE, tmp_path / "scene.png")


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Scene, "read", fail)
    for name in ("scene.zarr", "scene.tif"):
        with pytest.raises(OSError, match="no space"):
            write_scene(SCENE, tmp_path / name)
    assert not list(tmp_path.iterdir())
