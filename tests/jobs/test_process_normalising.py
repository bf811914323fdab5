"""Pixels far from 0 keep their differences: the mean is subtracted before anything becomes float32."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from process_scenes import write_scene
from rasterio.windows import Window

from bigvision.jobs.process import Options
from bigvision.jobs.process.normalising import normalised
from bigvision.jobs.process.revisit import same_bits
from bigvision.jobs.process.scene import open_scene
from bigvision.jobs.train_raster.options import TrainOptions
from tiling import open_raster, to_zarr

FAR = {
    "float32": (1e6, 1.0),
    "float64": (1e6, 1e-3),
    "int32": (3e7, 10.0),
    "uint32": (1_760_000_000.0, 60.0),  # times in seconds
    "int64": (1.76e18, 1000.0),  # and in nanoseconds
    "uint64": (1.8e19, 1000.0),
    "uint16": (6e4, 10.0),
}


def far_pixels(dtype: str, shape: tuple[int, int, int] = (2, 9, 11)) -> tuple[np.ndarray, np.ndarray]:
    """Pixels about the mean of FAR, and what they are once it is subtracted and the spread divided out."""
    mean, std = FAR[dtype]
    steps = np.random.default_rng(3).normal(size=shape) * std
    if np.issubdtype(np.dtype(dtype), np.integer):
        whole = np.rint(steps).astype(np.int64)
        pixels = (int(mean) + whole.astype(object)).astype(dtype)
        return pixels, (whole / std).astype(np.float32)
    pixels = (mean + steps).astype(dtype)
    return pixels, ((pixels.astype(np.longdouble) - mean) / std).astype(np.float32)


@pytest.mark.parametrize("dtype", list(FAR))
@pytest.mark.parametrize("store", ["scene.tif", "scene.zarr"])
def test_a_scene_far_from_zero_keeps_its_differences(tmp_path: Path, dtype: str, store: str) -> None:
    pixels, expected = far_pixels(dtype)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    if store.endswith(".zarr"):
        to_zarr(open_raster(scene), tmp_path / store, pyramid=None)
    mean, std = FAR[dtype]
    options = Options(model="any:net", mean=(mean,), std=(std,))
    found, valid = open_scene([str(tmp_path / store)], options).read(Window(0, 0, 11, 9))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert valid.all()


def test_training_reads_scenes_with_the_same_normalisation() -> None:
    options = TrainOptions(model="any:net", mean=(1e6,), std=(2.0,), scale=4.0)
    assert (options.reading().mean, options.reading().std, options.reading().scale) == ((1e6,), (2.0,), 4.0)


def test_a_revisit_that_differs_in_a_far_digit_differs(tmp_path: Path) -> None:
    options = Options(model="any:net", mean=(3e7,), std=(10.0,))
    pixels = np.full((1, 4, 4), 30_000_001, np.int32)
    visits = [open_scene([str(write_scene(tmp_path / f"{k}.tif", pixels + k))], options) for k in range(2)]
    assert not same_bits(visits[0], visits[1], Window(0, 0, 4, 4))


@given(
    dtype=st.sampled_from(["uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]),
    mean=st.floats(-1e12, 1e12),
    std=st.floats(1e-6, 1e6),
    scale=st.sampled_from([1.0, 255.0, 1e4, -2.0]),
    seed=st.integers(0, 9),
)
def test_the_normalisation_is_that_of_exact_numbers(
    dtype: str, mean: float, std: float, scale: float, seed: int
) -> None:
    draw, kind = np.random.default_rng(seed), np.dtype(dtype)
    if kind.kind in "iu":
        values = draw.integers(np.iinfo(kind).min, np.iinfo(kind).max, (1, 5, 7), kind, endpoint=True)
    else:
        values = (mean * scale + draw.normal(size=(1, 5, 7)) * std).astype(kind)
    exact = (values.astype(np.longdouble) / scale - mean) / std
    wide = kind.itemsize > 2
    # Of 16 bits and fewer the sum is that of float32; what is wider is rounded to it once.
    slack = 4e-7 * np.abs(exact) + (1e-13 if wide else 4e-7) * abs(mean / std)
    assert (np.abs(normalised(values, scale, [mean], [std]) - exact) <= slack + 1e-30).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["scale", "mean", "std", "resolution", "tolerance"])
def test_options_are_finite(name: str, value: float) -> None:
    given = (0.5, value) if name in ("mean", "std") else value
    with pytest.raises(ValueError, match=rf"--{name} takes finite numbers, got .*{value}"):
        Options(model="any:net", previous=Path("run"), **{name: given})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["threshold", "min_agreement"])
def test_parts_are_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=r"is between 0 and 1, got nan"):
        Options(model="any:net", **{name: float("nan")})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["nan", "inf", "1e400GiB", "-1GiB"])
def test_budgets_are_sizes(size: str) -> None:
    with pytest.raises(ValueError, match="--memory"):
        Options(model="any:net", memory=size)


def test_a_scene_too_large_to_count_is_refused_by_its_size(tmp_path: Path) -> None:
    """As a file of a few lines can claim to be."""
    side, band = 2**31 - 1, '<VRTRasterBand dataType="Byte" band="1"/>'
    vrt = tmp_path / "huge.vrt"
    vrt.write_text(f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}">{band}</VRTDataset>')
    with pytest.raises(
        ValueError, match=r"huge.vrt: 2147483647 x 2147483647 are 4.6e\+18 pixels, .* at most"
    ):
        open_scene([str(vrt)], Options(model="any:net"))
