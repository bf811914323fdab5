"""Face images of a RecordIO file: the layout of the public face training sets."""

import struct
from pathlib import Path

import numpy as np

from datasets.face_images import DamagedRecordError, decode_image
from datasets.face_index import FaceIndex, face_index
from datasets.recordio import IMAGE_HEADER, ImageRecord, RecordFile, RecordReader, unpack_image_record


class RecordFaces:
    """Face images of a RecordIO file, with the layout of the public face training sets.

    Record 0, where it carries two labels, says that images have keys 1 ... first - 1 and that the records
    first ... last - 1 stand for the identities; else every record is an image. The label is the first of an
    image's. The number of identities comes from record 0, from the `property` file beside
    (`classes,height,width`), or from the labels. Labels are float32 in this format: exact up to 16.7 million
    identities.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path = path / "train.rec" if path.is_dir() else path
        beside = [path.with_suffix(".idx"), path.with_name("property")]
        watched = [path, *(file for file in beside if file.is_file())]
        self.index = face_index(path.with_suffix(".faces.index"), watched, lambda: _list_records(path))
        self._reader = RecordReader(path)
        self.num_classes = int(self.index.texts["classes"])

    def __len__(self) -> int:
        return len(self.index["labels"])

    def labels(self) -> np.ndarray:
        """Labels int64 of all positions, -1 where one can't be read."""
        return self.index["labels"]

    def name(self, index: int) -> str:
        """Name a position's record for a report."""
        return self._reader.name(int(self.index["keys"][index]))

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Image uint8 [H, W, 3] and label of one position; raises `DamagedRecordError`."""
        name = self.name(index)
        payload = self._reader.read_at(int(self.index["offsets"][index]), name)
        record = unpack_image_record(payload, name)
        return decode_image(record.data, name), _identity(record, name)


def _list_records(path: Path) -> FaceIndex:
    """Keys, offsets and labels of the images in a file, of which only headers are read."""
    records = RecordFile(path)
    keys, offsets, counted = records.keys, records.offsets, None
    if 0 in keys[:1]:
        try:
            first = unpack_image_record(records.read(0), "record 0")
            if len(first.labels) > 1:
                begin, end = (_whole(label, "record 0") for label in first.labels[:2])
                images = (keys > 0) & (keys < begin)
                keys, offsets, counted = keys[images], offsets[images], end - begin
        except DamagedRecordError:
            pass  # a damaged first record says nothing: fall through to the other two ways
    described = path.with_name("property")
    if described.is_file():
        counted = _classes_of(described)
    if not len(keys):
        raise ValueError(f"{path} holds no image record")
    labels = np.fromiter(
        (_label_at(records, int(offset)) for offset in offsets), np.int64, count=len(offsets)
    )
    if not counted and labels.max() < 0:
        raise ValueError(f"{path}: none of its {len(keys)} records can be read")
    return FaceIndex(
        {"keys": keys, "offsets": offsets, "labels": labels}, {"classes": counted or int(labels.max()) + 1}
    )


def _classes_of(described: Path) -> int:
    text = described.read_text(errors="replace").split(",")[0].strip()
    if not text.isdigit():
        raise ValueError(f"{described} begins with {text!r}, not with the number of classes")
    return int(text)


def _label_at(records: RecordReader, offset: int) -> int:
    """The label in the header of an image record, -1 where there is none that can be read."""
    try:
        head = records.start_of(offset, "", IMAGE_HEADER.size + 4)
        if len(head) < IMAGE_HEADER.size:
            return -1
        flag, label, _, _ = IMAGE_HEADER.unpack_from(head)
        if flag:
            label = struct.unpack_from("<f", head, IMAGE_HEADER.size)[0]
        return _whole(label, "")
    except (DamagedRecordError, struct.error):
        return -1


def _identity(record: ImageRecord, name: str) -> int:
    """The label of an image; a damaged record where it is no number from 0 on."""
    return _whole(record.labels[0], name)


def _whole(label: float, name: str) -> int:
    if not (label >= 0 and label.is_integer()):
        raise DamagedRecordError(name, f"the label {label} is no whole number from 0 on")
    return int(label)
