"""A cascade under training: a cheap network, a full one, and the gate that chooses between them by region.

In use (:class:`~bigvision.routing.scene.SceneRouter`) a region is computed by one network. In training both
see everything, and the loss is what it would be on average if each region drew its network from the gate's
probabilities: a mixture of experts by regions (Jacobs et al. 1991, "Adaptive Mixtures of Local Experts", eq.
1.2). So the gate's gradient is the difference that the full network makes to a region, and no network is
starved of gradients while the gate knows nothing.

The gate learns from pixels as they are in use, and from the networks in eval mode: random gains and offsets
make the networks sure or unsure in ways that no scene does.

Legend: N crops, C bands, K logits, s rows and columns of a crop, T regions with data, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from bigvision.gating import LinearScorer, budget_loss, normalize
from bigvision.routing.boxes import Box
from bigvision.routing.experts import RegionExpert
from bigvision.routing.latency import region_seconds
from bigvision.routing.learned import feature_count, region_features
from bigvision.routing.pasting import Place
from bigvision.routing.scene import CHEAP, FULL, NAMES
from bigvision.streaming.losses import Loss, Sums

_EXPLORED = 0.5  # how often a region draws a network blindly, so that both learn everywhere
_BUDGET = (
    10.0  # weight of the budget loss: the probabilities of full settle within a few percent of the budget
)


@dataclass(frozen=True)
class Regions:
    """The regions with data of a batch, where they are, and what the gate gives the two networks there."""

    places: tuple[Place, ...]
    probs: Tensor


class Cascade(nn.Module):
    """Both networks and the gate of one route, all of them trainable.

    Args:
        cheap, full: [N, C, s, s] -> [N, K, s, s].
        channels: C.
        region: side of a region in pixels.
        budget: share of the regions that the full network may take, 0..1.

    Attributes:
        cost: float32 [2], measured seconds of each choice for a region: the cheap network's, and (as that
            runs everywhere) both networks'. Kept with the parameters: a resumed run has the same.
    """

    cost: Tensor

    def __init__(self, cheap: nn.Module, full: nn.Module, channels: int, region: int, budget: float) -> None:
        super().__init__()
        self.cheap, self.full, self.channels, self.region = cheap, full, channels, region
        # Doubts and colours differ in how far they spread: in units of their own, one learning rate fits all.
        # Moments are the means of all steps so far, right from the first.
        self.standard = nn.BatchNorm1d(feature_count(channels), affine=False, momentum=None)
        self.scorer = LinearScorer(feature_count(channels), 2, bias=True)
        self.begin_at(budget)
        self.register_buffer("cost", torch.ones(2))

    @torch.no_grad()
    def begin_at(self, budget: float) -> None:
        """No opinion yet: every region goes to the full network with the budget's probability.

        Began elsewhere, the budget loss would be all that the gate learns from at first.
        """
        assert self.scorer.bias is not None
        share = min(max(budget, 0.01), 0.99)
        self.scorer.weight.zero_()
        self.scorer.bias.copy_(torch.tensor([1 - share, share]).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the cheap and of the full network, [N, K, s, s] each, of x [N, C, s, s]."""
        return self.cheap(x), self.full(x)

    @torch.no_grad()
    def measure(self, clock: Callable[[Callable[[], Any]], float]) -> Tensor:
        """Take each choice's latency for a region with its halo; returns `cost`.

        Args:
            clock: runs a function and returns its seconds (see :func:`~bigvision.routing.latency.seconds`).

        Raises:
            ValueError: networks that no halo fits, or a region that doesn't fit them.
        """
        for e, network in enumerate((self.cheap, self.full)):
            network.eval()
            known = RegionExpert(NAMES[e], network, self.channels)
            known.check_region(self.region)
            self.cost[e], _ = region_seconds(known, self.region, clock, next(self.parameters()))
        self.cost[FULL] += self.cost[CHEAP]
        return self.cost

    def regions(self, x: Tensor, cheap: Tensor, shown: Tensor) -> Regions:
        """Where the gate would send each region, from what the cheap network makes of it.

        Args:
            x: [N, C, s, s]; cheap: [N, K, s, s], float32; shown: bool [N, s, s], pixels with data.
        """
        places, features = [], []
        side = x.shape[-1] // self.region
        for image in range(len(x)):
            for row in range(side):
                for col in range(side):
                    box = Box(row, col, row + 1, col + 1).scaled(self.region)
                    seen = _part(shown, (image, box))
                    if not bool(seen.any()):
                        continue
                    places.append((image, box))
                    at = _part(x, places[-1]), _part(cheap, places[-1]), seen
                    features.append(region_features(*at))
        if not places:
            return Regions((), cheap.new_zeros(0, 2))
        logits = self.scorer(self._standardised(torch.stack(features)))
        return Regions(tuple(places), normalize(logits, "softmax"))

    def _standardised(self, features: Tensor) -> Tensor:
        """Features [T, D] by their running moments, which training moves; not by those of the batch."""
        if self.training and len(features) > 1:
            self.standard(features)
        known = self.standard
        return functional.batch_norm(features, known.running_mean, known.running_var, eps=known.eps)

    @property
    def gate(self) -> LinearScorer:
        """The gate as it is now, over features as they are: what is saved and what routes scenes."""
        found = LinearScorer(self.scorer.weight.shape[1], 2, bias=True).to(self.cost.device)
        mean, variance = self.standard.running_mean, self.standard.running_var
        assert mean is not None and variance is not None and self.scorer.bias is not None
        weight = self.scorer.weight.detach() / (variance + self.standard.eps).sqrt()
        bias = self.scorer.bias.detach() - weight @ mean
        found.load_state_dict({"weight": weight, "bias": bias})
        return found.requires_grad_(False)

    def budget_loss(self, probs: Tensor, budget: float) -> Tensor:
        """Squared excess of the expected latency over that of a share (0..1) of the regions in full."""
        cheap, both = self.cost.tolist()
        share = (cheap + budget * (both - cheap)) / both if both else 0.0
        return budget_loss(probs, self.cost, share)


def cascade_loss(
    cascade: Cascade, loss: Loss, x: Tensor, plain: Tensor, target: Tensor, budget: float
) -> Tensor:
    """What a batch costs on average over the gate's choices: to the networks, to the gate, and by its budget.

    Args:
        cascade: in training mode.
        loss: a function of sums over pixels: each region's sums count by the probability of its network.
        x: [N, C, s, s], what the networks train on, 0 where there is no data.
        plain: [N, C, s, s], the same pixels as they are in use, what the gate trains on.
        target: int64 [N, s, s]; only pixels with data have a class.
        budget: share of the regions in full that is free of charge.

    Returns:
        A scalar: the expected loss of the networks, that of the gate, and the excess over the budget.
    """
    cascade.eval()
    with torch.no_grad():
        settled = [y.float() for y in cascade(plain)]
    cascade.train()
    shown = (plain != 0).any(1) | ((target >= 0) & (target < settled[CHEAP].shape[1]))
    found = cascade.regions(plain, settled[CHEAP], shown)
    logits = [y.float() for y in cascade(x)]
    if not found.places:
        return loss(logits[CHEAP], target) + loss(logits[FULL], target)
    chances = (1 - _EXPLORED) * found.probs.detach() + _EXPLORED / 2
    networks = expected_loss(loss, logits, target, found.places, chances)
    gate = expected_loss(loss, settled, target, found.places, found.probs)
    return networks + gate + _BUDGET * cascade.budget_loss(found.probs, budget)


def expected_loss(
    loss: Loss, logits: Sequence[Tensor], target: Tensor, places: Sequence[Place], chances: Tensor
) -> Tensor:
    """The loss of the sums that regions have on average, if each draws its network by its chances.

    Args:
        loss: a function of sums over pixels.
        logits: of each network, [N, K, s, s].
        target: int64 [N, s, s].
        places: of T regions.
        chances: float [T, networks].
    """
    total: Sums | None = None
    for place, chance in zip(places, chances, strict=True):
        truth = _part(target[:, None], place)
        for y, share in zip(logits, chance, strict=True):
            sums = loss.sums(_part(y, place)[None], truth)
            part = pytree.tree_map(share.mul, sums)
            total = part if total is None else pytree.tree_map(torch.add, total, part)
    assert total is not None
    return loss.value(total)


def _part(x: Tensor, place: Place) -> Tensor:
    """The window [..., h, w] of one image of x [N, ..., H, W]."""
    image, box = place
    return x[image, ..., box.top : box.bottom, box.left : box.right]
