"""A result is taken for this command's own only where nothing it follows from can have changed."""

import importlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from process_scenes import random_pixels, write_scene
from test_process_resume import Counting, Stop, StopAfter

from bigvision.jobs.process import Options, process_scenes, run_scene
from bigvision.jobs.process.run import Watcher
from tiling import open_raster
from tiling.publish import discard

MODEL = """
from torch import nn
from helper_of_model import gain
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)
    def forward(self, x):
        return self.layer(gain(x))
def factory():
    return Net()
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "model.py").write_text(MODEL)
    write_helper(tmp_path, 1)
    return f"{tmp_path}/model.py:factory"


def write_helper(folder: Path, gain: int) -> None:
    sys.modules.pop("helper_of_model", None)  # as in another process
    importlib.invalidate_caches()
    (folder / "helper_of_model.py").write_text(f"def gain(x):\n    return x * {gain}\n")


def options(model: str, **more: Any) -> Options:
    return Options(**{"model": model, "dtype": "float32", "tile": 8} | more)


def zipped_vrt(folder: Path, seed: int) -> str:
    """A VRT of a VRT of a file in an archive."""
    scene = write_scene(folder / "in.tif", random_pixels((1, 24, 24), seed))
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(scene, "in.tif")
    text = (
        '<VRTDataset rasterXSize="24" rasterYSize="24"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        '<SourceFilename relativeToVRT="0">{}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
    )
    (folder / "inner.vrt").write_text(text.format(f"/vsizip/{folder}/a.zip/in.tif"))
    (folder / "outer.vrt").write_text(text.format(folder / "inner.vrt"))
    return str(folder / "outer.vrt")


def test_what_lies_behind_a_finished_result(tmp_path: Path, model: str) -> None:
    scene, target = zipped_vrt(tmp_path, 1), tmp_path / "out.tif"

    def again(**more: Any) -> str:
        return run_scene((scene,), target, options(model, **more)).status

    assert again() == "done"
    for cut in ({"memory": "3GiB"}, {"tile": 16}, {"engine": "stream", "tile": None}, {"scratch_limit": "0"}):
        assert again(**cut) == "already done"
    write_helper(tmp_path, 2)
    with pytest.raises(ValueError, match="made by another command, input or model"):
        again()
    (tmp_path / "model.py").write_text(MODEL + "# another file\n")
    assert again(overwrite=True) == "done"
    zipped_vrt(tmp_path, 2)
    with pytest.raises(ValueError, match="made by another command, input or model"):
        again()


def test_a_run_whose_source_was_replaced_is_not_gone_on_with(tmp_path: Path, model: str) -> None:
    scene, target = zipped_vrt(tmp_path, 1), tmp_path / "out.tif"
    with pytest.raises(Stop):
        run_scene((scene,), target, options(model), watcher=StopAfter(4))
    zipped_vrt(tmp_path, 2)
    watch = Counting()
    run_scene((scene,), target, options(model), watcher=watch)
    assert watch.left == watch.pixels


def test_a_scene_that_changes_while_it_is_processed_gets_no_result(tmp_path: Path, model: str) -> None:
    class Replacing(StopAfter):
        def computed(self, pixels: float) -> None:
            zipped_vrt(tmp_path, 2)

    scene, target = zipped_vrt(tmp_path, 1), tmp_path / "out.tif"
    with pytest.raises(ValueError, match=r"outer\.vrt: .* changed while the scene was processed"):
        run_scene((scene,), target, options(model), watcher=Replacing(None))
    assert not target.exists()


def test_what_can_not_be_known_is_said_and_not_reused(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiling.behind._NAMED", {"VRT"})
    scene = write_scene(tmp_path / "scene.tif", random_pixels((1, 24, 24)))
    target = tmp_path / "out.tif"
    with pytest.raises(Stop):
        run_scene((str(scene),), target, options(model), watcher=StopAfter(4))
    watch = Counting()
    done = run_scene((str(scene),), target, options(model), watcher=watch)
    assert watch.left == watch.pixels
    assert "can't be known" in done.warning and "scene.tif" in done.warning
    with pytest.raises(ValueError, match=r"whether its input changed since can't be known .* --overwrite"):
        run_scene((str(scene),), target, options(model))


def test_a_signature_is_shown_nowhere_and_changes_nothing(
    tmp_path: Path, model: str, server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scene(tmp_path / "scene.tif", random_pixels((1, 24, 24)))
    written = tmp_path / "out" / "scene.tif"
    for sig in ("?sig=SECRET/one", "?sig=SECRET/two", "?sig=SECRET"):
        if sig == "?sig=SECRET":
            (tmp_path / "scene.tif").unlink()
        process_scenes(
            [f"{server.replace('//', '//me:SECRET@')}/scene.tif{sig}"],
            tmp_path / "out",
            options(model),
            report=tmp_path / "report.json",
        )
        (entry,) = json.loads((tmp_path / "report.json").read_text())["scenes"]
        assert entry["status"] == {"one": "done", "two": "already done"}.get(sig[-3:], "failed")
        assert entry["result"] == str(written)
        shown = capfd.readouterr()
        assert "SECRET" not in json.dumps(entry) + shown.out + shown.err + str(open_raster(written).tags)


class TestNothingOfTheUsersIsReplaced:
    @pytest.fixture
    def scene(self, tmp_path: Path) -> Path:
        return write_scene(tmp_path / "scene.tif", random_pixels((1, 24, 24)))

    def refused(self, model: str, scene: Path | str, target: Path, match: str, **more: Any) -> None:
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=match) as refusal:
                run_scene((str(scene),), target, options(model, overwrite=overwrite, **more))
            assert "--overwrite" not in str(refusal.value)

    def test_the_scene_itself(self, tmp_path: Path, model: str, scene: Path) -> None:
        os.link(scene, tmp_path / "link.tif")
        (tmp_path / "box").mkdir()
        for target in (scene, tmp_path / "link.tif", tmp_path / "box" / ".." / "scene.tif"):
            self.refused(model, scene, target, "is read to make it")

    def test_what_lies_behind_it(self, tmp_path: Path, model: str) -> None:
        scene = zipped_vrt(tmp_path, 1)
        for name in ("a.zip", "inner.vrt", "outer.vrt"):
            self.refused(model, scene, tmp_path / name, "is read to make it")

    def test_model_weights_area_and_route(self, tmp_path: Path, model: str, scene: Path) -> None:
        self.refused(model, scene, tmp_path / "model.py", "is read to make it")
        for name in ("weights", "aoi"):
            (tmp_path / name).write_text("")
            self.refused(model, scene, tmp_path / name, "is read to make it", **{name: tmp_path / name})
        (tmp_path / "cheap.pth").write_text("")
        (tmp_path / "route.toml").write_text(f'[cheap]\nmodel = "{model}"\nweights = "cheap.pth"\n')
        for name in ("cheap.pth", "route.toml"):
            self.refused(
                model, scene, tmp_path / name, "is read to make it", route=tmp_path / "route.toml", tile=None
            )
        (tmp_path / "out.route.tif").write_text("notes")
        self.refused(
            model,
            scene,
            tmp_path / "out.tif",
            "belongs to no route",
            route=tmp_path / "route.toml",
            tile=None,
        )

    def test_an_earlier_run(self, tmp_path: Path, model: str, scene: Path) -> None:
        run_scene((str(scene),), tmp_path / "out.tif", options(model))
        self.refused(model, scene, tmp_path / "out.tif", "is read to make it", previous=tmp_path / "out.tif")

    def test_a_folder_that_is_no_result(self, tmp_path: Path, model: str, scene: Path) -> None:
        folder = tmp_path / "out.zarr"
        folder.mkdir()
        (folder / "diary.txt").write_text("dear")
        self.refused(model, scene, folder, "was not made by bigvision process", format="zarr")
        (folder / "diary.txt").rename(tmp_path / "diary.txt")
        discard(folder)
        run_scene((str(scene),), folder, options(model, format="zarr"))
        (tmp_path / "diary.txt").rename(folder / "diary.txt")
        self.refused(model, scene, folder, "was not made by bigvision process", format="zarr", scale=2.0)
        assert (folder / "diary.txt").read_text() == "dear"

    def test_what_appears_while_it_is_made(self, tmp_path: Path, model: str, scene: Path) -> None:
        target = tmp_path / "out.tif"

        class Meanwhile(Watcher):
            def planned(self, *plan: object) -> None:
                target.write_text("mine")

        for overwrite in (False, True):
            target.unlink(missing_ok=True)
            with pytest.raises(ValueError, match=r"out\.tif: (appeared|exists)"):
                run_scene((str(scene),), target, options(model, overwrite=overwrite), watcher=Meanwhile())
            assert target.read_text() == "mine"
        target.unlink()
        watch = Counting()
        run_scene((str(scene),), target, options(model), watcher=watch)
        assert watch.left == 0
