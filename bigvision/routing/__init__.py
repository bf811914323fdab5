"""Spatial, temporal and instance-wise routing: the gate applied to regions of a raster."""

from bigvision.routing.boxes import Box
from bigvision.routing.experts import LowRes, RegionExpert, Skip
from bigvision.routing.latency import seconds
from bigvision.routing.merging import Rectangle, merge
from bigvision.routing.plan import ExpertPlan, RoutePlan
from bigvision.routing.region import Decision, RegionRouter, region_statistics
from bigvision.routing.selection import BudgetedTopOne

__all__ = [
    "Box",
    "BudgetedTopOne",
    "Decision",
    "ExpertPlan",
    "LowRes",
    "Rectangle",
    "RegionExpert",
    "RegionRouter",
    "RoutePlan",
    "Skip",
    "merge",
    "region_statistics",
    "seconds",
]
