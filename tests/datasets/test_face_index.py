"""The index of a large set is written once, says the same as listing the set, and follows every change."""

import io
import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import face_index
from datasets.face_images import DamagedRecordError, FaceSource
from datasets.faces import FolderFaces, IdentityRange, listing_bytes, open_faces
from datasets.recordio import ImageRecord, RecordWriter, pack_image_record


def shard(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def folder_set(root: Path) -> str:
    for identity in range(3):
        (root / f"p{identity}").mkdir(parents=True)
        for image in range(identity + 1):
            (root / f"p{identity}" / f"{image}.png").write_bytes(png(10 * identity + image))
    (root / "p1" / "notes.txt").touch()
    return f"folder:{root}"


def record_set(root: Path) -> str:
    root.mkdir()
    with RecordWriter(root / "train.rec") as writer:
        for key, label in enumerate([1.0, 0.0, float("nan"), 1.0]):
            writer.write(key, pack_image_record(ImageRecord((label, 7.0) if key else (label,), 0, png(key))))
    return f"rec:{root}"


def tar_set(root: Path) -> str:
    root.mkdir()
    files = [(f"{k}.{kind}", data) for k in range(3) for kind, data in (("png", png(k)), ("cls", b"%d" % k))]
    shard(root / "a.tar", files)
    shard(root / "b.tar", [("9.png", png(9)), ("9.cls", b"1"), ("9.txt", b"")])
    return f"tar:{root}"


SETS = pytest.mark.parametrize("make", [folder_set, record_set, tar_set])


def all_of(source: FaceSource) -> list[object]:
    found: list[object] = [source.num_classes, source.labels().tolist(), getattr(source, "left_out", None)]
    for index in range(len(source)):
        try:
            image, label = source.read(index)
            found.append((int(image[0, 0, 0]), label))
        except DamagedRecordError as error:
            found.append(str(error))
    return found


def aged(root: Path) -> None:
    """Make the set older than what counts as still moving."""
    for path in (root, *root.rglob("*")):
        os.utime(path, (1e9, 1e9))


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(face_index, "WORTH_KEEPING", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@SETS
def test_an_index_says_what_listing_says(
    tmp_path: Path, make: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make(tmp_path / "set")
    aged(tmp_path / "set")
    listed = all_of(open_faces(spec))
    assert not list(tmp_path.rglob("*.index"))
    monkeypatch.setattr(face_index, "WORTH_KEEPING", 0)
    assert all_of(open_faces(spec)) == listed
    (index,) = tmp_path.rglob("*.index")
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.lock"))
    for name in ("faces._list_tree", "record_faces._list_records", "shards._list_shards"):
        monkeypatch.setattr(f"datasets.{name}", None)  # never called again
    source = open_faces(spec)
    assert all_of(source) == listed
    assert isinstance(source.labels(), np.memmap)
    again = pickle.loads(pickle.dumps(source))
    assert all_of(again) == listed and isinstance(again.labels(), np.memmap)
    assert index.stat().st_mtime > 1e9


@SETS
def test_a_mapped_set_crosses_to_another_process_as_a_path(
    tmp_path: Path, make: Callable[[Path], str], keep_all: None
) -> None:
    source = open_faces(make(tmp_path / "set"))
    assert len(pickle.dumps(source)) < 2000
    assert listing_bytes(source) == (source.index.nbytes, 0)  # type: ignore[attr-defined]
    assert listing_bytes(IdentityRange(source, 0, 1)) == (source.index.nbytes, 16)  # type: ignore[attr-defined]


def test_changes_of_a_folder_are_followed(tmp_path: Path, keep_all: None) -> None:
    spec = folder_set(tmp_path / "set")
    aged(tmp_path / "set")
    assert open_faces(spec).labels().tolist() == [0, 1, 1, 2, 2, 2]
    (tmp_path / "set" / "p0" / "new.png").write_bytes(png(1))
    assert open_faces(spec).labels().tolist() == [0, 0, 1, 1, 2, 2, 2]
    aged(tmp_path / "set")
    assert open_faces(spec).labels().tolist() == [0, 0, 1, 1, 2, 2, 2]
    (tmp_path / "set" / "p1").rename(tmp_path / "set" / "p9")
    source = open_faces(spec)
    assert isinstance(source, FolderFaces)
    assert source.names == ["p0", "p2", "p9"]
    shutil.rmtree(tmp_path / "set" / "p2")
    assert open_faces(spec).labels().tolist() == [0, 0, 1, 1]


def test_a_folder_that_may_still_be_written_is_listed_again(tmp_path: Path, keep_all: None) -> None:
    """Two changes within the resolution of a file system's clock look like one."""
    spec = folder_set(tmp_path / "set")
    status = (tmp_path / "set" / "p0").stat()
    assert len(open_faces(spec)) == 6
    (tmp_path / "set" / "p0" / "new.png").write_bytes(png(1))
    os.utime(tmp_path / "set" / "p0", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(open_faces(spec)) == 7


@SETS
@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "header"])
def test_a_damaged_index_is_made_anew(
    tmp_path: Path, make: Callable[[Path], str], keep_all: None, damage: str
) -> None:
    spec = make(tmp_path / "set")
    aged(tmp_path / "set")
    whole = all_of(open_faces(spec))
    (path,) = (tmp_path / "set").rglob("*.index")
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-8], "noise": os.urandom(100), "empty": b"", "header": b"\x10" + bytes(7) + b"{" * 16}[
            damage
        ]
    )
    assert all_of(open_faces(spec)) == whole
    assert len(face_index.mapped_index(path)["labels"]) == len(whole) - 3


def test_a_set_on_a_read_only_disk_has_its_index_in_the_cache(
    tmp_path: Path, keep_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = folder_set(tmp_path / "set")
    aged(tmp_path / "set")
    monkeypatch.setattr(os, "access", lambda path, mode: "cache" in str(path))
    expected = all_of(open_faces(spec))
    assert not list((tmp_path / "set").rglob("*.index"))
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1
    monkeypatch.setattr("datasets.faces._list_tree", None)
    assert all_of(open_faces(spec)) == expected


def _length(spec: str) -> int:
    face_index.WORTH_KEEPING = 0
    return len(open_faces(spec))


def test_processes_that_open_a_set_together_agree(tmp_path: Path) -> None:
    spec = folder_set(tmp_path / "set")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_length, [spec] * 8) == [6] * 8
    assert len(list(tmp_path.rglob("*.index"))) == 1 and not list(tmp_path.rglob("*.partial"))


def test_names_of_any_bytes(tmp_path: Path, keep_all: None) -> None:
    folder = tmp_path / "set" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff.png")).write_bytes(png(5))
    (folder / "z.png").write_bytes(b"damaged")
    source = open_faces(f"folder:{tmp_path / 'set'}")
    assert int(source.read(1)[0][0, 0, 0]) == 5
    with pytest.raises(DamagedRecordError) as caught:
        source.read(0)
    str(caught.value).encode()  # can be printed and written
    assert str(caught.value).startswith(r"caf\udce9/z.png: ")
