"""Train a face backbone under a class-sharded margin head.

    torchrun --standalone --nproc-per-node 2 -m bigvision.jobs.train_face --data folder:PATH --out RUN ...

The backbone is replicated (DistributedDataParallel), the head's classes are spread over the ranks. A run is
a function of its
options: order, augmentation, sampling and initialisation come from (seed, step), so one that goes on from a
checkpoint continues the curve of one that was never interrupted.
"""

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bigvision.gating import counter_key
from bigvision.jobs.faces import checkpoint
from bigvision.jobs.faces.agreement import FaceJobError, World, world_of_torchrun
from bigvision.jobs.faces.centres import open_centres
from bigvision.jobs.faces.curves import Curves, Point, Score
from bigvision.jobs.faces.embed import Embedder
from bigvision.jobs.faces.evaluation import check_verifiable, open_evaluation, verify_source
from bigvision.jobs.faces.options import TrainOptions, parse
from bigvision.jobs.faces.plan import Plan, make_plan
from bigvision.jobs.faces.report import Reporter
from bigvision.jobs.faces.schedule import Schedule
from bigvision.jobs.faces.step import DivergedError, Stepped, Stepper
from bigvision.models.embedding import build_backbone, save_backbone
from bigvision.models.global_norm import average_statistics, with_global_norms
from bigvision.models.weights import load_weights
from datasets.face_batches import FEWEST, TrainingBatches, training_loader
from datasets.face_images import FaceSource
from datasets.face_index import left_out_text
from datasets.faces import check_labels, open_faces
from heads import ShardedMarginHead

FIXED = (
    "backbone",
    "dim",
    "image_size",
    "margin",
    "scale",
    "storage",
    "head_optimizer",
    "batch_size",
    "seed",
)


@dataclass
class Run:
    """A training run on one rank."""

    options: TrainOptions
    world: World
    plan: Plan
    batches: TrainingBatches
    training: checkpoint.Training
    stepper: Stepper
    schedule: Schedule
    evaluations: dict[str, FaceSource]

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {name: getattr(self.options, name) for name in FIXED} | {"classes": self.plan.classes}


def train(options: TrainOptions, world: World) -> None:
    """Train on this rank; called on all ranks together.

    Raises on all ranks together: `FaceJobError` (bad data, a run that can't fit, a failed save),
    `DivergedError`, ValueError (labels out of range).
    """
    with world.together("reading the data"):
        source = open_faces(options.data, size=options.image_size)
        told = [check_labels(source, options.data), left_out_text(getattr(source, "left_out", {}))[2:]]
        classes = options.class_count(source.num_classes)
        batches = TrainingBatches(
            source,
            options.batch_size,
            rank=world.rank,
            world=world.size,
            seed=options.seed,
            size=options.image_size,
            augment=options.augment,
            fewest=FEWEST * _parts(options, world),
        )
        evaluations = {spec: open_evaluation(spec, options.image_size) for spec in options.evaluate}
        for spec, set_of_pairs in evaluations.items():
            check_verifiable(set_of_pairs, spec)
    with world.together("planning"):
        plan = make_plan(options, classes, len(source), world.size, world.local_size)
        if world.leads:
            print("\n".join([*filter(None, told), *plan.lines()]), flush=True)
        plan.check()
    if options.plan:
        return
    with world.together("preparing"):
        start = checkpoint.starting_point(options.out, options.resume, restarted=world.restarts > 0)
        backbone = _backbone(options, world)
        centres = None if options.centres is None else open_centres(options.centres)
        if world.leads:  # only now: a refused command leaves those of the run that stands there
            (options.out / "options.json").write_text(json.dumps(options.described(), indent=1))
    # What follows speaks with the other ranks, and tells them of its own failures.
    head = _head(options, plan, world)
    if centres is not None:
        head.set_centers(centres)
    training = _training(options, world, head, backbone)
    stepper, schedule = _stepper(options, plan, world, training)
    run = Run(options, world, plan, batches, training, stepper, schedule, evaluations)
    step = 0 if start is None else checkpoint.load(start, training, run.settings, world)
    _loop(run, step)


def _backbone(options: TrainOptions, world: World) -> nn.Module:
    torch.manual_seed(options.seed)
    backbone = build_backbone(options.network())
    if options.weights is not None:
        load_weights(backbone, options.weights)
    if options.batch_norm == "global":
        with_global_norms(backbone)
    return backbone.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _head(options: TrainOptions, plan: Plan, world: World) -> ShardedMarginHead:
    return ShardedMarginHead(
        plan.classes,
        options.dim,
        options.head_margin(),
        options.scale,
        active=options.gate(),
        storage=options.storage,
        place=options.place,
        optimizer=options.head_optimizer_settings(),
        seed=options.seed,
        compiled=options.compiles(plan.classes, world.size),
        device=world.device,
    )


def _training(
    options: TrainOptions, world: World, head: ShardedMarginHead, backbone: nn.Module
) -> checkpoint.Training:
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=options.dtype == "float16")
    return checkpoint.Training(head, backbone, options.network(), optimizer, scaler)


def _parts(options: TrainOptions, world: World) -> int:
    """Parts in which every rank passes its images, as many on one with damaged records as on the others."""
    return max(1, min(options.accumulate, options.batch_size // world.size // FEWEST))


def _stepper(
    options: TrainOptions, plan: Plan, world: World, training: checkpoint.Training
) -> tuple[Stepper, Schedule]:
    backbone: nn.Module = training.backbone
    if world.size > 1:
        with warnings.catch_warnings():  # newer versions rename the argument, older ones know only this one
            warnings.simplefilter("ignore", FutureWarning)
            backbone = DistributedDataParallel(backbone, broadcast_buffers=False)
    stepper = Stepper(
        backbone,
        training.head,
        training.optimizer,
        world.device,
        getattr(torch, options.dtype),
        _parts(options, world),
        options.clip,
        training.scaler,
        world,
    )
    warmup = round(options.warmup * plan.steps_per_epoch)
    return stepper, Schedule(options.lr, plan.steps, warmup, options.schedule, options.power)


def _loop(run: Run, start: int) -> None:
    options, world, plan = run.options, run.world, run.plan
    with world.together("opening the curves"):
        curves = Curves(options.out, start) if world.leads else None
    save_every = options.save_every or plan.steps_per_epoch
    evaluate_every = max(1, round(options.evaluate_every * plan.steps_per_epoch))
    loader = training_loader(
        run.batches, start, plan.steps, workers=options.workers, pin_memory=world.device.type == "cuda"
    )
    damaged: set[str] = set()
    meter = _Meter(world, options.batch_size)
    with Reporter(world.leads, plan.steps, start) as reporter:
        if start:
            reporter.say(f"going on from step {start}")
        iterator = iter(loader)
        for step in range(start, plan.steps):
            stepped, lr = _step(run, iterator, step)
            meter.count()
            damaged.update(stepped.damaged)
            done = step + 1
            if done % options.log_every == 0 or done == plan.steps:
                found = set().union(*world.gather(damaged))
                point = meter.point(done, done / plan.steps_per_epoch, stepped, lr, len(found))
                with world.together("writing the curves"):
                    if curves is not None:
                        curves.add(point)
                        _write_damaged(options.out, found)
                reporter.progress(done, _line(point, plan.steps))
            if done % save_every == 0 or done == plan.steps:
                _save(run, done, curves)  # before an evaluation, which may fail
            if run.evaluations and (done % evaluate_every == 0 or done == plan.steps):
                _evaluate(run, done, curves, reporter)
    if curves is not None:
        curves.close()


def _step(run: Run, iterator: Any, step: int) -> tuple[Stepped, float]:
    lr = run.schedule(step)
    run.training.head.lr = lr
    for group in run.training.optimizer.param_groups:
        group["lr"] = lr
    try:
        return run.stepper(iterator, counter_key(run.options.seed, step, run.world.rank)), lr
    except (DivergedError, ValueError) as error:
        where = f"step {step + 1}, rank {run.world.rank}, learning rate {lr:g}"
        if isinstance(error, FaceJobError):
            raise FaceJobError(f"{where}: {error}", error.transient) from error
        kind = DivergedError if isinstance(error, DivergedError) else ValueError
        raise kind(f"{where}: {error}") from error


def _evaluate(run: Run, step: int, curves: Curves | None, reporter: Reporter) -> None:
    average_statistics(run.training.backbone, run.world.size)
    embedder = Embedder(
        run.training.backbone, run.options.image_size, run.world.device, getattr(torch, run.options.dtype)
    )
    for spec, source in run.evaluations.items():
        with run.world.together(f"evaluating {spec}"):
            found = verify_source(embedder, source, spec, run.world).verification
        tar = found.tar_at_far.get(1e-3, nan)
        with run.world.together("writing the curves"):
            if curves is not None:
                curves.add(Score(step, spec, found.accuracy, found.spread, found.threshold, tar))
                curves.draw()
        reporter.say(f"step {step}: {spec} accuracy {found.accuracy:.4f} +- {found.spread:.4f}")


def _save(run: Run, step: int, curves: Curves | None) -> None:
    average_statistics(run.training.backbone, run.world.size)
    folder = run.options.out / "checkpoints"
    checkpoint.save(folder, run.training, step, run.settings, run.world, run.options.keep)
    with run.world.together("saving the backbone"):
        if curves is not None:
            curves.draw()
            save_backbone(run.training.backbone, run.training.spec, run.options.out / "backbone.safetensors")


class _Meter:
    """Throughput since the last line, of all ranks."""

    def __init__(self, world: World, batch_size: int) -> None:
        self.world, self.batch_size = world, batch_size
        self.steps, self.since = 0, time.perf_counter()

    def count(self) -> None:
        self.steps += 1

    def point(self, step: int, epoch: float, stepped: Stepped, lr: float, damaged: int) -> Point:
        now = time.perf_counter()
        rate = self.steps * self.batch_size / (now - self.since)
        self.steps, self.since = 0, now
        memory = self.world.sum(_memory_mib(self.world.device))
        return Point(step, epoch, stepped.loss, lr, stepped.gradient_norm, rate, memory, damaged)


def _memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20


def _line(point: Point, steps: int) -> str:
    text = (
        f"step {point.step}/{steps}  epoch {point.epoch:.2f}  loss {point.loss:.4f}  lr {point.lr:.4g}  "
        f"{point.samples_per_second:.1f} samples/s  {point.memory_mib / 1024:.2f} GiB in all ranks"
    )
    return f"{text}  {point.damaged} damaged records" if point.damaged else text


def _write_damaged(folder: Path, damaged: set[str]) -> None:
    if damaged:
        text = "".join(f"{name}\n" for name in sorted(damaged))
        (folder / "damaged.txt").write_text(text, errors="backslashreplace")


def device_of(options: TrainOptions) -> torch.device:
    """The kind of device that `--device` means here."""
    chosen = options.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(chosen)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank from a command line; a refusal is one sentence on standard error and exit status 1."""
    try:
        options = parse(arguments, "python -m bigvision.jobs.train_face")
        with world_of_torchrun(device_of(options)) as world:
            _guarded(options, world)
    except (DivergedError, ValueError, OSError) as error:
        sys.exit(f"bigvision: {error}")


def _guarded(options: TrainOptions, world: World) -> None:
    """Train; remember a refusal, so that a restart by torchrun ends at once instead of repeating it."""
    marker = options.out / "stopped.json"
    with world.together("opening the run"):
        if world.restarts and marker.is_file():
            raise ValueError(json.loads(marker.read_text())["why"])
        if world.leads:
            options.out.mkdir(parents=True, exist_ok=True)
            marker.unlink(missing_ok=True)
    if world.restarts and options.resume == "none":
        options = parse_again(options)
    try:
        train(options, world)
    except (DivergedError, ValueError) as error:
        if world.leads and not getattr(error, "transient", False):
            marker.write_text(json.dumps({"why": str(error)}))
        raise


def parse_again(options: TrainOptions) -> TrainOptions:
    """The options of a run that torchrun restarted: it goes on from its own last checkpoint."""
    return TrainOptions(**{**vars(options), "resume": "auto"})


if __name__ == "__main__":
    main()
