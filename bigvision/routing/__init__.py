"""Spatial, temporal and instance-wise routing: the gate applied to regions of a raster.

See ``docs/routing.md``.
"""

from bigvision.routing.boxes import Box
from bigvision.routing.cascade import Cascade, cascade_loss, expected_loss
from bigvision.routing.decision import Decision, region_statistics
from bigvision.routing.experts import LowRes, RegionExpert, Skip
from bigvision.routing.grids import GridError, check_same_grid, grid_shift, resampled
from bigvision.routing.instance import EarlyExit, InstanceRouter, SlimBlock, WidthRouter
from bigvision.routing.latency import seconds
from bigvision.routing.merging import Rectangle, merge
from bigvision.routing.pixel import PixelRefiner, entropy, margin
from bigvision.routing.pixel_router import PixelRouter, pixel_statistics, uncertainty
from bigvision.routing.plan import ExpertPlan, RoutePlan
from bigvision.routing.record import RouteRecord, load_record
from bigvision.routing.region import RegionRouter
from bigvision.routing.resolution import MixedResolution
from bigvision.routing.resolution_router import ResolutionRouter
from bigvision.routing.route_file import RouteSpec, load_route, read_route, write_route
from bigvision.routing.scene import SceneRouter
from bigvision.routing.selection import BudgetedTopOne
from bigvision.routing.temporal import Revisited, TemporalRouter, Visit

__all__ = [
    "Box",
    "BudgetedTopOne",
    "Cascade",
    "Decision",
    "EarlyExit",
    "ExpertPlan",
    "GridError",
    "InstanceRouter",
    "LowRes",
    "MixedResolution",
    "PixelRefiner",
    "PixelRouter",
    "Rectangle",
    "RegionExpert",
    "RegionRouter",
    "ResolutionRouter",
    "Revisited",
    "RoutePlan",
    "RouteRecord",
    "RouteSpec",
    "SceneRouter",
    "Skip",
    "SlimBlock",
    "TemporalRouter",
    "Visit",
    "WidthRouter",
    "cascade_loss",
    "check_same_grid",
    "entropy",
    "expected_loss",
    "grid_shift",
    "load_record",
    "load_route",
    "margin",
    "merge",
    "pixel_statistics",
    "read_route",
    "region_statistics",
    "resampled",
    "seconds",
    "uncertainty",
    "write_route",
]
