"""Curves of a run: CSV files that a resumed run continues without a seam, and their picture."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigvision.jobs.train_raster.validation import Score
from tiling.publish import publish, staging_name

Row = dict[str, float]


class CurveLog:
    """An append-only CSV table whose first column is the step.

    On opening, rows beyond `last_step` (written after the checkpoint that a run resumes from, or torn by a
    kill) are dropped.
    """

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        self.path, self.columns = path, tuple(columns)
        kept = [row for row in read_curve(path) if row["step"] <= last_step]
        staging = staging_name(path)
        with staging.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(self.columns)
            table.writerows(_texts(row, self.columns) for row in kept)
        publish(staging, path)
        self._file = path.open("a", newline="")
        self._table = csv.writer(self._file, lineterminator="\n")

    def add(self, row: Row) -> None:
        """Append one row; it is in the file when this returns."""
        self._table.writerow(_texts(row, self.columns))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunCurves:
    """The curves of one run: training.csv, validation.csv, curves.png, and TensorBoard events if asked for.

    `folder` is None on ranks that write nothing; the mean loss is known on all.
    """

    def __init__(self, folder: Path | None, classes: int, last_step: int, tensorboard: bool = False) -> None:
        self.folder, self.classes = folder, classes
        self._losses: list[float] = []
        self._events: Any = None
        self._drawn = float("-inf")
        if folder is None:
            return
        scores = ("step", "loss", "accuracy", "mean_iou", *(f"iou_{k}" for k in range(classes)))
        self._training = CurveLog(folder / "training.csv", ("step", "rate", "loss"), last_step)
        self._validation = CurveLog(folder / "validation.csv", scores, last_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def add_step(self, step: int, rate: float, loss: float) -> None:
        """One step's learning rate and loss."""
        self._losses.append(loss)
        if self.folder is not None:
            self._training.add({"step": step, "rate": rate, "loss": loss})
            self._publish("train", step, {"loss": loss, "rate": rate})

    def add_score(self, step: int, score: Score) -> None:
        """One validation."""
        if self.folder is None:
            return
        row = {"loss": score.loss, "accuracy": score.accuracy, "mean_iou": score.mean_iou}
        row |= {f"iou_{k}": float(value) for k, value in enumerate(score.iou)}
        self._validation.add({"step": step, **row})
        self._publish("validation", step, row)

    def mean_loss(self, steps: int) -> float:
        """Of the last `steps` steps, as far as this process saw them."""
        recent = self._losses[-steps:]
        return sum(recent) / max(1, len(recent))

    def draw(self, *, at_most_every: float = 0.0) -> None:
        """Bring curves.png up to date, unless that was done less than so many seconds ago."""
        if self.folder is not None and time.monotonic() - self._drawn >= at_most_every:
            self._drawn = time.monotonic()
            training, validation = (
                read_curve(self.folder / name) for name in ("training.csv", "validation.csv")
            )
            draw_curves(training, validation, self.classes, self.folder / "curves.png")

    def _publish(self, kind: str, step: int, values: Row) -> None:
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> "RunCurves":
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self._training.close()
            self._validation.close()
        if self._events is not None:
            self._events.close()


def read_curve(path: Path) -> list[Row]:
    """The complete rows of a curve; none where there is no file."""
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({name: float(value) for name, value in row.items()})
            except (TypeError, ValueError):
                break
    return rows


def draw_curves(training: list[Row], validation: list[Row], classes: int, path: Path) -> None:
    """Loss and intersection over union by step, as a PNG picture at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if validation else 1  # without held-out scenes there is nothing to score
    figure = Figure(figsize=(4.5 * panels, 3.6), layout="constrained")
    loss, *scores = figure.subplots(1, panels, squeeze=False)[0]
    loss.plot([r["step"] for r in training], [r["loss"] for r in training], lw=0.8, alpha=0.6, label="train")
    steps = [r["step"] for r in validation]
    for score in scores:
        loss.plot(steps, [r["loss"] for r in validation], "o-", label="validation")
        for k in range(classes):
            score.plot(steps, [r[f"iou_{k}"] for r in validation], lw=0.8, label=f"class {k}")
        score.plot(steps, [r["mean_iou"] for r in validation], "k-", label="mean")
        score.set_ylim(0, 1)
        score.legend(fontsize=7, ncols=1 + classes // 8)
    if any(row["loss"] > 0 for row in (*training, *validation)):  # where nothing is labelled it is 0
        loss.set_yscale("log")
    loss.legend()
    for axes, name in zip((loss, *scores), ("loss", "IoU on held-out scenes"), strict=False):
        axes.set_xlabel("step")
        axes.set_title(name)
    staging = staging_name(path).with_suffix(".png")
    FigureCanvasAgg(figure).print_png(str(staging))
    publish(staging, path)


def _texts(row: Row, columns: Sequence[str]) -> list[str]:
    return [f"{row[name]:.9g}" for name in columns]
