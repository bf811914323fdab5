"""`--route`: a cheap network everywhere, a gate, and the full network where the budget allows.

What is stored of each region is noted beside the pixels: a killed run goes on, and a run under another budget
or threshold (over a finished result, too) recomputes just the regions that go elsewhere now.

Legend: C bands, R, S rows and columns of regions.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from bigvision.jobs.process.engine import Piece
from bigvision.jobs.process.finishing import finish
from bigvision.jobs.process.geometry import graph_of
from bigvision.jobs.process.ledger import Ledger
from bigvision.jobs.process.network import Network, NetworkSpec, load_network, network_spec
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.region_store import RegionStore, file_side
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.route_state import (
    NOTHING,
    ROUTE_TAG,
    UNSURE,
    RouteState,
    copy_pixels,
    earlier_route,
    picture_file,
    record_file,
)
from bigvision.jobs.process.scene import Scene
from bigvision.jobs.process.store import create_store
from bigvision.jobs.process.strips import written
from bigvision.models.identity import network_identity
from bigvision.routing.merging import Rectangle
from bigvision.routing.plan import RoutePlan
from bigvision.routing.record import RouteRecord, route_summary
from bigvision.routing.route_file import RouteSpec, load_route
from bigvision.routing.scene import CHEAP, FULL, NAMES, SceneRouter
from tiling import Raster, ZarrWriter, resume_zarr
from tiling.identity import file_hash

if TYPE_CHECKING:
    from bigvision.jobs.process.provenance import Provenance

_MAX_PIXELS = 2048 * 2048


class RouteWatcher(Protocol):
    """Is told how a routed scene comes along."""

    def stage(self, text: str, pixels: int) -> None:
        """Work on so many pixels begins."""

    def computed(self, pixels: float) -> None:
        """So many more pixels are stored."""

    def finishing(self, fraction: float) -> None:
        """The pixels are complete; the result's own format is written."""


@dataclass(frozen=True)
class Routed:
    """What became of the regions: one line for the table, pixels computed in this run, dtype, and how many
    pixels with data came to nothing in this run."""

    summary: str
    computed: int
    dtype: str
    lost: int = 0


def route_of(options: Options) -> RouteSpec:
    """The route that the options name, checked against the others; ValueError says what doesn't fit."""
    assert options.route is not None
    for name in ("workers", "scheduler", "halo", "tile", "compile", "previous"):
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--route computes in regions of its own, in this process: leave out --{name}")
    if options.engine != "auto":
        raise ValueError(f"--route has an engine of its own: leave out --engine {options.engine}")
    return load_route(options.route)


def route_identity(path: Path | None, options: Options, channels: int) -> dict[str, object] | None:
    """What a result depends on besides the full network: the route's values, its network and its gate."""
    if path is None:
        return None
    spec = load_route(path)
    cheap = load_network(network_spec(options, channels).of(spec.model, spec.weights))
    return {
        "network": network_identity(spec.model, cheap.module, cheap.state, cheap.architecture),
        "graph": graph_of(cheap.module, channels),
        "region": spec.region,
        "gate": spec.gate,
        "budget": spec.budget,
        "threshold": spec.threshold,
        "gate_weights": None if spec.gate_weights is None else file_hash(spec.gate_weights),
    }


def run_routed(
    ledger: Ledger,
    target: Path,
    scene: Scene,
    spec: NetworkSpec,
    options: Options,
    origin: "Provenance",
    watcher: RouteWatcher,
    ready: Callable[[], None],
) -> Routed:
    """Route one scene into `target`, going on from what was stored of the same scene and networks.

    ready: raises where what is finished must not be given its name.
    """
    base, dtype = base_fingerprint(origin.record), route_dtype(options)
    router, kind = _router(scene, spec, options)
    state = RouteState(ledger.folder, router.grid)
    writer = _open(ledger, target, scene, kind, router.spec, options, base, state)
    job = _Job(router, scene, writer, kind, state, watcher)
    router.trace()  # not in any network's time
    begun = time.perf_counter()
    job.score_all()
    wanted = router.decide(state.score, state.data)
    ours = np.where(job.wanted, wanted, -1).astype(np.int16)
    job.bring_to(ours)
    seconds = time.perf_counter() - begun
    record = _record(scene, wanted, state, router.spec, base)
    ready()
    # The result comes last: it says which record is its own.
    record.save(record_file(target))
    record.picture(picture_file(target))
    tags = origin.tags(dtype=dtype, exactness="exact in each region", engine="routed")
    finish(
        ledger,
        writer,
        target,
        tags | {ROUTE_TAG: record.digest},
        watcher.finishing,
        overwrite=options.overwrite,
    )
    summary = _summary(record, router.plan(ours, job.pace), seconds)
    return Routed(summary, job.pixels, dtype, int(job.lost.sum()))


def _router(scene: Scene, spec: NetworkSpec, options: Options) -> tuple[SceneRouter, ResultKind]:
    """Both networks over the scene, and what is written of their logits."""
    route = route_of(options)
    full_spec = replace(spec, dtype=route_dtype(options), compile=False)
    full = load_network(full_spec)
    cheap = load_network(full_spec.of(route.model, route.weights))
    kind = _routed_kind(cheap, full, options)
    router = SceneRouter(
        scene,
        cheap.module,
        full.module,
        route,
        logits=kind.logits,
        max_pixels=max(_MAX_PIXELS, route.region**2),
        dtype=full.dtype,
        device=full.device,
    )
    return router, kind


def _routed_kind(cheap: Network, full: Network, options: Options) -> ResultKind:
    """What is written of both; ValueError where they give things of another kind, or no logits to compare."""
    kinds = [network.nature.result(options) for network in (cheap, full)]
    if "classes" in (kinds[0].activation, kinds[1].activation):
        raise ValueError("--route compares logits or probabilities: a network gives a class map")
    if kinds[0].activation != kinds[1].activation:
        raise ValueError(
            f"--route: the cheap network's output is {cheap.nature.kind}, the full one's "
            f"{full.nature.kind}: both must give the same (--activation says what both are)"
        )
    return kinds[1]


def base_fingerprint(record: dict[str, object]) -> str:
    """One hash of a run's provenance without what may be revoked: the budget and the threshold."""
    route = {k: v for k, v in dict(record["route"]).items() if k not in ("budget", "threshold")}  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps(record | {"route": route}, sort_keys=True).encode()).hexdigest()


class _Job:
    """The passes over one scene."""

    def __init__(
        self,
        router: SceneRouter,
        scene: Scene,
        writer: ZarrWriter,
        kind: ResultKind,
        state: RouteState,
        watcher: RouteWatcher,
    ) -> None:
        self.router, self.scene, self.kind = router, scene, kind
        self.state, self.watcher = state, watcher
        self.store = RegionStore(writer)
        frame, side = scene.frame, router.spec.region
        # Regions of which something is written; the decision is the whole scene's, whatever that is.
        self.wanted = np.zeros(router.grid, bool)
        self.wanted[
            frame.row_off // side : -(-(frame.row_off + frame.height) // side),
            frame.col_off // side : -(-(frame.col_off + frame.width) // side),
        ] = True
        self.pixels = 0
        self.lost = np.zeros(router.grid, np.int64)  # by region: what another network gives counts instead
        self.seconds, self.flops = [0.0, 0.0], [0.0, 0.0]

    @property
    def pace(self) -> tuple[float, float]:
        """Seconds a FLOP of both networks, as far as this run measured both; else 1."""
        if min(self.flops) <= 0:
            return 1.0, 1.0
        return self.seconds[CHEAP] / self.flops[CHEAP], self.seconds[FULL] / self.flops[FULL]

    def score_all(self) -> None:
        """The cheap network over every block that has regions without a score."""
        self._announce("cheap network", self.state.stored == NOTHING)
        for box in self.router.blocks():
            part = (slice(box.top, box.bottom), slice(box.left, box.right))
            if not (self.state.stored[part] == NOTHING).any():
                continue
            begun = time.perf_counter()
            block = self.router.score(box, self._emit)
            self.state.stamps |= self.store.flush()
            self._count(CHEAP, self.router.rectangles(block.data, CHEAP, box), begun)
            self.state.score[part], self.state.data[part] = block.score, block.data
            self.state.stored[part] = np.where(block.data, CHEAP, -1)
            self.state.save()

    def bring_to(self, wanted: NDArray[np.int16]) -> None:
        """Recompute the regions whose stored pixels are another network's."""
        for expert in (CHEAP, FULL):
            stale = (wanted == expert) & (self.state.stored != expert)
            self._announce(f"{NAMES[expert]} network", stale)
            for batch in self.router.batches(stale, expert):
                begun = time.perf_counter()
                cells = [cell for rectangle in batch for cell in rectangle.cells]
                self.state.mark(cells, UNSURE)  # killed now, a region may show either network
                for rectangle in batch:
                    self.router.compute(expert, rectangle, self._emit)
                self.state.stamps |= self.store.flush()
                self._count(expert, batch, begun)
                self.state.mark(cells, expert)

    def _announce(self, who: str, regions: NDArray[np.bool_]) -> None:
        if regions.any():
            side = self.router.spec.region
            text = f"{who}: {int(regions.sum())} of {regions.size} regions of {side} px"
            self.watcher.stage(text, int(regions.sum()) * side**2)

    def _count(self, expert: int, rectangles: list[Rectangle], begun: float) -> None:
        self.seconds[expert] += time.perf_counter() - begun
        self.flops[expert] += sum(self.router.flops(expert, one.box) for one in rectangles)

    def _count_lost(self, window: Window, bad: NDArray[np.bool_] | None) -> None:
        """Pixels of a window of whole regions that came to nothing, region by region."""
        side = self.router.spec.region
        top, left = window.row_off // side, window.col_off // side
        tall, wide = -(-window.height // side), -(-window.width // side)
        if bad is None:
            self.lost[top : top + tall, left : left + wide] = 0
            return
        for row, col in np.ndindex(tall, wide):
            part = bad[row * side : (row + 1) * side, col * side : (col + 1) * side]
            self.lost[top + row, left + col] = np.count_nonzero(part)

    def _emit(self, window: Window, logits: Tensor, valid: NDArray[np.bool_]) -> None:
        pixels, shown, bad = written(Piece(window, logits, valid & self.scene.inside(window)), self.kind)
        self._count_lost(window, bad)
        result = np.full((self.kind.bands, window.height, window.width), self.kind.nodata, self.kind.dtype)
        np.copyto(result, pixels, where=shown)
        part = _overlap(window, self.scene.frame)
        if part is not None:
            rows, columns = _within(window, part)
            self.store.put(result[:, rows, columns], self.scene.framed(part))
        self.pixels += window.height * window.width
        self.watcher.computed(window.height * window.width)


def _overlap(window: Window, frame: Window) -> Window | None:
    """What both windows share."""
    top, left = max(window.row_off, frame.row_off), max(window.col_off, frame.col_off)
    bottom = min(window.row_off + window.height, frame.row_off + frame.height)
    right = min(window.col_off + window.width, frame.col_off + frame.width)
    return Window(left, top, right - left, bottom - top) if top < bottom and left < right else None


def _within(window: Window, part: Window) -> tuple[slice, slice]:
    """Rows and columns of an array over a window that are a part of it."""
    top, left = part.row_off - window.row_off, part.col_off - window.col_off
    return slice(top, top + part.height), slice(left, left + part.width)


def _open(
    ledger: Ledger,
    target: Path,
    scene: Scene,
    kind: ResultKind,
    route: RouteSpec,
    options: Options,
    base: str,
    state: RouteState,
) -> ZarrWriter:
    """The store that an earlier run left of the same scene and networks, or a new one.

    A new one begins with the pixels of a finished result of theirs, if there is one.
    """
    found, _ = ledger.read()
    if found is not None and found.get("base") == base and state.load():
        with suppress(ValueError, OSError, LookupError, TypeError):  # damaged: made anew
            writer = resume_zarr(target, ledger.pixels, overwrite=options.overwrite)
            if writer.shape == (kind.bands, *scene.written.shape[1:]) and writer.dtype == kind.dtype:
                state.check(writer, route.region)
                return writer
        state.reset()
    ledger.clear()
    side = file_side(route.region)
    writer = create_store(ledger, target, scene, kind, options, chunk=side, shard=side)
    earlier = earlier_route(target, base)
    if earlier is not None:
        record, result = earlier
        state.stamps = copy_pixels(result, writer)
        state.take(record)
    state.save()
    ledger.begin({"base": base, "fingerprint": ""})
    return writer


def route_dtype(options: Options) -> str:
    """float32 unless asked otherwise: two networks, of which only the classes of one could be compared."""
    return "float32" if options.dtype == "auto" else options.dtype


def _record(
    scene: Scene, wanted: NDArray[np.int16], state: RouteState, route: RouteSpec, base: str
) -> RouteRecord:
    raster: Raster = scene.raster
    size = (scene.shape[1], scene.shape[2])
    return RouteRecord(
        wanted, state.score, NAMES, route.region, size, raster.transform, raster.crs, made_by=base
    )


def _summary(record: RouteRecord, plan: RoutePlan, seconds: float) -> str:
    verdict = f"{plan.share:.0%} of the full network everywhere" if plan.dense else "nothing to compute"
    unpaid = "" if plan.pays or not plan.dense else " (routing did not pay)"
    return f"{route_summary(record)}; {seconds:.1f} s, {verdict}{unpaid}"
