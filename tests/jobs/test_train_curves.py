"""A run's curves, whatever there is of it."""

import warnings
from pathlib import Path

import pytest

from bigvision.jobs.train_raster.curves import Row, draw_curves

NONE = float("nan")


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        ([], []),
        ([{"step": 1.0, "loss": 0.0}], []),
        ([{"step": 1.0, "loss": NONE}], []),
        ([{"step": 1.0, "loss": 0.0}], [{"step": 1.0, "loss": 0.0, "mean_iou": NONE, "iou_0": NONE}]),
        ([{"step": 1.0, "loss": 0.5}], [{"step": 1.0, "loss": NONE, "mean_iou": NONE, "iou_0": NONE}]),
    ],
    ids=["nothing", "no labels", "no number", "no labels held out", "no score"],
)
def test_curves_are_drawn_without_a_warning(
    training: list[Row], validation: list[Row], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(training, validation, 1, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0
