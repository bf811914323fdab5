"""One scene from its file to its result, going on from whatever an interrupted run left."""

import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bigvision.jobs.process.beginning import begin
from bigvision.jobs.process.cluster import threads_each
from bigvision.jobs.process.computing import Computation, Interrupted
from bigvision.jobs.process.finishing import finish
from bigvision.jobs.process.ledger import Ledger, open_ledger, remove_left
from bigvision.jobs.process.network import NetworkSpec, load_network, network_for, network_spec
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.places import check_places, check_record, fingerprint_at, is_ours
from bigvision.jobs.process.planning import Plan
from bigvision.jobs.process.precision import Precision
from bigvision.jobs.process.previous import Previous, Reuse, copy_unchanged, open_previous, reuse_of
from bigvision.jobs.process.provenance import Provenance, provenance
from bigvision.jobs.process.routed import run_routed
from bigvision.jobs.process.scene import Scene, open_scene
from bigvision.jobs.process.units import Work
from bigvision.streaming.memory import freed_memory_kept
from tiling import ZarrWriter, gdal_cache
from tiling.addresses import without_secrets

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Outcome:
    """What became of one scene. status: "done", "already done" or "failed" (then `error` says why).

    pixels: of the scene; computed: of them in this run (the rest was finished before); seconds and
    peak_bytes (all processes here): of this run; routed: where its regions went, if they were.
    """

    scene: str
    result: str
    status: str
    error: str = ""
    warning: str = ""
    pixels: int = 0
    computed: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    plan: Plan | None = None
    routed: str = ""

    def warned(self, told: str) -> "Outcome":
        """With one more warning, if there is one."""
        return replace(self, warning="; ".join(filter(None, (self.warning, told))))


class Watcher:
    """Is told how a scene comes along; does nothing unless a subclass does."""

    def planned(self, scene: str, plan: Plan, pixels: int, left: int) -> None:
        """Work begins on a scene of `pixels`, `left` of which no earlier run has done."""

    def stage(self, text: str, pixels: int) -> None:
        """A stage of routed work begins: `pixels` will be computed."""

    def computed(self, pixels: float) -> None:
        """So many more pixels are stored."""

    def finishing(self, fraction: float) -> None:
        """The pixels are complete; the result's own format is written."""


def run_scene(
    paths: tuple[str, ...],
    target: Path,
    options: Options,
    *,
    client: "Client | None" = None,
    watcher: Watcher | None = None,
    precision: Precision | None = None,
) -> Outcome:
    """Process one scene into `target`; ValueError or OSError where it can't be done."""
    begun = time.perf_counter()
    watcher = watcher or Watcher()
    check_places(paths, target, options)
    scene = open_scene(paths, options)
    spec = network_spec(options, scene.shape[0], scene=scene.shape[1:])
    origin = provenance(paths, options, network_for(scene.raster.name, spec), scene.shape)
    reuse = reuse_of(target, scene, options)
    if reuse is not None:
        origin = origin.reusing(reuse.rule, reuse.source)
    nature = load_network(spec).nature
    nature.result(options)  # or it says what the network hasn't
    pixels = scene.frame.height * scene.frame.width
    outcome = Outcome(
        without_secrets(scene.raster.name),
        str(target),
        "done",
        warning=_warning(scene, origin, nature.told(options)),
        pixels=pixels,
    )
    if os.path.lexists(target) and is_ours(target, origin, options):
        remove_left(target)
        return replace(outcome, status="already done", seconds=time.perf_counter() - begun)
    ready = partial(_check_ready, target, scene, origin, paths, options)
    with open_ledger(target) as ledger, gdal_cache(), freed_memory_kept():
        if options.route is not None:
            routed = run_routed(ledger, target, scene, spec, options, origin, watcher, ready)
            ledger.remove()
            seconds = time.perf_counter() - begun
            outcome = _with_loss(outcome, routed.lost)
            return replace(outcome, computed=routed.computed, seconds=seconds, routed=routed.summary)
        previous = _previous(target, paths, scene, spec, options, origin, reuse)
        beginning = begin(ledger, target, scene, spec, options, origin, precision)
        plan, writer = beginning.plan, beginning.writer
        outcome = outcome.warned(beginning.told)
        computed = _compute(ledger, scene, spec, options, plan, writer, client, watcher, previous)
        tags = origin.tags(
            dtype=plan.dtype, exactness=plan.exactness, engine=plan.engine, tile=str(plan.tile)
        )
        ready()
        copied = Computation(scene, plan, writer, ledger).copied_pixels
        try:
            finish(ledger, writer, target, tags, watcher.finishing, overwrite=options.overwrite)
        except KeyboardInterrupt as stop:
            raise Interrupted(1.0) from stop
        outcome = _with_loss(outcome, ledger.strips.spoilt())
        ledger.remove()
    told = "" if previous is None else f"{copied / pixels:.0%} as in {previous}"
    seconds = time.perf_counter() - begun
    return replace(outcome, computed=computed, seconds=seconds, plan=plan, routed=told)


def _warning(scene: Scene, origin: Provenance, nature: str) -> str:
    """What the user should know of a scene before it is believed."""
    raster, about = scene.raster, scene.raster.profile.metadata
    placed = raster.crs is not None or about.gcps or about.rpcs
    told = [nature] if nature else []
    if not placed:
        told.append("the scene has no CRS, so the result has none")
    if about.scaled:
        band = next(band for band in about.bands if band.scaled)
        told.append(
            f"its bands carry scale and offset ({band.scale:g}, {band.offset:g}), which are not applied; "
            "--unscale applies them"
        )
    if origin.unknown:
        told.append(
            f"whether its files change can't be known ({origin.unknown[0]}): killed, this run begins anew, "
            "and typed again, the command doesn't take this result for its own"
        )
    return "; ".join(told)


def _with_loss(outcome: Outcome, lost: int) -> Outcome:
    """The same, which says how many pixels with data came to nothing."""
    if not lost:
        return outcome
    told = (
        f"{lost} of {outcome.pixels} pixels have data but are nodata in the result: what the network gave "
        "there is NaN or infinite"
    )
    return outcome.warned(told)


def _check_ready(
    target: Path, scene: Scene, origin: Provenance, paths: tuple[str, ...], options: Options
) -> None:
    """ValueError where the scene's files, or what stands at `target`, changed while the run went on."""
    if os.path.lexists(target):
        fingerprint_at(target)
    if options.route is not None:
        check_record(target)
    changed = origin.changed(paths)
    if changed:
        raise ValueError(
            f"{without_secrets(scene.raster.name)}: {changed} changed while the scene was processed; "
            "the same command begins anew"
        )


def _previous(
    target: Path,
    paths: tuple[str, ...],
    scene: Scene,
    spec: NetworkSpec,
    options: Options,
    origin: Provenance,
    reuse: Reuse | None,
) -> Previous | None:
    """The earlier run of `--previous`, checked."""
    if options.previous is None:
        return None
    return open_previous(target, paths, scene, origin, load_network(spec), options, reuse)


def _compute(
    ledger: Ledger,
    scene: Scene,
    spec: NetworkSpec,
    options: Options,
    plan: Plan,
    writer: ZarrWriter,
    client: "Client | None",
    watcher: Watcher,
    previous: Previous | None = None,
) -> int:
    """Compute the units that are left, here or on the cluster; returns how many pixels that was."""
    work = Computation(scene, plan, writer, ledger)
    if previous is not None:
        copy_unchanged(previous, work)
    pixels = work.pixels_left()
    watcher.planned(scene.raster.name, plan, work.pixels, pixels)
    final = replace(spec, dtype=plan.dtype, compile=options.compile)
    kind = load_network(spec).nature.result(options)
    engine = plan.runs(work.store, ledger.rows, scene.shape[1:])
    threads = threads_each(options)
    work.run(Work(scene, final, engine, kind, writer, ledger, threads), client, watcher.computed)
    return pixels
