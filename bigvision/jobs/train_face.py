"""Train a face backbone under a class-sharded margin head.

    torchrun --standalone --nproc-per-node 2 -m bigvision.jobs.train_face --data folder:PATH --out RUN ...

The backbone is replicated (DistributedDataParallel), the head's classes are spread over the ranks. A run is
a function of its
options: order, augmentation, sampling and initialisation come from (seed, step), so one that goes on from a
checkpoint continues the curve of one that was never interrupted.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bigvision.gating import counter_key
from bigvision.jobs.faces import checkpoint
from bigvision.jobs.faces.agreement import RENDEZVOUS, FaceJobError, World, world_of_torchrun
from bigvision.jobs.faces.centres import open_centres
from bigvision.jobs.faces.curves import Curves, Score
from bigvision.jobs.faces.damaged import DamagedRecords
from bigvision.jobs.faces.embed import Embedder
from bigvision.jobs.faces.evaluation import verify_source
from bigvision.jobs.faces.integrity import check_shared
from bigvision.jobs.faces.launch import STOPPED, lock_of, taken
from bigvision.jobs.faces.meter import Meter, line
from bigvision.jobs.faces.options import TrainOptions, parse
from bigvision.jobs.faces.orphans import end_with_parent
from bigvision.jobs.faces.plan import Plan
from bigvision.jobs.faces.preparation import Prepared, parts, prepare
from bigvision.jobs.faces.report import Reporter
from bigvision.jobs.faces.schedule import Schedule
from bigvision.jobs.faces.settings import data_state, differences, run_settings
from bigvision.jobs.faces.step import DivergedError, Stepped, Stepper
from bigvision.models.embedding import build_backbone, save_backbone
from bigvision.models.global_norm import average_statistics, with_global_norms
from bigvision.models.weights import load_weights
from bigvision.stopping import Stops
from datasets.face_batches import training_loader
from heads import ShardedMarginHead
from tiling.lock import locked


@dataclass
class Run:
    """A training run on one rank."""

    options: TrainOptions
    world: World
    prepared: Prepared
    training: checkpoint.Training
    stepper: Stepper
    schedule: Schedule
    settings: dict[str, Any]  # what a checkpoint must agree with


def train(options: TrainOptions, world: World, stops: Stops) -> None:
    """Train on this rank, up to the end or a request to stop; called on all ranks together.

    Raises on all ranks together: `FaceJobError` (bad data, a run that can't fit, a failed save),
    `DivergedError`, ValueError (labels out of range, too many damaged records).
    """
    with world.together("preparing"):
        prepared = prepare(options, world.rank, world.size, world.local_size)
        if world.leads:
            print("\n".join(prepared.lines()), flush=True)
        prepared.plan.check()
    if options.plan:
        return
    start, told = checkpoint.starting_point(options.out, options.resume, world)
    with world.together("preparing"):
        state = data_state(prepared.source) if world.leads else {}
    settings = run_settings(options, prepared.plan.classes, world.gather(state)[0])
    with world.together("preparing"):
        if start is not None:
            told += differences(checkpoint.read_position(start).settings, settings, options.changed)
        backbone = _backbone(options, world)
        centres = None if options.centres is None else open_centres(options.centres)
        if world.leads:  # only now: a refused command leaves those of the run that stands there
            print("".join(f"{text}\n" for text in told), end="", flush=True)
            (options.out / "options.json").write_text(json.dumps(options.described(), indent=1))
    # What follows speaks with the other ranks, and tells them of its own failures.
    head = _head(options, prepared.plan, world)
    if centres is not None and start is None:
        head.set_centers(centres)
    training = _training(options, world, head, backbone)
    stepper, schedule = _stepper(options, prepared.plan, world, training, stops)
    run = Run(options, world, prepared, training, stepper, schedule, settings)
    _loop(run, 0 if start is None else checkpoint.load(start, training, world).step)


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


def _stepper(
    options: TrainOptions, plan: Plan, world: World, training: checkpoint.Training, stops: Stops
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
        parts(options, world.size),
        options.clip,
        training.scaler,
        world,
        lambda: stops.asked,
    )
    warmup = round(options.warmup * plan.steps_per_epoch)
    return stepper, Schedule(options.lr, plan.steps, warmup, options.schedule, options.power)


def _loop(run: Run, start: int) -> None:
    options, world, plan = run.options, run.world, run.prepared.plan
    with world.together("opening the curves"):
        curves = Curves(options.out, start) if world.leads else None
    save_every = options.save_every or plan.steps_per_epoch
    evaluate_every = max(1, round(options.evaluate_every * plan.steps_per_epoch))
    loader = training_loader(
        run.prepared.batches,
        start,
        plan.steps,
        workers=options.workers,
        pin_memory=world.device.type == "cuda",
    )
    damaged = DamagedRecords(world, options.max_damaged, plan.steps_per_epoch * options.batch_size)
    meter = Meter(world, options.batch_size)
    with Reporter(world.leads, plan.steps, start) as reporter:
        if start:
            reporter.say(f"going on from step {start}")
        iterator = iter(loader)
        for step in range(start, plan.steps):
            stepped, lr = _step(run, iterator, step)
            meter.count()
            damaged.add(stepped.read, stepped.damaged)
            done = step + 1
            last = done == plan.steps or stepped.stop
            saves = done % save_every == 0 or last
            if done % options.log_every == 0 or saves:
                share = damaged.gather(done)
                with world.together("writing the curves"):
                    point = meter.point(done, done / plan.steps_per_epoch, stepped, lr, len(damaged.names))
                    if curves is not None:
                        curves.add(point)
                        damaged.write(options.out)
                reporter.progress(done, line(point, plan.steps, share))
            if saves:
                _save(run, done, curves)  # before an evaluation, which may fail
            if stepped.stop and done < plan.steps:
                reporter.say(f"told to stop: step {done} is saved; --resume auto goes on from there")
                break
            if run.prepared.evaluations and (done % evaluate_every == 0 or done == plan.steps):
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
    for spec, source in run.prepared.evaluations.items():
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


def device_of(options: TrainOptions) -> torch.device:
    """The kind of device that `--device` means here."""
    chosen = options.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(chosen)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank from a command line; a refusal is one sentence on standard error and exit status 1, a stop
    by a signal has that signal's.
    """
    if "RANK" in os.environ:  # of torchrun: a shell may end before its commands
        end_with_parent()
    try:
        options = parse(arguments, "python -m bigvision.jobs.train_face")
        with Stops(passed_on=False) as stops, world_of_torchrun(device_of(options)) as world:
            _guarded(options, world, stops)
    except (DivergedError, ValueError, OSError) as error:
        sys.exit(f"bigvision: {error}")
    if stops.status and RENDEZVOUS not in os.environ:  # where it is, the launcher has been told, too
        sys.exit(stops.status)


def _guarded(options: TrainOptions, world: World, stops: Stops) -> None:
    """Train; a refusal is remembered, so that a restart by torchrun ends at once instead of repeating it."""
    launcher, opened = os.environ.get(RENDEZVOUS), False
    with ExitStack() as held:
        try:
            _open_run(options, world, held)
            opened = True
            restarted = world.restarts > 0 and options.resume == "none"
            train(replace(options, resume="auto") if restarted else options, world, stops)
        except (DivergedError, ValueError) as error:
            if getattr(error, "transient", False):
                raise
            # A folder that could not be opened may be another run's.
            folder = Path(launcher) if launcher else options.out if opened else None
            if world.leads and folder is not None:
                (folder / STOPPED).write_text(json.dumps({"why": str(error)}))
            if launcher is None:
                raise  # `bigvision face train` reads the reason; torchrun would report dead ranks


def _open_run(options: TrainOptions, world: World, held: ExitStack) -> None:
    """The run's folder, locked for this run and the same for all ranks."""
    marker = options.out / STOPPED
    with world.together("opening the run"):
        if world.restarts and marker.is_file():
            raise ValueError(json.loads(marker.read_text())["why"])
        if world.leads:
            options.out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(lock_of(options.out), taken(options.out)))
            marker.unlink(missing_ok=True)
    check_shared(options.out, world)


if __name__ == "__main__":
    main()
