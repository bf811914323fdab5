"""Resolution routing by a gate: it decides at which resolution each region runs, and learns it.

Legend: B images, C channels, H, W rows and columns, R, S rows and columns of regions, T = B * R * S regions,
    L levels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bigvision.gating import Gate, budget_loss, dense_weights
from bigvision.routing.decision import Decision, region_statistics
from bigvision.routing.fitting import check_gate
from bigvision.routing.resolution import MixedResolution


class ResolutionRouter(nn.Module):
    """:class:`MixedResolution` whose levels a gate selects, in place of levels of the caller's.

    A region's result is multiplied by the weight of its level. With several levels a region the results are
    summed, one pass for the first level of every region, one for the second, ...: a way to train a gate early
    (with all levels, each pass has one resolution everywhere).

    Args:
        gate: over region features [T, D] and L levels; straight (:class:`Gate`) weighs results by 1.
        mixed: the layers, regions and factors.
        features: (x, region) -> [T, D] for the gate; mean and standard deviation (D = 2C) by default.

    Raises:
        ValueError: a gate for other features or another number of levels.
    """

    cost: Tensor

    def __init__(
        self,
        gate: Gate,
        mixed: MixedResolution,
        *,
        features: Callable[[Tensor, int], Tensor] = region_statistics,
    ) -> None:
        super().__init__()
        dim = 2 * mixed.known[0].channels if features is region_statistics else None
        check_gate(gate, tuple(f"1/{f}" for f in mixed.factors), dim, "regions")
        self.gate, self.mixed, self.features = gate, mixed, features
        self.register_buffer("cost", torch.tensor([float(f) ** -2 for f in mixed.factors]))

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W] of x [B, C, H, W], each region at the resolution that the gate selects."""
        return self.compute(x, self.decide(x))

    def decide(self, x: Tensor) -> Decision:
        """Select the level of every region of x [B, C, H, W].

        Raises:
            ValueError: sides that are no multiples of the region, a gate for another number of levels or
                one that leaves a region without any.
        """
        shape = self.mixed.grid(x)
        gated = self.gate(self.features(x, self.mixed.region))
        levels = len(self.mixed.factors)
        if gated.mask.shape[1] != levels:
            raise ValueError(
                f"the gate is for {gated.mask.shape[1]} experts, the regions have {levels} levels "
                f"of factors {self.mixed.factors}"
            )
        without = gated.routing.num_tokens - len(gated.routing.token.unique())
        if without:
            raise ValueError(
                f"{without} of {gated.routing.num_tokens} regions have no level: the gate must select one "
                "for each, or their neighbours have nothing to be padded from"
            )
        return Decision(gated, shape)

    def compute(self, x: Tensor, decision: Decision) -> Tensor:
        """[B, K, H, W]: every region as it was decided; a ValueError for a decision on other regions."""
        weights = dense_weights(decision.gated.routing)
        unweighted = self.gate.straight and not (weights.requires_grad and torch.is_grad_enabled())
        total: Tensor | None = None
        for level, weight in self._passes(decision, weights):
            y = self.mixed(x, level)
            part = y if unweighted else y * _enlarged(weight, self.mixed.region).to(y.dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    def budget_loss(self, decision: Decision, budget: float) -> Tensor:
        """Squared excess of the expected pixels computed over a share (0..1) of all; has a gradient."""
        return budget_loss(decision.gated.probs, self.cost, budget)

    def _passes(self, decision: Decision, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Levels int64 and weights float32, both [B, R, S], of one pass after the other."""
        chosen = torch.stack([decision.chosen(e).flatten() for e in range(weights.shape[1])], 1)
        rank = chosen.cumsum(1)
        first = chosen.int().argmax(1)
        for number in range(1, int(rank[:, -1].max()) + 1):
            here = chosen & (rank == number)
            # A region with fewer levels runs again at its first for its neighbours' sake, and weighs 0.
            level = torch.where(here.any(1), here.int().argmax(1), first)
            yield level.view(decision.shape), (weights * here).sum(1).view(decision.shape)


def _enlarged(weight: Tensor, region: int) -> Tensor:
    """[B, 1, H, W] of weights [B, R, S] of regions."""
    return weight.repeat_interleave(region, 1).repeat_interleave(region, 2)[:, None]
