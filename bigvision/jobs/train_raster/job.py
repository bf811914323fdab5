"""Train a network on labelled scenes, resumable at any moment, on one process or under `torchrun`."""

import json
import math
import uuid
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from bigvision.jobs.train_raster.curves import Row, RunCurves, read_curve
from bigvision.jobs.train_raster.data import TrainingData, balanced_weights, channels_of, open_data
from bigvision.jobs.train_raster.losses import build_loss
from bigvision.jobs.train_raster.memory import most_demanding
from bigvision.jobs.train_raster.optimisation import OPTIMIZERS, learning_rate
from bigvision.jobs.train_raster.options import ENOUGH_STEPS, TrainOptions
from bigvision.jobs.train_raster.parallel import Ranks, joined_ranks
from bigvision.jobs.train_raster.progress import Progress
from bigvision.jobs.train_raster.routed import RoutedNetworks
from bigvision.jobs.train_raster.run_folder import RunFolder, fingerprint_of, open_run
from bigvision.jobs.train_raster.steps import Steps
from bigvision.jobs.train_raster.subject import OneNetwork, Subject
from bigvision.models.identity import architecture_hash, network_identity, state_hash
from bigvision.stopping import Asked, Stops
from bigvision.streaming.losses import Loss
from datasets.pairs import Pair, read_pairs
from tiling import gdal_cache
from tiling.addresses import without_secrets
from tiling.identity import file_hash, identity

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    score: the best row of the validation curve (step, loss, accuracy, mean_iou, iou_0 ...), None without
        held-out scenes. command: how `bigvision process` uses the weights.
    """

    folder: Path
    weights: Path
    steps: int
    score: Row | None
    command: str


def train(pairs_file: Path, out: Path, options: TrainOptions, say: Say = print) -> TrainingResult:
    """Train `options.model` on the scenes that `pairs_file` lists; everything goes to the folder `out`.

    Killed at any moment, the same call goes on from the last checkpoint and ends with the weights of an
    uninterrupted run; Ctrl-C and SIGTERM save one first. Under `torchrun` every rank calls it; rank 0 writes.

    Raises:
        ValueError: for input that doesn't fit (named), before any work starts; RuntimeError, naming step and
            places, where a loss or gradient is not finite or a file can't be written: the last checkpoint
            stays.
    """
    with joined_ranks(options.device) as ranks, gdal_cache():
        return _Run(pairs_file, out, options, ranks, say if ranks.leads else _silent).train()


def _silent(text: str) -> None:
    """What other ranks say."""


class _Run:
    """One run: what is fixed (data, options, folder) and what moves (weights, optimiser, best score)."""

    def __init__(self, pairs_file: Path, out: Path, options: TrainOptions, ranks: Ranks, say: Say) -> None:
        self.options, self.ranks, self.say = options, ranks, say
        pairs = read_pairs(pairs_file)
        self.subject = _subject(options, channels_of(pairs, options))
        self.model, self.classes = self.subject.model, self.subject.classes
        self.data = open_data(pairs, options, self.classes)
        self.model.to(ranks.device).to(memory_format=torch.channels_last)
        self.loss = _loss(options, self.data, ranks.device)
        self.optimizer: Optimizer = OPTIMIZERS[options.optimizer](
            [p for p in self.model.parameters() if p.requires_grad], options.lr, options.weight_decay
        )
        # Before the steps measure this machine, which is part of no run's identity.
        fingerprint, self.unknown = _fingerprint(pairs, options, self.subject, ranks.size)
        self.folder = RunFolder(out, fingerprint)
        with most_demanding() as attempt:
            with attempt():
                self.steps: Steps = self.subject.steps(self.data.train, self.loss, ranks)
            with attempt():
                self.score = self.subject.scorer(self.data.validation, ranks, say)
        self.total = options.steps(self.steps.per_epoch)
        self.done, self.best = 0, -1.0
        self.ended = True  # nothing of an epoch's end is still to be done
        self.kept: tuple[int, bool] | None = None  # (done, ended) of the last checkpoint
        self.stops, self.agreed = Stops(), False
        self.progress = Progress(say, self.total, self.steps.per_epoch)

    def train(self) -> TrainingResult:
        """All steps that are still to do."""
        with ExitStack() as stack:
            for why in self.unknown:
                self.say(
                    f"whether the data change can't be known ({why}): stopped, this run can't be gone on with"
                )
            self._resume(stack)
            if self.total < ENOUGH_STEPS and self.options.weights is None:
                enough = -(-ENOUGH_STEPS // self.steps.per_epoch)
                self.say(
                    f"{self.total} steps in all: a fresh network seldom learns more than the commonest class "
                    f"in fewer than {ENOUGH_STEPS}; --epochs {enough} makes as many"
                )
            if self.done == self.total and self.ended:
                self.say(f"{self.folder.path}: finished already ({self.total} steps)")
                return self._result()
            stack.enter_context(self.stops)
            stack.callback(self.steps.close)
            try:
                self._go_on(stack.enter_context(self._curves()))
            except Asked:
                self._stop()
                raise
            except (OSError, RuntimeError) as error:
                if self.stops.asked:  # another rank heard of it first, and is gone
                    self._stop(keep=self.steps.only_gradients)
                    raise Asked from error
                if isinstance(error, OSError):
                    raise self._failed(str(error)) from error
                raise
            if self.stops.asked:
                self._stop()
        return self._result()

    def _go_on(self, curves: RunCurves) -> None:
        """Step after step, until all are done or somebody asks for the end."""
        self.progress.begin(self.done)
        if not self.ended:
            self._end_epoch(curves)
        while self.done < self.total:
            curves.add_step(self.done + 1, *self._step())
            self.done += 1
            self.ended = self.done % self.steps.per_epoch != 0
            if self.agreed:
                self.ranks.average_buffers(self.model)
                raise Asked
            if not self.ended:
                self._end_epoch(curves)
                continue
            if self.done % self.options.steps_a_checkpoint == 0:
                self._checkpoint()
            self.progress.step(self.done, curves.mean_loss(self.done % self.steps.per_epoch))

    def _step(self) -> tuple[float, float]:
        """One optimiser step; its learning rate and its loss over all ranks."""
        options = self.options
        rate = learning_rate(options.lr, options.schedule, self.done, self.total, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            with self.stops.at_once() if self.steps.only_gradients else nullcontext():
                result = self.steps(self.model, self.done)
        except (ValueError, OSError, RuntimeError) as error:
            raise self._failed(f"step {self.done + 1}: {error}") from error
        weight = self.ranks.average_gradients(self.model, result.weight)
        share = (result.loss * result.weight / weight, self.stops.asked)
        sums = self.ranks.sum_(torch.tensor(share, dtype=torch.float64, device=self.ranks.device))
        loss, self.agreed = float(sums[0]), bool(sums[1])
        largest = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or float("inf"))
        if not (torch.isfinite(largest) and math.isfinite(loss)):
            raise self._failed(
                f"step {self.done + 1}: loss {loss}, gradient norm {float(largest)} at {result.places}"
            )
        self.optimizer.step()
        return rate, loss

    def _failed(self, why: str) -> RuntimeError:
        kept = "nothing is kept yet"
        if self.kept is not None:
            kept = f"the last checkpoint stands in {self.folder.path}, of step {self.kept[0]}"
        return RuntimeError(f"{why}; {kept}")

    def _stop(self, *, keep: bool = True) -> None:
        """Keep the state, which is that after step `done`, and say so."""
        if keep and self.done and self.kept != (self.done, self.ended):
            self._save()
        if self.kept is None:
            told = "no step was finished, and the same command begins again"
        elif self.kept == (self.total, True):
            told = f"all {self.total} steps are done"
        else:
            told = f"step {self.kept[0]} of {self.total} is kept in {self.folder.path}, "
            told += "and the same command goes on from there"
        self.say(f"stopped by {self.stops.name}: {told}")

    def _end_epoch(self, curves: RunCurves) -> None:
        self.ranks.average_buffers(self.model)
        better, scored = True, ""
        if self.data.validation:
            with self.stops.at_once():
                score = self.score()
            curves.add_score(self.done, score)
            scored = f"  held out: accuracy {score.accuracy:.4f}, mean IoU {score.mean_iou:.4f}"
            better = score.mean_iou > self.best
            self.best = max(self.best, score.mean_iou)
        if self.ranks.leads and better:
            self.subject.save(self.folder)
        self.ended = True
        self._checkpoint()
        curves.draw(at_most_every=0 if self.done == self.total else 30)
        self.progress.epoch(self.done, curves.mean_loss(self.steps.per_epoch), scored)

    def _checkpoint(self) -> None:
        self.ranks.average_buffers(self.model)
        self._save()

    def _save(self) -> None:
        if self.ranks.leads:
            self.folder.save_checkpoint(
                {
                    "step": self.done,
                    "ended": self.ended,
                    "best": self.best,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                }
            )
        self.kept = (self.done, self.ended)

    def _resume(self, stack: ExitStack) -> None:
        """Take the folder, and the state of its checkpoint if it has one; rank 0 goes first."""
        if self.ranks.leads:
            stack.enter_context(open_run(self.folder, self._asked(), overwrite=self.options.overwrite))
            self.folder.describe(self._description())
        self.ranks.barrier()
        state = self.folder.load_checkpoint()
        self.ranks.barrier()
        if state is None:
            return
        self.done, self.best, self.ended = int(state["step"]), float(state["best"]), bool(state["ended"])
        self.kept = (self.done, self.ended)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.done < self.total:
            self.say(f"{self.folder.path}: goes on from step {self.done} of {self.total}")

    def _curves(self) -> RunCurves:
        folder = self.folder.path if self.ranks.leads else None
        return RunCurves(folder, self.classes, self.done, self.options.tensorboard)

    def _asked(self) -> dict[str, object]:
        """The options as JSON keeps them."""
        return json.loads(without_secrets(json.dumps(asdict(self.options), default=str)))

    def _description(self) -> dict[str, object]:
        return {
            "options": self._asked(),
            "ranks": self.ranks.size,
            "classes": self.classes,
            "steps": self.total,
            "process": process_command(self.options, self.folder, self.subject.words(self.folder)),
        }

    def _result(self) -> TrainingResult:
        scores = read_curve(self.folder.path / "validation.csv")
        best = max(scores, key=lambda row: row["mean_iou"]) if scores else None
        command = process_command(self.options, self.folder, self.subject.words(self.folder))
        return TrainingResult(self.folder.path, self.folder.weights, self.done, best, command)


def _subject(options: TrainOptions, channels: int) -> Subject:
    if options.route is None:
        return OneNetwork(options, channels)
    return RoutedNetworks(options.route, options, channels)


def process_command(options: TrainOptions, folder: RunFolder, more: list[str]) -> str:
    """The `bigvision process` command that uses the weights of a run; `more`: words of its own."""
    words = ["bigvision process SCENE", f"--model '{options.model}'", f"--weights {folder.weights}"]
    if options.bands:
        words.append(f"--bands {','.join(map(str, options.bands))}")
    if options.scale != 1:
        words.append(f"--scale {options.scale:g}")
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values is not None:
            words.append(f"--{name} {','.join(f'{value:g}' for value in values)}")
    return " ".join([*words, *more, "--out DIR"])


def _loss(options: TrainOptions, data: TrainingData, device: torch.device) -> Loss:
    classes = len(data.counts)
    weights = options.class_weights
    if weights is None:
        return build_loss(options.loss)
    if isinstance(weights, str):
        return build_loss(options.loss, torch.from_numpy(balanced_weights(data.counts)).to(device))
    if len(weights) != classes or min(weights) < 0 or max(weights) == 0:
        raise ValueError(f"--class-weights {weights} for {classes} classes")
    return build_loss(options.loss, torch.tensor(weights, device=device))


# What decides how a run is computed, and not what comes of it.
_CUT = (
    "overwrite",
    "tensorboard",
    "device",
    "memory",
    "scratch",
    "scratch_limit",
    "rows",
    "checkpoint_every",
)


def _fingerprint(
    pairs: tuple[Pair, ...], options: TrainOptions, subject: Subject, world: int
) -> tuple[str, tuple[str, ...]]:
    """Of everything that decides the result: options, ranks, network, and every file behind the scenes.

    Also why some of these may change unseen; a run of such has a fingerprint that no other has.
    """
    asked = {
        name: value for name, value in asdict(options).items() if name not in (*_CUT, "model", "weights")
    }
    model = subject.model
    network = network_identity(options.model, model, state_hash(model), architecture_hash(model))
    seen = [identity(name) for pair in pairs for name in (pair.scene, pair.labels)]
    unknown = tuple(why for one in seen for why in one.unknown)
    about = [{name: without_secrets(str(value)) for name, value in asdict(pair).items()} for pair in pairs]
    files = [file_hash(Path(name)) if Path(name).is_file() else name for name in subject.files]
    once = uuid.uuid4().hex if unknown else ""
    facts = (asked, world, network, about, [one.files for one in seen], files, once)
    return fingerprint_of(*facts), unknown
