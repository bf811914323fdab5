"""A result appears complete, takes the place of nothing else, and leaves nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil

from tiling import RasterError, create_zarr, open_raster, to_cog, to_zarr
from tiling.publish import _HELD, begin, discard, publish

VRT = (
    '<VRTDataset rasterXSize="90" rasterYSize="70"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
    '<SourceFilename relativeToVRT="{relative}">{name}</SourceFilename><SourceBand>1</SourceBand>'
    "</SimpleSource></VRTRasterBand></VRTDataset>"
)


@pytest.fixture
def scene(write_tif, noise) -> Path:
    return write_tif(noise(1))


def ways_to(scene: Path) -> dict[str, str]:
    """Addresses whose pixels come from `scene`."""
    folder = scene.parent
    (folder / "one.vrt").write_text(VRT.format(relative=1, name="scene.tif"))
    (folder / "two.vrt").write_text(VRT.format(relative=0, name=folder / "one.vrt"))
    warped = folder / "warped.vrt"
    rasterio.shutil.copy(folder / "two.vrt", warped, driver="VRT")
    (folder / "soft.tif").symlink_to(scene)
    os.link(scene, folder / "hard.tif")
    return {
        "itself": str(scene),
        "a relative path": os.path.relpath(scene),
        "a VRT": f"{folder}/one.vrt",
        "a VRT of a VRT": f"{folder}/two.vrt",
        "a copy of that": str(warped),
        "a symbolic link": f"{folder}/soft.tif",
        "a hard link": f"{folder}/hard.tif",
        "a VRT's text": VRT.format(relative=0, name=scene),
        "a VRT address": f"vrt://{scene}?bands=1",
        "a directory of a TIFF": f"GTIFF_DIR:1:{scene}",
        "a subfile": f"/vsisubfile/0_,{scene}",
    }


def test_a_result_never_takes_the_place_of_what_it_is_read_from(scene) -> None:
    before = scene.read_bytes()
    for way, address in ways_to(scene).items():
        raster = open_raster(address)
        for copy in (to_cog, to_zarr):
            with pytest.raises(RasterError, match=r"scene.*can't be written, because .* is read"):
                copy(raster, scene, overwrite=True)
                pytest.fail(way)
    assert scene.read_bytes() == before


def test_an_archive_a_sidecar_and_a_stack_are_read_from_too(scene, tmp_path) -> None:
    packed = tmp_path / "a.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(scene, "in/side.tif")
    for address in (
        f"/vsizip/{packed}/in/side.tif",
        f"zip://{packed}!in/side.tif",
        f"/vsizip/{{{packed}}}/in/side.tif",
    ):
        with pytest.raises(RasterError, match=r"a\.zip"):
            to_cog(open_raster(address), packed, overwrite=True)
    (tmp_path / "scene.tif.aux.xml").write_text("<PAMDataset/>")
    with pytest.raises(RasterError, match=r"scene\.tif\.aux\.xml: can't be written"):
        to_cog(open_raster(scene), tmp_path / "scene.tif.aux.xml", overwrite=True)
    shutil.copy(scene, tmp_path / "b.tif")
    stack = open_raster([scene, tmp_path / "b.tif"])
    with pytest.raises(RasterError, match=r"b\.tif: can't be written"):
        to_cog(stack, tmp_path / "b.tif", overwrite=True)
    resampled = open_raster(scene, resolution=20)
    with pytest.raises(RasterError, match="can't be written"):
        to_cog(resampled, scene, overwrite=True)


def test_stores_are_kept_apart_from_what_lies_in_them(scene, tmp_path) -> None:
    store = tmp_path / "s.zarr"
    to_zarr(open_raster(scene), store)
    raster = open_raster(store)
    for target in (store, store / "0", store / "other.zarr", tmp_path / "link.zarr"):
        if target.name == "link.zarr":
            target.symlink_to(store)
        with pytest.raises(RasterError, match="can't be written"):
            to_zarr(raster, target, overwrite=True)
    with pytest.raises(RasterError, match="can't be written"):
        to_cog(raster, store / "a.tif")
    inside = shutil.copy(scene, store / "inside.tif")
    with pytest.raises(RasterError, match=r"because .*inside\.tif is read"):
        to_zarr(open_raster(inside), store, overwrite=True)
    assert np.array_equal(open_raster(store).read(), open_raster(scene).read())


def test_only_what_the_same_kind_of_command_wrote_is_replaced(scene, tmp_path) -> None:
    raster = open_raster(scene)
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work")
    notes = tmp_path / "notes.txt"
    notes.write_text("also work")
    mixed = tmp_path / "mixed.zarr"
    to_zarr(raster, mixed)
    (mixed / "0" / "notes.txt").write_text("kept here")
    foreign = tmp_path / "foreign.zarr"
    import zarr

    zarr.create_group(foreign).create_array("x", shape=(3,), dtype="int8")
    for target in (folder, notes, mixed, foreign):
        for overwrite in (False, True):
            with pytest.raises(RasterError, match=f"{target.name}: .*never replaced"):
                to_zarr(raster, target, overwrite=overwrite)
            with pytest.raises(RasterError, match=f"{target.name}: .*never replaced"):
                create_zarr(target, (1, 4, 4), "uint8", overwrite=overwrite)
            with pytest.raises(RasterError, match=f"{target.name}: .*never replaced"):
                to_cog(raster, target, overwrite=overwrite)
    assert (folder / "chapter.txt").read_text() == "years of work" and notes.read_text() == "also work"
    assert (mixed / "0" / "notes.txt").exists() and (foreign / "x").is_dir()
    (mixed / "0" / "notes.txt").unlink()
    assert to_zarr(raster, mixed, overwrite=True, tags={"n": "2"}).tags["n"] == "2"
    (tmp_path / "fresh").mkdir()
    to_zarr(raster, tmp_path / "fresh", overwrite=True)


def test_a_sidecar_is_not_taken_for_a_part_of_the_copy(scene, tmp_path, write_tif, noise) -> None:
    """A mask beside the name hides pixels; one of the TIFF that is replaced goes with it."""
    raster, out = open_raster(scene), tmp_path / "out.tif"
    shown = np.zeros((70, 90), bool)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False),
        rasterio.open(write_tif(noise(1), "out.tif"), "r+") as file,
    ):
        file.write_mask(shown)
    assert (tmp_path / "out.tif.msk").exists() and not open_raster(out).mask().any()
    assert to_cog(raster, out, overwrite=True).mask().all()
    assert not (tmp_path / "out.tif.msk").exists()
    (tmp_path / "free.tif.msk").write_text("someone's")
    with pytest.raises(RasterError, match=r"free\.tif: .*free\.tif\.msk would be read as a part of it"):
        to_cog(raster, tmp_path / "free.tif")
    assert (tmp_path / "free.tif.msk").read_text() == "someone's"


def test_a_link_is_followed_and_stays_a_link(scene, tmp_path) -> None:
    raster = open_raster(scene)
    (tmp_path / "far").mkdir()
    for copy, name in ((to_cog, "a.tif"), (to_zarr, "a.zarr")):
        for _ in range(2):
            link = tmp_path / name
            if not link.is_symlink():
                link.symlink_to(tmp_path / "far" / name)
            copy(raster, link, overwrite=True)
            assert link.is_symlink() and np.array_equal(open_raster(link).read(), raster.read())


@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_what_appears_meanwhile_is_kept(scene, tmp_path, kind: str) -> None:
    out = tmp_path / f"out.{kind}"

    def appear(*progress: float) -> None:
        out.write_text("someone else's") if kind == "tif" else (out / "deep").mkdir(
            parents=True, exist_ok=True
        )

    with pytest.raises(RasterError, match=rf"out\.{kind}: (a file|a folder|exists already|appeared)"):
        (to_cog if kind == "tif" else to_zarr)(open_raster(scene), out, progress=appear)
    assert out.read_text() == "someone else's" if kind == "tif" else (out / "deep").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, "scene.tif"]


@pytest.mark.parametrize("folder", [False, True])
def test_publishing_to_a_free_place_never_replaces(tmp_path, folder: bool, monkeypatch) -> None:
    for system_call in (True, False):
        if not system_call:
            monkeypatch.setattr("tiling.publish._rename", lambda *_: False)
        new, out = tmp_path / f"new{system_call}", tmp_path / f"out{system_call}"
        new.mkdir() if folder else new.write_text("new")
        (new / "x").touch() if folder else None
        (out.mkdir(), (out / "old").touch()) if folder else out.write_text("old")
        with pytest.raises(RasterError, match="appeared while it was being made"):
            publish(new, out, replace=False)
        assert (out / "old").exists() if folder else out.read_text() == "old"
        publish(new, out)
        assert (out / "x").exists() if folder else out.read_text() == "new"
        assert not new.exists() and not list(tmp_path.glob(".*"))


# --- what a killed command leaves -------------------------------------------------------------------------

SLOW = """
import sys, time, tiling
def wait(*progress):
    print("begun", flush=True)
    time.sleep(60)
copy = tiling.to_cog if sys.argv[2].endswith("tif") else tiling.to_zarr
copy(tiling.open_raster(sys.argv[1]), sys.argv[2], progress=wait)
"""


@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_the_next_command_removes_what_a_killed_one_left_and_no_living_ones(
    scene, tmp_path, kind: str
) -> None:
    out = tmp_path / f"out [1].{kind}"  # a name that means something to glob
    command = [sys.executable, "-c", SLOW, str(scene), str(out)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
    assert len(list(tmp_path.glob(".out*"))) == 2
    running[0].send_signal(signal.SIGKILL)
    running[0].wait()
    assert len(list(tmp_path.glob(".out*"))) == 2
    (to_cog if kind == "tif" else to_zarr)(open_raster(scene), out)
    (living,) = tmp_path.glob(".out*")
    assert (living / "lock").exists()
    running[1].kill()
    running[1].wait()
    discard(begin(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, "scene.tif"]


def test_leftovers_without_a_lock_go_when_they_are_old(tmp_path) -> None:
    for name, age in ((".a.tif.0123abcd.partial", 7200), (".a.tif.4567abcd.partial", 10)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / ".b.tif.0123abcd.partial").touch()
    discard(begin(tmp_path / "a.tif"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".a.tif.4567abcd.partial",
        ".b.tif.0123abcd.partial",
    ]


def test_where_locks_are_unknown_the_process_tells(tmp_path, monkeypatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("tiling.publish.fcntl.flock", unsupported)
    mine = begin(tmp_path / "a.tif")
    theirs = begin(tmp_path / "a.tif")
    assert mine.exists() and theirs.exists()
    for place in (mine, theirs):
        os.close(_HELD.pop(place))
    other = begin(tmp_path / "a.tif")  # this very process still lives
    assert mine.exists()
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    host = (mine / "lock").read_text().split()[0]
    (mine / "lock").write_text(f"{host} {dead.stdout.strip()}")
    (theirs / "lock").write_text(f"elsewhere {dead.stdout.strip()}")
    discard(begin(tmp_path / "a.tif"))
    assert not mine.exists() and theirs.exists() and other.exists()
    discard(other)


def test_a_store_whose_successor_never_came_comes_back(tmp_path) -> None:
    (tmp_path / ".a.zarr.0123abcd.replaced").mkdir()
    discard(begin(tmp_path / "a.zarr"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
