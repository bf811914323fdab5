"""One image of any kind: upright, 8 bits, three channels; or damaged, by name."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from datasets.face_images import DamagedRecordError, decode_image, is_image_file

GREY16 = np.array([[0, 255, 256], [4095, 32768, 65535]], np.uint16)


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def picture(height: int = 3, width: int = 5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def grey_tiff(values: np.ndarray, bits: int, photometric: int = 1) -> bytes:
    """A little-endian TIFF of one grey strip with 12 or 16 bits a sample."""
    if bits == 16:
        strip = values.astype("<u2").tobytes()
    else:  # packed from the most significant bit on, rows in whole bytes
        lines = ["".join(f"{value:012b}" for value in row) for row in values.tolist()]
        padded = [line + "0" * (-len(line) % 8) for line in lines]
        strip = b"".join(int(line, 2).to_bytes(len(line) // 8, "big") for line in padded)
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    strip += bytes(len(strip) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + struct.pack("<H", 9) + entries + bytes(4)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = encoded(picture(), format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, "a"), expected)
    assert decode_image(data, "a").shape == ((3, 5, 3) if orientation <= 4 else (5, 3, 3))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    np.testing.assert_array_equal(
        decode_image(encoded(picture(), "PNG", exif=exif), "a"), np.asarray(picture())
    )


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own word on it
def test_a_damaged_exif_block_turns_nothing() -> None:
    data = encoded(picture(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_image(data, "a"), np.asarray(picture()))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_of_16_bits_the_upper_8_are_kept(format: str) -> None:
    """As OpenCV reads them in colour."""
    found = decode_image(encoded(Image.fromarray(GREY16), format), "a")
    np.testing.assert_array_equal(found, np.repeat((GREY16 >> 8).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_a_tiff_keeps_its_range(bits: int, photometric: int) -> None:
    most = (1 << bits) - 1
    values = np.array([[0, most // 2, most], [most, 0, 1]])
    expected = (values if photometric else most - values) >> (bits - 8)
    found = decode_image(grey_tiff(values, bits, photometric), "a")
    np.testing.assert_array_equal(found[..., 0], expected)


def test_a_pgm_of_12_bits_is_scaled() -> None:
    data = b"P5 4 1 4095\n" + np.array([0, 16, 2048, 4095], ">u2").tobytes()
    assert decode_image(data, "a")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("mode", "format"),
    [("F", "TIFF"), ("F", "PPM"), ("I", "TIFF")],
)
def test_numbers_without_a_known_range_are_damaged_by_name(mode: str, format: str) -> None:
    data = encoded(Image.new(mode, (4, 3)), format)
    with pytest.raises(DamagedRecordError, match=f"^there/a: .*{mode}"):
        decode_image(data, "there/a")


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG2000"])
def test_alpha_is_dropped(format: str) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (4, 4, 4), np.uint8)
    found = decode_image(encoded(Image.fromarray(colours, "RGBA"), format), "a")
    np.testing.assert_array_equal(found, colours[..., :3])


PLAIN = ("BMP", "GIF", "WEBP", "AVIF")
WRITABLE = {
    "1": PLAIN,
    "L": PLAIN,
    "P": PLAIN,
    "RGB": (*PLAIN, "JPEG", "JPEG2000"),
    "RGBA": PLAIN,
    "CMYK": ("TIFF", "JPEG", "JPEG2000"),
    "YCbCr": ("TIFF", "JPEG", "JPEG2000"),
    "LA": ("PNG", "TIFF", "WEBP"),
    "PA": ("TIFF", "WEBP", "AVIF"),
}


@pytest.mark.parametrize(("mode", "format"), [(mode, f) for mode in WRITABLE for f in WRITABLE[mode]])
def test_every_mode_is_read_as_pillow_converts_it(mode: str, format: str) -> None:
    data = encoded(picture().convert("L" if mode in ("PA", "LA") else "RGB").convert(mode), format)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, "a"), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what it says of damaged EXIF blocks
@given(st.sampled_from(["PNG", "TIFF", "JPEG", "GIF", "WEBP", "BMP", "PPM"]), st.data())
def test_damage_is_named_or_does_not_matter(format: str, data: st.DataObject) -> None:
    whole = bytearray(encoded(picture(), format))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    try:
        found = decode_image(bytes(whole[:cut]), "there/a")
    except DamagedRecordError as error:
        assert str(error).startswith("there/a: ")
    else:
        assert found.dtype == np.uint8
        assert found.ndim == 3 and found.shape[2] == 3


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        *(("a.jpg", True), ("a.JFIF", True), ("a.jpe", True), ("a.gif", True), ("a.jp2", True)),
        *(("a.avif", True), ("a", True), ("._a.jpg", False), (".hidden", False), ("a.txt", False)),
    ],
)
def test_which_files_are_images(tmp_path: Path, name: str, taken: bool) -> None:
    (tmp_path / name).write_bytes(encoded(picture(), "PNG"))
    assert is_image_file(tmp_path / name) is taken


def test_a_file_without_suffix_is_an_image_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("Plain words.")
    assert not is_image_file(tmp_path / "LICENSE")
