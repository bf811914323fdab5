"""Where the work on one scene begins: at what an interrupted run left, or from nothing."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from bigvision.jobs.process.geometry import Analysis, analyse
from bigvision.jobs.process.ledger import Ledger
from bigvision.jobs.process.memory import TilesForecast, base_bytes, coordinator_bytes, gib, refused
from bigvision.jobs.process.network import NetworkSpec, load_network
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.phases import PhaseStore
from bigvision.jobs.process.planning import CORES, Plan, plan_of, plan_scene, plan_stream
from bigvision.jobs.process.precision import Precision, choose_precision
from bigvision.jobs.process.provenance import Provenance
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.scene import Scene
from bigvision.jobs.process.store import create_store
from tiling import ZarrWriter, resume_zarr


@dataclass(frozen=True)
class Beginning:
    """A run that is ready to go on.

    told: what the user should know of what was found; empty where all is as expected.
    """

    plan: Plan
    writer: ZarrWriter
    told: str = ""


def begin(
    ledger: Ledger,
    target: Path,
    scene: Scene,
    spec: NetworkSpec,
    options: Options,
    origin: Provenance,
    precision: Precision | None = None,
) -> Beginning:
    """Go on with what the ledger holds of this very run, as far as it is sound; begin anew if not.

    The run's cut is kept, and with less memory or more workers is computed in smaller steps.

    Raises:
        ValueError: nothing can be cut, or what is finished can't be gone on with in this memory.
    """
    network = load_network(spec)
    kind = network.nature.result(options)
    record, wrong = ledger.read()
    told = f"the unfinished run in {ledger.folder} was damaged ({wrong}) and is made anew" if wrong else ""
    if record is not None and record["fingerprint"] == origin.fingerprint:
        try:
            plan = plan_of(record.get("plan"))
            writer = _resumed(ledger, target, scene, kind, plan, options)
            harmed = ledger.check()
            harmed += not PhaseStore(ledger.sums, 0).check(ledger.rows)
        except Exception as error:  # whatever a damaged folder makes of its reader
            why = " ".join(str(error).split()) or type(error).__name__
            told = f"the unfinished run in {ledger.folder} was damaged ({why}) and is made anew"
        else:
            if harmed:
                told = f"{harmed} part(s) of the unfinished run were damaged and are made anew"
            analysis = analyse(network.module, scene.shape)
            return Beginning(
                refit(ledger, plan, scene, kind, analysis, options, network.module), writer, told
            )
    elif record is not None:
        told = "another command's unfinished result was given up for this one"
    ledger.clear()
    analysis = analyse(network.module, scene.shape)
    precision = precision or choose_precision(scene, spec, options, kind, analysis.stride)
    disk = shutil.disk_usage(ledger.folder).free
    plan = plan_scene(
        scene.shape,
        scene.raster.dtype,
        kind,
        analysis,
        options,
        precision,
        network.module,
        disk,
        scene.frame,
    )
    plan = plan.reusing(origin.reused) if origin.reused else plan
    writer = _created(ledger, target, scene, kind, plan, options)
    ledger.begin({"fingerprint": origin.fingerprint, "plan": plan.record(), "of": origin.record})
    return Beginning(plan, writer, told)


def refit(
    ledger: Ledger,
    plan: Plan,
    scene: Scene,
    kind: ResultKind,
    analysis: Analysis,
    options: Options,
    model: nn.Module,
) -> Plan:
    """The same cut, computed so that it fits the memory and workers that the command has now."""
    workers = options.workers or 1
    if plan.processes == workers and plan.predicted_bytes <= options.memory_bytes:
        return plan
    try:
        if plan.engine == "tiles":
            return _smaller_tiles(plan, scene, kind, analysis, options)
        wishes = replace(options, tile=plan.tile, scratch_limit=str(plan.scratch))
        precision = Precision(plan.dtype, plan.agreement)
        fitted = plan_stream(
            scene.shape,
            scene.raster.dtype,
            kind,
            analysis,
            wishes,
            precision,
            model,
            2 * plan.scratch,
            scene.frame,
        )
        if (fitted.halo, fitted.tile, fitted.phases) != (plan.halo, plan.tile, plan.phases):
            raise ValueError("its bands can't be cut alike any more")
    except ValueError as error:
        raise ValueError(
            f"{error}. {ledger.folder} holds what was finished with {gib(plan.predicted_bytes)} in "
            f"{plan.processes} process(es): go on with as much, or remove that folder to begin anew"
        ) from error
    return replace(plan, step=fitted.step, predicted_bytes=fitted.predicted_bytes, processes=workers)


def _smaller_tiles(plan: Plan, scene: Scene, kind: ResultKind, analysis: Analysis, options: Options) -> Plan:
    """Tiles computed whole, or by the largest smaller ones that fit."""
    workers = options.workers or 1
    each = (options.memory_bytes - coordinator_bytes(options)) // workers
    forecast = TilesForecast(scene.shape, scene.raster.dtype, kind, analysis, plan.dtype, base_bytes(options))
    if forecast(plan.tile, plan.halo) <= each:
        inner, needed = 0, forecast(plan.tile, plan.halo)
    else:
        exact = not analysis.inexact
        sides = [side for side in CORES if side < plan.tile and side % plan.stride == 0] if exact else []
        sizes = [(forecast.within(plan.tile, side, plan.halo), side) for side in sides]
        fitting = [(side, needed) for needed, side in sizes if needed <= each]
        if not fitting:
            least = min((needed for needed, _ in sizes), default=forecast(plan.tile, plan.halo))
            raise refused(options, f"a tile of {plan.tile} px", least)
        inner, needed = max(fitting)
    predicted = needed * workers + coordinator_bytes(options)
    return replace(plan, inner=inner, predicted_bytes=predicted, processes=workers)


def _resumed(
    ledger: Ledger, target: Path, scene: Scene, kind: ResultKind, plan: Plan, options: Options
) -> ZarrWriter:
    """The store of an unfinished run; ValueError where it is not the one that this run would make."""
    writer = resume_zarr(target, ledger.pixels, overwrite=options.overwrite)
    _, height, width = scene.written.shape
    rows, columns, _ = plan.shard(scene.written.shape, kind)
    if (writer.shape, writer.dtype) != ((kind.bands, height, width), kind.dtype):
        raise ValueError(f"its store is {writer.shape} {writer.dtype}")
    tall, wide = writer.shard
    if tall < min(rows, height) or wide < min(columns, width):
        raise ValueError(f"its store has files of {tall} x {wide} pixels")
    return writer


def _created(
    ledger: Ledger, target: Path, scene: Scene, kind: ResultKind, plan: Plan, options: Options
) -> ZarrWriter:
    rows, columns, chunk = plan.shard(scene.written.shape, kind)
    return create_store(ledger, target, scene, kind, options, chunk=chunk, shard=(rows, columns))
