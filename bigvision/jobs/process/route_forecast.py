"""What a route would cost before the scene is computed: between its best and its worst layout."""

import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigvision.jobs.process.network import load_network, network_spec
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.routed import route_dtype, route_of
from bigvision.jobs.process.scene import open_scene
from bigvision.routing.boxes import Box
from bigvision.routing.plan import RoutePlan
from bigvision.routing.scene import CHEAP, FULL, SceneRouter
from bigvision.streaming.memory import freed_memory_kept

_TRIAL = 512  # pixels: about the side of the large window that a network's speed is measured on


class Pace(NamedTuple):
    """What a network's windows take here: seconds for each, and for each of its FLOPs."""

    window: float
    flop: float


@dataclass(frozen=True)
class RouteForecast:
    """A route with its whole budget spent, its full regions in one compact patch, and scattered.

    seconds_compact, seconds_scattered: of computing in `dtype`, predicted from the speed of two windows of
    each network, without start, reading and writing.
    """

    compact: RoutePlan
    scattered: RoutePlan
    seconds_compact: float
    seconds_scattered: float
    dtype: str

    def record(self) -> dict[str, Any]:
        """For JSON."""
        shares = {"share_compact": self.compact.share, "share_scattered": self.scattered.share}
        return asdict(self) | shares | {"pays": self.compact.pays}


def forecast_route(scene: str, options: Options) -> RouteForecast:
    """The cost of `--route` over a scene.

    Where the full regions lie is known only once the cheap network has seen the scene; nodata, which makes
    both cheaper, is not looked at.

    Raises:
        ValueError: as `bigvision process` would, for a route that can't be read or networks that don't fit.
    """
    route = route_of(options)
    source = open_scene([scene], options)
    spec = network_spec(options, source.shape[0], route_dtype(options), source.shape[1:])
    full = load_network(spec)
    cheap = load_network(spec.of(route.model, route.weights))
    router = SceneRouter(source, cheap.module, full.module, route, dtype=full.dtype, device=full.device)
    rows, cols = router.grid
    count = int(route.budget * rows * cols + 1e-9)
    scattered = np.zeros(rows * cols, bool)
    scattered[np.random.default_rng(0).permutation(rows * cols)[:count]] = True
    masks = (_square(rows, cols, count), scattered.reshape(rows, cols))
    compact, apart = (router.plan(np.where(mask, FULL, CHEAP).astype(np.int16)) for mask in masks)
    with freed_memory_kept():  # as the job has it
        paces = tuple(measured_pace(router, expert) for expert in (CHEAP, FULL))
    return RouteForecast(compact, apart, seconds(compact, paces), seconds(apart, paces), spec.dtype)


def seconds(plan: RoutePlan, paces: tuple[Pace, ...]) -> float:
    """Of all windows that a plan computes, by the pace of each of its networks."""
    return sum(
        one.rectangles * pace.window + one.flops * pace.flop
        for one, pace in zip(plan.experts, paces, strict=True)
    )


def measured_pace(router: SceneRouter, expert: int) -> Pace:
    """From a window of one region and a large one, the best of three each."""
    rows, cols = router.grid
    side = max(_TRIAL // router.spec.region, 1)
    boxes = Box(0, 0, 1, 1), Box(0, 0, min(side, rows), min(side, cols))
    (small, least), (large, most) = ((router.flops(expert, box), _best(router, expert, box)) for box in boxes)
    return fitted((small, least), (large, most))


def fitted(small: tuple[float, float], large: tuple[float, float]) -> Pace:
    """The pace by which two windows of these (FLOPs, seconds) take what they take; none of it negative."""
    flops, took = large[0] - small[0], large[1] - small[1]
    average = large[1] / max(large[0], 1.0)
    if flops <= 0 or not 0 < took / flops <= average:
        return Pace(0.0, average)
    return Pace(small[1] - took / flops * small[0], took / flops)


def _best(router: SceneRouter, expert: int, box: Box) -> float:
    router.rehearse(expert, box)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        router.rehearse(expert, box)
        best = min(best, time.perf_counter() - begun)
    return best


def _square(rows: int, cols: int, count: int) -> NDArray[np.bool_]:
    """`count` regions as near to the middle as a square has them."""
    r, c = np.mgrid[:rows, :cols]
    order = np.argsort(np.maximum(abs(r - rows // 2), abs(c - cols // 2)), axis=None, kind="stable")
    mask = np.zeros(rows * cols, bool)
    mask[order[:count]] = True
    return mask.reshape(rows, cols)
