"""A training run is gone on with only where nothing that decides its weights can have changed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from process_scenes import random_pixels, write_scene

from bigvision.jobs.train_raster.job import _fingerprint
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.models.spec import load_model
from datasets.pairs import Pair

VRT = (
    '<VRTDataset rasterXSize="24" rasterYSize="24"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
    '<SourceFilename relativeToVRT="1">{}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
)
MODEL = "from torch import nn\ndef factory():\n    return nn.Conv2d(1, 2, {})\n"


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    write_scene(tmp_path / "in.tif", random_pixels((1, 24, 24), 1))
    write_scene(tmp_path / "labels.tif", np.ones((1, 24, 24), np.uint8))
    (tmp_path / "inner.vrt").write_text(VRT.format("in.tif"))
    (tmp_path / "scene.vrt").write_text(VRT.format("inner.vrt"))
    (tmp_path / "model.py").write_text(MODEL.format(1))
    return TrainOptions(model=f"{tmp_path}/model.py:factory")


def asked(folder: Path, options: TrainOptions) -> tuple[str, tuple[str, ...]]:
    pair = Pair(str(folder / "scene.vrt"), str(folder / "labels.tif"), "train")
    subject: Any = SimpleNamespace(model=load_model(options.model), files=())
    return _fingerprint((pair,), options, subject, 1)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a scene behind its vrts": lambda at: write_scene(at / "in.tif", random_pixels((1, 24, 24), 2)),
    "labels": lambda at: write_scene(at / "labels.tif", np.zeros((1, 24, 24), np.uint8)),
    "the model": lambda at: (at / "model.py").write_text(MODEL.format(3)),
    "its text": lambda at: (at / "model.py").write_text(MODEL.format(1) + "# no difference\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_another_run(tmp_path: Path, options: TrainOptions, change: str) -> None:
    before = asked(tmp_path, options)
    assert asked(tmp_path, options) == before and not before[1]
    CHANGES[change](tmp_path)
    assert asked(tmp_path, options) != before


def test_how_it_is_computed_makes_none(tmp_path: Path, options: TrainOptions) -> None:
    other = replace(options, memory="2GiB", rows=8, scratch=tmp_path, checkpoint_every=3, device="cpu")
    assert asked(tmp_path, other) == asked(tmp_path, options)
    assert asked(tmp_path, replace(options, lr=0.5)) != asked(tmp_path, options)


def test_what_can_not_be_known_is_said(
    tmp_path: Path, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiling.behind._NAMED", {"VRT"})
    one, other = asked(tmp_path, options), asked(tmp_path, options)
    assert "in.tif" in one[1][0] and one[0] != other[0]
