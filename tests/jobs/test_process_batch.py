"""Which scenes a command has, what their results are called, and that one damaged file stops no other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_scenes import random_pixels, write_scene
from torch import nn

from bigvision.jobs.process import Options, job
from bigvision.jobs.process.batch import find_scenes
from bigvision.jobs.process.geometry import Analysis
from bigvision.jobs.process.places import check_batch
from bigvision.jobs.process.planning import plan_scene
from bigvision.jobs.process.precision import Precision
from bigvision.jobs.process.report import check_report, write_report
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.run import Outcome
from tiling import RasterError, open_raster, to_zarr

OPTIONS = Options(model="torchvision:none")


def names(given: list[str], out: Path, options: Options = OPTIONS) -> list[str]:
    return [target.name for _, target in find_scenes(given, out, options)]


def test_parts_of_a_file_have_names_of_their_own(tmp_path: Path) -> None:
    given = ["netcdf:f.nc:Band1", "netcdf:f.nc:Band2", "vrt://f.tif?bands=1", "vrt://f.tif?bands=2"]
    expected = ["f_Band1.tif", "f_Band2.tif", "f_bands_1.tif", "f_bands_2.tif"]
    assert names(given, tmp_path) == expected
    assert names(["https://host/a.tif?sig=x/y.tif", 'HDF5:"f.h5"://a[0]/b?'], tmp_path) == [
        "a.tif",
        "f_a_0_b.tif",
    ]
    with pytest.raises(
        ValueError, match=r"https://host/a\.tif and https://host/a\.tif would both become"
    ) as both:
        names(["https://me:word@host/a.tif?x=1", "https://host/a.tif?x=2"], tmp_path)
    assert "word" not in str(both.value) and "x=" not in str(both.value)


class TestOwnResultsAreNoScenes:
    """`process SCENES --out SCENES` typed again."""

    @pytest.fixture
    def scenes(self, tmp_path: Path) -> Path:
        for name in ("a.tif", "b.tif"):
            write_scene(tmp_path / name, random_pixels((1, 8, 8)))
            self.result(tmp_path / name, tmp_path / name.replace("tif", "zarr"))
        return tmp_path

    def result(self, scene: Path, target: Path) -> None:
        tags = {"BIGVISION_FINGERPRINT": "x", "BIGVISION_INPUT": json.dumps([str(scene)])}
        to_zarr(open_raster(scene), target, tags=tags)

    def test_in_the_folder_of_results(self, scenes: Path) -> None:
        zarr = Options(model="x", format="zarr")
        for given in ([str(scenes)], [str(scenes / "*")]):
            assert names(given, scenes, zarr) == ["a.zarr", "b.zarr"]
        assert names([str(scenes)], scenes, Options(model="x", format="zarr", stack=True)) == ["a.zarr"]

    def test_beside_their_scenes(self, scenes: Path, tmp_path: Path) -> None:
        assert names([str(scenes)], tmp_path / "out") == ["a.tif", "b.tif"]

    def test_a_store_of_pixels_is_one(self, scenes: Path, tmp_path: Path) -> None:
        to_zarr(open_raster(scenes / "a.tif"), scenes / "c.zarr")
        assert names([str(scenes)], scenes) == ["a.tif", "b.tif", "c.tif"]

    def test_a_result_that_is_named_is_one(self, scenes: Path, tmp_path: Path) -> None:
        assert names([str(scenes / "a.zarr")], scenes) == ["a.tif"]

    def test_only_results(self, scenes: Path, tmp_path: Path) -> None:
        for scene in ("a.tif", "b.tif"):
            (scenes / scene).unlink()
        with pytest.raises(ValueError, match="holds results only"):
            names([str(scenes)], scenes)


class OddError(Exception):
    """As GDAL's own errors are: of no kind that anyone expects."""


@pytest.mark.parametrize(
    "error", [KeyError("shape"), TypeError("no"), OverflowError(), OddError("[/bold] odd")]
)
def test_any_error_of_one_scene_is_its_row(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(paths: tuple[str, ...], target: Path, *rest: Any, **more: Any) -> Outcome:
        if "bad" in paths[0]:
            raise error
        return Outcome(paths[0], str(target), "done", warning="all [/well]")

    monkeypatch.setattr(job, "run_scene", run)
    given = [str(tmp_path / f"{name}[i].tif") for name in ("a", "bad", "c\udcff")]
    for name in given:
        Path(name).touch()
    assert not job.process_scenes(given, tmp_path / "out", OPTIONS, report=tmp_path / "report.json")
    entries = json.loads((tmp_path / "report.json").read_text())["scenes"]
    assert [entry["status"] for entry in entries] == ["done", "failed", "done"]
    assert entries[1]["error"].startswith(f"{given[1]}: {type(error).__name__}")
    assert type(error).__name__ in capsys.readouterr().out


BROKEN = {
    "not json": "{",
    "a list": "[]",
    "no shape": '{"zarr_format": 3, "node_type": "array"}',
    "an odd node": '{"zarr_format": 3, "node_type": 7}',
    "an infinite shape": '{"zarr_format": 3, "node_type": "array", "shape": [1e999, 2]}',
    "another format": '{"zarr_format": 9, "node_type": "group"}',
}


class TestDamagedStores:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Path:
        write_scene(tmp_path / "a.tif", random_pixels((1, 8, 8)))
        to_zarr(open_raster(tmp_path / "a.tif"), tmp_path / "a.zarr")
        return tmp_path / "a.zarr"

    def refused(self, store: Path) -> None:
        with pytest.raises(RasterError, match=r"a\.zarr: "):
            open_raster(store).read()

    @pytest.mark.parametrize("what", BROKEN)
    @pytest.mark.parametrize("file", ["zarr.json", "0/zarr.json"])
    def test_metadata(self, store: Path, what: str, file: str) -> None:
        (store / file).write_text(BROKEN[what])
        self.refused(store)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("bigvision", []),
            ("bigvision", {"nodata": "none"}),
            ("bigvision", {"nodata": [1]}),
            ("bigvision", {"band_names": 7}),
            ("bigvision", {"band_names": ["a", "b"]}),
            ("bigvision", {"tags": 7}),
            ("bigvision", {"colormap": {"x": 1}}),
            ("spatial:transform", [1, "a"]),
            ("spatial:transform", 7),
            ("proj:code", {"a": 1}),
        ],
    )
    def test_attributes(self, store: Path, key: str, value: Any) -> None:
        from tiling.conventions import KEY

        for file in (store / "zarr.json", store / "0" / "zarr.json"):
            about = json.loads(file.read_text())
            about["attributes"][KEY if key == "bigvision" else key] = value
            file.write_text(json.dumps(about))
        try:
            raster = open_raster(store)
            assert raster.read().shape == (1, 8, 8)
        except RasterError as error:
            assert "a.zarr" in str(error)

    def test_a_shard(self, store: Path) -> None:
        shard = next(path for path in (store / "0" / "c").rglob("*") if path.is_file())
        shard.write_bytes(np.random.default_rng(0).bytes(shard.stat().st_size))
        self.refused(store)


class TestPlacesOfABatch:
    """A result of one scene never takes the place of what another one is read from, nor does the report."""

    @pytest.fixture
    def found(self, tmp_path: Path) -> list[tuple[tuple[str, ...], Path]]:
        for folder in ("x", "z"):
            (tmp_path / folder).mkdir()
            write_scene(tmp_path / folder / "a.tif", random_pixels((1, 8, 8)))
        (tmp_path / "m.vrt").write_text(
            '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1">'
            '<SimpleSource><SourceFilename relativeToVRT="1">z/a.tif</SourceFilename></SimpleSource>'
            "</VRTRasterBand></VRTDataset>"
        )
        scenes = (str(tmp_path / "x" / "a.tif"), str(tmp_path / "m.vrt"), str(tmp_path / "absent.tif"))
        return [((scene,), tmp_path / "z" / f"{Path(scene).stem}.tif") for scene in scenes]

    def test_a_source_of_another_scene(self, found: list[tuple[tuple[str, ...], Path]]) -> None:
        check_batch(found, OPTIONS, None)  # what stands there stays
        with pytest.raises(RasterError, match=r"z/a\.tif: can't be written, because it is read to make it"):
            check_batch(found, replace(OPTIONS, overwrite=True), None)

    @pytest.mark.parametrize("name", ["x/a.tif", "z/a.tif", "m.vrt", "z/m.tif"])
    def test_the_report(self, found: list[tuple[tuple[str, ...], Path]], tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"is read to make it|is where the result of a scene goes"):
            check_batch(found, OPTIONS, tmp_path / name)
        check_batch(found, OPTIONS, tmp_path / "report.json")

    def test_what_is_no_report_stays(self, tmp_path: Path) -> None:
        write_report(tmp_path / "r.json", [])
        check_report(tmp_path / "r.json")
        for text in ("", "[]", '{"scenes": 1}', "notes"):
            (tmp_path / "r.json").write_text(text)
            with pytest.raises(ValueError, match=r"r\.json: exists and is no report, so it stays"):
                check_report(tmp_path / "r.json")


@pytest.mark.parametrize("wish", [{"tile": 10**9}, {"halo": 10**9}, {"tile": 10**9, "halo": 10**9}], ids=str)
def test_no_core_or_halo_is_larger_than_the_scene(wish: dict[str, Any]) -> None:
    """Each of these took for ever."""
    analysis = Analysis(4, 12, (), 100.0, 1000, "graph")
    plan = plan_scene(
        (3, 70, 90),
        np.dtype("uint8"),
        ResultKind("classes", 4, 0.5),
        analysis,
        replace(OPTIONS, **wish),
        Precision("float32", None),
        nn.Identity(),
        10**9,
    )
    assert plan.tile <= 128 and plan.halo <= 92
