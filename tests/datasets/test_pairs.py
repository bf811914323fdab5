"""Lists of labelled scenes: what they hold, and what is refused before any work starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

from datasets.pairs import IGNORE, LabelledScene, Pair, open_labels, read_pairs
from tiling import Raster, open_raster

GRID = from_origin(100, 200, 2, 2)


def raster(path: Path, data: np.ndarray, **options: Any) -> str:
    profile = {"crs": "EPSG:32633", "transform": GRID, "nodata": None} | options
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(data),
        height=data.shape[1],
        width=data.shape[2],
        dtype=data.dtype,
        photometric="minisblack",
        **profile,
    ) as file:
        file.write(data)
    return str(path)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    image = np.arange(1, 2 * 6 * 5 + 1, dtype=np.uint8).reshape(2, 6, 5)
    image[:, 0, 1] = 0
    labels = np.ones((1, 6, 5), np.uint8)
    labels[0, 2, 3], labels[0, 4, 4] = 9, IGNORE
    return Pair(
        raster(tmp_path / "image.tif", image, nodata=0), raster(tmp_path / "labels.tif", labels, nodata=9)
    )


class Halved:
    """Pixels divided by two."""

    def __init__(self, raster: Raster) -> None:
        self.raster = raster
        self.shape = raster.shape

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        data = self.raster.read(window)
        return data.astype(np.float32) / 2, self.raster.mask(window, data=data)


def labelled(pair: Pair, classes: int) -> LabelledScene:
    image = open_raster(pair.scene)
    return LabelledScene(pair, Halved(image), open_labels(pair, image), classes)


def test_reading_marks_what_has_no_data(pair: Pair) -> None:
    scene = labelled(pair, classes=2)
    image, target = scene.read(Window(0, 0, 5, 6))
    assert scene.shape == (2, 6, 5) and image[1, 5, 4] == 30 and target.dtype == np.uint8
    ignored = set(zip(*np.nonzero(target == IGNORE), strict=True))
    assert ignored == {(0, 1), (2, 3), (4, 4)}
    assert target[target != IGNORE].tolist() == [1] * 27
    assert scene.class_counts().tolist() == [0, 28]


def test_an_unknown_class_is_named_with_its_place(pair: Pair) -> None:
    scene = labelled(pair, classes=1)
    with pytest.raises(ValueError, match=r"labels\.tif: class 1 at row 3, column 2; .* classes 0 to 0"):
        scene.read(Window(2, 3, 3, 3))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 6, 4), {}, "6 x 4 labels for 6 x 5"),
        ((1, 6, 5), {"crs": "EPSG:32634"}, "CRS EPSG:32634, but .* has EPSG:32633"),
        ((1, 6, 5), {"transform": from_origin(101, 200, 2, 2)}, r"transform \(101.*has \(100"),
        ((2, 6, 5), {}, "one band of whole numbers, not 2 of uint8"),
        ((1, 6, 5), {"dtype": "float32"}, "one band of whole numbers, not 1 of float32"),
    ],
)
def test_labels_on_another_grid_are_refused(
    pair: Pair, tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    data = np.zeros(shape, options.pop("dtype", "uint8"))
    other = raster(tmp_path / "other.tif", data, **options)
    with pytest.raises(ValueError, match=message):
        labelled(Pair(pair.scene, other), classes=2)


def test_the_list_is_relative_to_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("scene,labels,split\na.tif,b.tif,\n/vsicurl/x,y.tif,val\n")
    assert read_pairs(tmp_path / "list.csv") == (
        Pair(str(tmp_path / "a.tif"), str(tmp_path / "b.tif"), "train"),
        Pair("/vsicurl/x", str(tmp_path / "y.tif"), "val"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column labels nor scene"),
        ("scene,mask\na,b\n", "no column labels"),
        ("scene,labels\n", "lists no scenes"),
        ("scene,labels\na.tif,\n", "line 2: a pair needs both"),
        ("scene,labels,split\na,b,test\n", "line 2: split 'test' is neither train nor val"),
    ],
)
def test_a_bad_list_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"list\.csv.*{message}"):
        read_pairs(path)
    with pytest.raises(ValueError, match="no such list"):
        read_pairs(tmp_path / "none.csv")
