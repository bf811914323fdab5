"""What a route would cost before anything is computed: between its best and its worst layout."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bigvision.jobs.process.network import load_network, network_spec
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.routed import route_of
from bigvision.jobs.process.scene import open_scene
from bigvision.routing.plan import RoutePlan
from bigvision.routing.scene import CHEAP, FULL, SceneRouter


def forecast_route(scene: str, options: Options) -> tuple[RoutePlan, RoutePlan]:
    """The cost in FLOPs of `--route` with its whole budget spent: in one compact patch, and scattered.

    Where the full regions lie is known only once the cheap network has seen the scene; nodata, which makes
    both cheaper, is not looked at.

    Raises:
        ValueError: as `bigvision process` would, for a route that can't be read or networks that don't fit.
    """
    route = route_of(options)
    source = open_scene([scene], options)
    spec = network_spec(options, source.shape[0])
    full = load_network(spec).module
    cheap = load_network(replace(spec, model=route.model, weights=route.weights)).module
    router = SceneRouter(source, cheap, full, route)
    rows, cols = router.grid
    count = int(route.budget * rows * cols + 1e-9)
    scattered = np.zeros(rows * cols, bool)
    scattered[np.random.default_rng(0).permutation(rows * cols)[:count]] = True
    compact = _square(rows, cols, count)

    def plan(mask: NDArray[np.bool_]) -> RoutePlan:
        return router.plan(np.where(mask, FULL, CHEAP).astype(np.int16))

    return plan(compact), plan(scattered.reshape(rows, cols))


def _square(rows: int, cols: int, count: int) -> NDArray[np.bool_]:
    """`count` regions as near to the middle as a square has them."""
    r, c = np.mgrid[:rows, :cols]
    order = np.argsort(np.maximum(abs(r - rows // 2), abs(c - cols // 2)), axis=None, kind="stable")
    mask = np.zeros(rows * cols, bool)
    mask[order[:count]] = True
    return mask.reshape(rows, cols)
