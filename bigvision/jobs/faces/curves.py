"""The record of a run: a CSV that a resumed run continues, a picture, and TensorBoard where it is
installed."""

import csv
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from tiling.publish import complete


@dataclass(frozen=True)
class Point:
    """One line of the training curve."""

    step: int
    epoch: float
    loss: float
    lr: float
    gradient_norm: float
    samples_per_second: float
    memory_mib: float
    damaged: int


@dataclass(frozen=True)
class Score:
    """One line of the evaluations."""

    step: int
    data: str
    accuracy: float
    spread: float
    threshold: float
    tar_at_far_1e3: float


class Curves:
    """Writes `curve.csv`, `evaluations.csv`, `curves.png` and TensorBoard events into a folder.

    A run that goes on from `step` drops the lines behind it, so that the file is that of an uninterrupted
    run.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.points = _kept(folder / "curve.csv", Point, step)
        self.scores = _kept(folder / "evaluations.csv", Score, step)
        for name, kind, rows in (("curve.csv", Point, self.points), ("evaluations.csv", Score, self.scores)):
            with complete(folder / name) as place, place.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([field.name for field in fields(kind)])
                writer.writerows([list(asdict(row).values()) for row in rows])
        self._events: Any = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def add(self, row: Point | Score) -> None:
        """Append a line."""
        if isinstance(row, Point):
            name, prefix = "curve.csv", "train"
            self.points.append(row)
        else:
            name, prefix = "evaluations.csv", f"verify {row.data}"
            self.scores.append(row)
        with (self.folder / name).open("a", newline="") as file:
            csv.writer(file).writerow(list(asdict(row).values()))
        if self._events is not None:
            for key, value in asdict(row).items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{prefix}/{key}", value, row.step)

    def draw(self) -> None:
        """Draw loss, learning rate and verification accuracy over the steps."""
        if not self.points:
            return
        from matplotlib.figure import Figure

        panels = 2 if self.scores else 1
        figure = Figure((4.5 * panels, 4), layout="constrained")
        left, *others = figure.subplots(1, panels, squeeze=False)[0]
        steps = [point.step for point in self.points]
        left.plot(steps, [point.loss for point in self.points], color="tab:blue")
        left.set(xlabel="step", ylabel="loss")
        rate = left.twinx()
        rate.plot(steps, [point.lr for point in self.points], color="tab:gray", linewidth=0.8)
        rate.set_ylabel("learning rate")
        for right in others:
            _draw_scores(right, self.scores)
        with complete(self.folder / "curves.png") as place:
            figure.savefig(place, dpi=120)

    def close(self) -> None:
        """Draw the picture and close the event file."""
        self.draw()
        if self._events is not None:
            self._events.close()


def _draw_scores(axes: Any, scores: list[Score]) -> None:
    for data in dict.fromkeys(score.data for score in scores):
        mine = [score for score in scores if score.data == data]
        axes.plot([score.step for score in mine], [score.accuracy for score in mine], marker=".", label=data)
    axes.set(xlabel="step", ylabel="verification accuracy")
    axes.legend()


def _kept(path: Path, kind: type, step: int) -> list[Any]:
    if not path.is_file():
        return []
    types = get_type_hints(kind)
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            # A full disk or a power cut leaves half a line, which is no reason to end the run.
            with suppress(KeyError, TypeError, ValueError):
                rows.append(kind(**{name: types[name](value) for name, value in line.items()}))
    return [row for row in rows if row.step <= step]
