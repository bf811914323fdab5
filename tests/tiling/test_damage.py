"""Damaged files and stores are read equal, or refused in one sentence that names them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damaged_rasters import damaged, sound_rasters

from tiling import RasterError, open_raster, to_cog, to_zarr
from tiling.pyramid import build_pyramid
from tiling.zarr_store import resume_zarr

LARGE = 5e6  # pixels: a damaged header may say any size


def use(path: Path, folder: Path, copy: bool) -> np.ma.MaskedArray:
    """Everything that is done with a raster; its pixels."""
    raster = open_raster(path)
    assert repr(raster) and raster.bounds
    if np.prod(raster.shape, dtype=float) > LARGE:
        raise RasterError(f"{path}: too large for this test")
    read = raster.read(masked=True)
    raster.mask()
    open_raster(path, resolution=25 if raster.crs else 2).read()
    open_raster(path, unscale=True).mask()
    if copy:
        to_cog(raster, folder / "copy.tif")
        to_zarr(raster, folder / "copy.zarr")
    return read


@pytest.mark.parametrize("part", range(6))
def test_damage_is_named_or_does_no_harm(tmp_path, part: int) -> None:
    (tmp_path / "sound").mkdir()
    sound = sound_rasters(tmp_path / "sound")
    expected = {path.name: open_raster(path).read(masked=True) for path in sound.values()}
    refused = 0
    for seed in range(25 * part, 25 * part + 25):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path, cut = damaged(np.random.default_rng(seed), sound, folder)
        try:
            read = use(path, folder, copy=seed % 5 == 0)
        except RasterError as error:
            refused += 1
            assert "\n" not in str(error)
            assert path.name in str(error) or "tiles.tif" in str(error), seed  # the VRT's source
        else:
            whole = expected[path.name]
            same = np.array_equal(np.ma.getmaskarray(read), np.ma.getmaskarray(whole))
            assert not cut or (same and np.array_equal(read.filled(0), whole.filled(0))), seed
        shutil.rmtree(folder)
    assert refused > 5


@pytest.mark.parametrize("name", ["tiles", "strips"])
def test_a_file_cut_anywhere_is_refused(tmp_path, name: str) -> None:
    """Also where only a mask's directory or a band's texts are gone: GDAL would read on without them."""
    sound = sound_rasters(tmp_path)[name]
    content = sound.read_bytes()
    cut = tmp_path / "cut.tif"
    for length in {*range(0, len(content), len(content) // 40), *range(len(content) - 60, len(content), 7)}:
        cut.write_bytes(content[:length])
        with pytest.raises(RasterError, match=r"cut\.tif: (truncated: |not a raster|an empty file)"):
            open_raster(cut)
    cut.write_bytes(content)
    assert np.array_equal(open_raster(cut).read(), open_raster(sound).read())


def test_big_tiffs_and_either_byte_order_are_looked_through(write_tif, noise, tmp_path) -> None:
    for options in ({"bigtiff": "yes"}, {"endianness": "big"}, {"bigtiff": "yes", "endianness": "big"}):
        path = write_tif(noise(2, dtype="uint16"), **options)
        assert np.array_equal(open_raster(path).read(), noise(2, dtype="uint16"))
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(RasterError, match=r"scene\.tif: truncated: "):
            open_raster(path)


@pytest.mark.parametrize("metadata", [{}, {"zarr_format": 3}, [], None, {"node_type": "array"}, "no json"])
def test_every_function_of_a_store_names_it(tmp_path, metadata: object) -> None:
    store = tmp_path / "broken.zarr"
    (store / "0").mkdir(parents=True)
    for place in (store, store / "0"):
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        (place / "zarr.json").write_text(text)
    for function in (open_raster, build_pyramid, lambda path: resume_zarr(tmp_path / "a.zarr", path)):
        with pytest.raises(RasterError, match=r"broken\.zarr"):
            function(store)
