"""Sources of faces: folders, tar shards, synthetic identities, ranges of them, the line that names one."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.face_images import DamagedRecordError, FaceSource, fit_square
from datasets.face_index import left_out_text
from datasets.faces import FolderFaces, IdentityRange, check_labels, open_faces
from datasets.identities import SyntheticIdentities
from datasets.recordio import ImageRecord, RecordWriter, pack_image_record
from datasets.shards import TarFaces, expand_shards


def picture(value: int, suffix: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, suffix)
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, values in (("bo", (1, 2)), ("al", (3,)), ("empty", ())):
        (tmp_path / name).mkdir()
        for value in values:
            (tmp_path / name / f"{value}.pgm").write_bytes(picture(value, "PPM"))
    (tmp_path / "bo" / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_identities_is_labelled_in_name_order(tree: Path) -> None:
    faces = FolderFaces(tree)
    assert isinstance(faces, FaceSource)
    assert (faces.names, faces.num_classes, len(faces)) == (["al", "bo"], 2, 3)
    assert [(int(image[0, 0, 0]), label) for image, label in map(faces.read, range(3))] == [
        (3, 0),
        (1, 1),
        (2, 1),
    ]
    assert faces.read(0)[0].shape == (6, 8, 3)


def test_a_damaged_image_is_named(tree: Path) -> None:
    (tree / "bo" / "2.pgm").write_bytes(b"P5 8 6 255\n only a part")
    with pytest.raises(DamagedRecordError, match=r"^bo/2\.pgm: "):
        FolderFaces(tree).read(2)
    faces = FolderFaces(tree)
    (tree / "bo" / "1.pgm").unlink()
    with pytest.raises(DamagedRecordError, match=r"^bo/1\.pgm: cannot be read: No such file"):
        faces.read(1)


def test_damage_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedRecordError("a", "b")))
    assert (error.record, error.reason) == ("a", "b")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty: no image"):
        FolderFaces(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        FolderFaces(tmp_path / "absent")


def test_a_range_of_identities_is_renumbered(tree: Path) -> None:
    faces = open_faces(f"folder:{tree}@1:2")
    assert isinstance(faces, IdentityRange)
    assert (len(faces), faces.num_classes, faces.names) == (2, 1, ["bo"])
    assert [faces.read(i)[1] for i in range(2)] == [0, 0]
    with pytest.raises(ValueError, match="identities 1:3 of a source with 2"):
        open_faces(f"folder:{tree}@1:3")


def shard(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_tar_shards(tmp_path: Path) -> None:
    shard(tmp_path / "a-00.tar", [("x/1.png", picture(1)), ("x/1.cls", b"4\n"), ("x/2.png", picture(2))])
    described = json.dumps({"label": 2}).encode()
    shard(tmp_path / "a-01.tar", [("3.json", described), ("3.jpg", picture(3, "JPEG")), ("read.me", b"")])
    faces = TarFaces(str(tmp_path / "a-{00..01}.tar"))
    assert (len(faces), faces.num_classes, faces.labels().tolist()) == (3, 5, [4, -1, 2])
    assert [(int(faces.read(i)[0][0, 0, 0]), faces.read(i)[1]) for i in (0, 2)] == [(1, 4), (3, 2)]
    with pytest.raises(DamagedRecordError, match=r"a-00\.tar/x/2\.png: no readable label"):
        faces.read(1)


def test_names_of_shards(tmp_path: Path) -> None:
    names = [f"a-{number:02}.tar" for number in range(8, 12)]
    for name in names:
        shard(tmp_path / name, [])
    expected = [tmp_path / name for name in names]
    for pattern in ("a-{08..11}.tar", "a-*.tar", ""):
        assert expand_shards(f"{tmp_path}/{pattern}") == expected
    with pytest.raises(ValueError, match=r"no tar shard at .*a-12\.tar"):
        expand_shards(f"{tmp_path}/a-{{08..12}}.tar")


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("1.cls", b"0"), ("1.png", bytes(4000))])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"a\.tar is truncated or no tar file: "):
        TarFaces(str(path))
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="truncated or no tar file"):
        TarFaces(str(path))


def test_shards_without_images_or_labels_are_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("1.cls", b"0")])
    with pytest.raises(ValueError, match="no image in 1 tar shards"):
        TarFaces(str(path))
    shard(path, [("1.png", picture(1))])
    with pytest.raises(ValueError, match=r"no image of .* has a label"):
        TarFaces(str(path))


def test_synthetic_identities_are_a_function_of_their_numbers() -> None:
    few, many = SyntheticIdentities(3, 4, 32, seed=5), SyntheticIdentities(10_000_000, 4, 32, seed=5)
    np.testing.assert_array_equal(few.read(9)[0], many.read(9)[0])
    assert many.read(len(many) - 1)[1] == 9_999_999
    assert not np.array_equal(few.read(0)[0], SyntheticIdentities(3, 4, 32, seed=6).read(0)[0])
    with pytest.raises(IndexError):
        few.read(12)


def test_synthetic_identities_can_be_told_apart() -> None:
    # Nearest class mean of the raw pixels: far above chance (1/20), far from perfect, as faces are.
    faces = SyntheticIdentities(20, 6, 32)
    pixels = np.stack([faces.read(i)[0].ravel() for i in range(len(faces))]).astype(float).reshape(20, 6, -1)
    pixels -= pixels.mean(axis=-1, keepdims=True)
    means, probes = pixels[:, :3].mean(axis=1), pixels[:, 3:].reshape(60, -1)
    cosines = (probes @ means.T) / np.linalg.norm(means, axis=1) / np.linalg.norm(probes, axis=1)[:, None]
    right = np.mean(cosines.argmax(axis=1) == np.repeat(np.arange(20), 3))
    assert right > 0.8


def test_sources_by_name(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert isinstance(open_faces(f"folder:{tree}"), FolderFaces)
    synthetic = open_faces("synthetic:100_000x3", size=32)
    assert (synthetic.num_classes, len(synthetic), synthetic.read(5)[0].shape) == (
        100_000,
        300_000,
        (32, 32, 3),
    )
    assert open_faces("synthetic:10@3:5").read(0)[1] == 0
    for spec in ("faces", "zip:a", "synthetic:many"):
        with pytest.raises(ValueError, match=spec):
            open_faces(spec)


def records(path: Path, labels: list[float]) -> Path:
    with RecordWriter(path) as writer:
        for key, label in enumerate(labels):
            writer.write(key, pack_image_record(ImageRecord((label,), 0, picture(key))))
    return path


def test_any_source_has_ranges(tmp_path: Path) -> None:
    source = open_faces(f"rec:{records(tmp_path / 'a.rec', [1.0, 0.0, 2.0, 1.0])}@1:3")
    assert (len(source), source.num_classes, source.labels().tolist()) == (3, 2, [0, 1, 0])
    assert [(int(image[0, 0, 0]), label) for image, label in map(source.read, range(3))] == [
        (0, 0),
        (2, 1),
        (3, 0),
    ]


def test_what_is_no_image_is_counted(tree: Path) -> None:
    (tree / ".ipynb_checkpoints").mkdir()
    (tree / ".ipynb_checkpoints" / "1.png").write_bytes(picture(9))
    (tree / "bo" / ".DS_Store").touch()
    (tree / "bo" / "deeper").mkdir()
    (tree / "bo" / "LICENSE").write_text("words")
    (tree / "bo" / "without").write_bytes(picture(7))
    (tree / "bo" / "a.jfif").write_bytes(picture(6, "JPEG"))
    (tree / "beside.png").write_bytes(picture(8))
    faces = FolderFaces(tree)
    assert (faces.names, len(faces)) == (["al", "bo"], 5)
    assert left_out_text(faces.left_out) == (
        "; left out: 1 .txt, 1 beside the identities' folders, 1 folders in an identity's folder, 2 hidden, "
        "1 without a suffix, no image"
    )


def test_an_empty_folder_says_what_stands_there(tree: Path) -> None:
    for path in tree.rglob("*.pgm"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"no image in any of its folders .*; left out: 3 \.heic, 1 \.txt"):
        FolderFaces(tree)


def test_labels_in_words_are_numbered_in_their_order(tmp_path: Path) -> None:
    files = [(f"{key}.png", picture(key)) for key in range(4)]
    names = ["zoe", "al", "zoe", ""]
    path = shard(tmp_path / "a.tar", [*files, *((f"{k}.cls", n.encode()) for k, n in enumerate(names))])
    faces = TarFaces(str(path))
    assert (faces.names, faces.labels().tolist()) == (["al", "zoe"], [1, 0, 1, -1])
    with pytest.raises(DamagedRecordError, match=r"a\.tar/3\.png: no readable label"):
        faces.read(3)


def test_one_word_among_numbers_is_a_damaged_label(tmp_path: Path) -> None:
    labels = [b"0", b"3", b"\xff\x00", b"-1", b"1"]
    files = [
        (f"{key}.{kind}", data)
        for key, label in enumerate(labels)
        for kind, data in (("png", picture(key)), ("cls", label))
    ]
    faces = TarFaces(str(shard(tmp_path / "a.tar", files)))
    assert faces.labels().tolist() == [0, 3, -1, -1, 1]


@given(st.lists(st.integers(0, 30) | st.integers(0, 2**40), min_size=1, max_size=8))
def test_dense_labels_keep_their_order(tmp_path_factory: pytest.TempPathFactory, labels: list[int]) -> None:
    folder = tmp_path_factory.mktemp("shards")
    files = [
        (f"{key}.{kind}", data)
        for key, label in enumerate(labels)
        for kind, data in (("png", picture(key)), ("cls", b"%d" % label))
    ]
    shard(folder / "a.tar", files)
    faces = open_faces(f"tar:{folder}@dense")
    expected = [sorted(set(labels)).index(label) for label in labels]
    assert faces.labels().tolist() == expected == [faces.read(i)[1] for i in range(len(labels))]
    assert faces.num_classes == len(set(labels))
    assert check_labels(faces, "tar") == ""


def test_labels_with_large_gaps_are_refused_with_what_helps(tmp_path: Path) -> None:
    spec = f"rec:{records(tmp_path / 'a.rec', [3.0, 8000.0, 17.0])}"
    with pytest.raises(ValueError, match=r"a\.rec record 1 has label 8000, but only 3 of 8001 .*@dense"):
        check_labels(open_faces(spec), spec)
    assert check_labels(open_faces(f"{spec}@dense"), spec) == ""


def test_few_identities_without_an_image_are_told(tmp_path: Path) -> None:
    spec = f"rec:{records(tmp_path / 'a.rec', [0.0, 3.0, 1.0])}"
    assert check_labels(open_faces(spec), spec) == "1 of 4 identities have no image"


def test_labels_beyond_the_sets_own_count_are_refused(tmp_path: Path) -> None:
    spec = f"rec:{records(tmp_path / 'a.rec', [0.0, 3.0, 1.0])}"
    (tmp_path / "property").write_text("3,112,112")
    with pytest.raises(ValueError, match="record 1 has label 3, but the set counts 3 identities"):
        check_labels(open_faces(spec), spec)


def test_a_forgotten_kind_is_proposed(tree: Path) -> None:
    with pytest.raises(ValueError, match=f"did you mean folder:{tree}"):
        open_faces(str(tree))


def test_images_become_squares() -> None:
    image = np.zeros((6, 4, 3), np.uint8)
    image[1:5] = 255
    assert fit_square(image, 4).min() == 255
    assert fit_square(image, 8).shape == (8, 8, 3)
    square = image[:4]
    assert fit_square(square, 4) is square


def test_the_orl_faces(shared_data: Path) -> None:
    faces = open_faces(f"folder:{shared_data / 'faces' / 'orl'}")
    assert (faces.num_classes, len(faces)) == (40, 400)
    assert faces.read(0)[0].shape == (112, 92, 3)


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.shards.MOST_OPEN", 2)
    for number in range(5):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            for name, data in ((f"{number}.png", picture(number)), (f"{number}.cls", b"%d" % number)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    faces = TarFaces(str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in (0, 1, 2, 3, 4, 0, 4, 2, 2, 0):
        image, label = faces.read(index)
        assert (int(image[0, 0, 0]), label) == (index, index)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
