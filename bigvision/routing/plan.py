"""What a route costs before it is run, halos and joined regions included, and whether it pays."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertPlan:
    """One expert's share of a route.

    Attributes:
        name: of the expert.
        regions: routed to it; rectangles: that they are joined into.
        flops: of computing them, halos included; flops_alone: of each region by itself.
        pace: seconds a FLOP where measured, else 1.
    """

    name: str
    regions: int
    rectangles: int
    flops: float
    flops_alone: float
    pace: float = 1.0


@dataclass(frozen=True)
class RoutePlan:
    """A route's cost beside computing everything with the dearest expert.

    Attributes:
        experts: in the router's order.
        dense: cost of the dearest expert everywhere, in the experts' unit (FLOPs, or seconds where measured).
        regions: in all, nodata included.
    """

    experts: tuple[ExpertPlan, ...]
    dense: float
    regions: int

    @property
    def cost(self) -> float:
        """Of the route, in the unit of `dense`."""
        return sum(one.flops * one.pace for one in self.experts)

    @property
    def share(self) -> float:
        """Cost over that of the dearest expert everywhere."""
        return self.cost / self.dense if self.dense else 0.0

    @property
    def pays(self) -> bool:
        """Whether the route is cheaper than not routing at all."""
        return self.cost < self.dense

    def __str__(self) -> str:
        parts = [
            f"{one.name}: {one.regions} regions in {one.rectangles} rectangles"
            + (f", joining saves {1 - one.flops / one.flops_alone:.0%}" if one.flops_alone else "")
            for one in self.experts
        ]
        verdict = (
            f"{self.share:.0%} of the cost of the dearest expert everywhere"
            if self.pays
            else f"routing would not pay: {self.share:.0%} of the cost of the dearest expert everywhere"
        )
        return f"{'; '.join(parts)}; {verdict}"
