"""How many steps a run takes, and what it says where they are too few to learn from."""

from dataclasses import replace
from pathlib import Path

import pytest
from train_runs import FAST, quiet, write_pairs

from bigvision.jobs.train_raster import TrainOptions, train
from bigvision.jobs.train_raster.options import ENOUGH_STEPS


@pytest.mark.parametrize(
    ("crop", "epochs", "per_epoch", "steps"),
    [
        (0, None, 1, 100),
        (0, None, 3, 102),
        (0, None, 50, 500),
        (0, 2, 3, 6),
        (256, None, 3, 30),
        (64, 4, 5, 20),
    ],
)
def test_whole_scenes_have_enough_steps_unless_epochs_are_asked_for(
    crop: int, epochs: int | None, per_epoch: int, steps: int
) -> None:
    assert TrainOptions("a:b", crop=crop, epochs=epochs).steps(per_epoch) == steps


@pytest.mark.parametrize("epochs", [0, -1])
def test_epochs_are_at_least_one(epochs: int) -> None:
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        TrainOptions("a:b", epochs=epochs)


def test_few_steps_of_a_fresh_network_are_told_with_what_is_enough(tmp_path: Path) -> None:
    said: list[str] = []
    pairs = write_pairs(tmp_path)
    options = replace(FAST, epochs=1, steps_per_epoch=3)
    result = train(pairs, tmp_path / "run", options, said.append)
    (told,) = (line for line in said if "steps in all" in line)
    assert told.startswith("3 steps in all") and told.endswith("--epochs 34 makes as many")
    assert ENOUGH_STEPS <= 3 * 34
    said.clear()
    train(pairs, tmp_path / "more", replace(options, weights=result.weights), said.append)
    assert not any("steps in all" in line for line in said)
    train(pairs, tmp_path / "run", options, quiet)
