"""RecordIO: files built byte by byte are read back, and every kind of damage is named."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.face_images import DamagedRecordError
from datasets.record_faces import RecordFaces
from datasets.recordio import (
    MAGIC_BYTES,
    ImageRecord,
    RecordFile,
    RecordWriter,
    pack_image_record,
    unpack_image_record,
)

WORDS = st.lists(st.sampled_from([MAGIC_BYTES, b"abcd", b"\0\0\0\0", b"xy", b"z"]), max_size=12).map(b"".join)


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value, value, value)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_faces(path: Path, labels: list[int]) -> None:
    with RecordWriter(path) as writer:
        for key, label in enumerate(labels):
            writer.write(key, pack_image_record(ImageRecord((float(label),), key, jpeg(10 * key))))


@given(st.lists(WORDS, min_size=1, max_size=6), st.booleans())
def test_records_come_back_whatever_they_hold(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], indexed: bool
) -> None:
    path = tmp_path_factory.mktemp("rec") / "a.rec"
    with RecordWriter(path) as writer:
        for key, payload in enumerate(payloads):
            writer.write(key, payload)
    if not indexed:
        path.with_suffix(".idx").unlink()
    records = RecordFile(path)
    assert [records.read(key) for key in range(len(payloads))] == payloads
    assert path.stat().st_size % 4 == 0


def test_a_record_holding_the_magic_word_is_cut_there(tmp_path: Path) -> None:
    # Built by hand from the format: first part "abcd", middle part "", last part "e" and three bytes of
    # padding.
    words = [(1, b"abcd"), (2, b""), (3, b"e\0\0\0")]
    lengths = [4, 0, 1]
    data = b"".join(
        MAGIC_BYTES + struct.pack("<I", flag << 29 | length) + part
        for (flag, part), length in zip(words, lengths, strict=True)
    )
    path = tmp_path / "a.rec"
    path.write_bytes(data)
    payload = b"abcd" + MAGIC_BYTES + MAGIC_BYTES + b"e"
    assert RecordFile(path).read(0) == payload
    with RecordWriter(tmp_path / "b.rec") as writer:
        writer.write(0, payload)
    assert (tmp_path / "b.rec").read_bytes() == data


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5), st.binary(max_size=9))
def test_image_headers_come_back(labels: list[float], data: bytes) -> None:
    record = ImageRecord(tuple(labels), 7, data)
    assert unpack_image_record(pack_image_record(record), "") == record


def test_the_layout_of_the_public_training_sets(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, pack_image_record(ImageRecord((4.0, 6.0), 0, b"")))
        for key, label in ((1, 0), (2, 1), (3, 1)):
            writer.write(key, pack_image_record(ImageRecord((float(label), 0.0), key, jpeg(key))))
        writer.write(4, pack_image_record(ImageRecord((1.0, 2.0), 4, b"")))
        writer.write(5, pack_image_record(ImageRecord((2.0, 4.0), 5, b"")))
    faces = RecordFaces(tmp_path)
    assert (len(faces), faces.num_classes) == (3, 2)
    assert [faces.read(i)[1] for i in range(3)] == [0, 1, 1]
    assert faces.read(0)[0].shape == (16, 16, 3)


def test_plain_records_count_their_labels_and_a_property_file_wins(tmp_path: Path) -> None:
    write_faces(tmp_path / "a.rec", [0, 3, 1])
    assert RecordFaces(tmp_path / "a.rec").num_classes == 4
    (tmp_path / "property").write_text("9,112,112")
    assert RecordFaces(tmp_path / "a.rec").num_classes == 9


def test_a_damaged_record_is_named_and_its_neighbours_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    write_faces(path, [0, 1, 2])
    records = RecordFile(path)
    with path.open("r+b") as file:
        file.seek(int(records.offsets[1]))
        file.write(b"\0\0\0\0")
    faces = RecordFaces(path)
    assert [faces.read(i)[1] for i in (0, 2)] == [0, 2]
    with pytest.raises(DamagedRecordError, match=r"a\.rec record 1: no record starts at byte"):
        faces.read(1)


def test_a_scan_steps_over_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    write_faces(path, [0, 1, 2])
    second = int(RecordFile(path).offsets[1])
    path.with_suffix(".idx").unlink()
    with path.open("r+b") as file:
        file.seek(second)
        file.write(b"\0\0\0\0")
    records = RecordFile(path)
    assert (len(records), records.gaps) == (2, [second])


@pytest.mark.parametrize("cut", [1, 9, 400])
def test_a_truncated_file_is_refused_when_it_is_opened(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.rec"
    write_faces(path, [0, 1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut * 4])
    with pytest.raises(ValueError, match=r"a\.rec is truncated: a\.idx lists 3 records"):
        RecordFile(path)


@pytest.mark.parametrize(
    ("index", "message"), [("0\t0\n1", "cut short"), ("zero\t0\n", "not a RecordIO index"), ("", "no record")]
)
def test_a_broken_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    write_faces(tmp_path / "a.rec", [0])
    (tmp_path / "a.idx").write_text(index)
    with pytest.raises(ValueError, match=message):
        RecordFile(tmp_path / "a.rec")


def test_a_file_without_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.rec").write_bytes(bytes(64))
    with pytest.raises(ValueError, match="holds no record"):
        RecordFile(tmp_path / "a.rec")


def test_an_image_that_does_not_decode_is_damaged(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, pack_image_record(ImageRecord((0.0,), 0, jpeg(3)[:100])))
        writer.write(1, pack_image_record(ImageRecord((1.0,), 0, jpeg(3))))
        writer.write(2, b"short")
    faces = RecordFaces(tmp_path / "a.rec")
    assert np.ptp(faces.read(1)[0]) == 0
    for index, reason in ((0, "Error"), (2, "too few")):
        with pytest.raises(DamagedRecordError, match=f"record {index}: .*{reason}"):
            faces.read(index)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, b"x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -1.0, 0.5])
def test_a_label_that_is_no_identity_is_a_damaged_record(tmp_path: Path, label: float) -> None:
    path = tmp_path / "train.rec"
    with RecordWriter(path) as writer:
        for key, value in enumerate((1.0, label, 2.0)):
            writer.write(key, pack_image_record(ImageRecord((value,), key, jpeg(9))))
    faces = RecordFaces(path)
    assert faces.num_classes == 3 and [faces.read(i)[1] for i in (0, 2)] == [1, 2]
    with pytest.raises(DamagedRecordError, match=r"record 1: the label .* is no whole number"):
        faces.read(1)


def test_a_damaged_first_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "train.rec"
    with RecordWriter(path) as writer:
        writer.write(0, pack_image_record(ImageRecord((float("nan"), 3.0), 0, b"")))
        writer.write(1, pack_image_record(ImageRecord((1.0,), 1, jpeg(9))))
    assert RecordFaces(path).num_classes == 2


def test_an_index_that_points_before_the_file_is_damage(tmp_path: Path) -> None:
    write_faces(tmp_path / "train.rec", [0, 1])
    index = tmp_path / "train.idx"
    index.write_text(index.read_text().replace("0\t0", "0\t-8", 1))
    with pytest.raises(DamagedRecordError, match="record 0"):
        RecordFile(tmp_path / "train.rec").read(0)
