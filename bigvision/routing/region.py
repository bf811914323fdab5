"""Region routing: each region of an image or feature map goes to an expert of its own cost.

Legend: B images, C channels, H, W rows and columns, R, S rows and columns of regions, T = B * R * S regions,
    E experts, K output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import Gate, budget_loss, dense_weights, link_gradients
from bigvision.graph.outputs import main_output
from bigvision.routing.decision import Decision, region_statistics
from bigvision.routing.experts import RegionExpert, Skip
from bigvision.routing.fitting import check_gate
from bigvision.routing.gathering import computed_regions, weight_map, whole_maps
from bigvision.routing.latency import region_seconds
from bigvision.routing.pasting import Piece, paste
from bigvision.routing.plan import RoutePlan
from bigvision.routing.region_grid import RegionGrid

Mode = Literal["hard", "soft"]
Features = Callable[[Tensor, int], Tensor]


class RegionRouter(nn.Module):
    """Cuts an image into regions, and computes each with the expert that a gate chooses for it.

    A region's result is what its expert would give there over the whole image: windows are read with exact
    halos from the input, so halos are right whatever the neighbours are routed to, and with all regions in
    one expert the result is the dense network's. Adjacent regions of one expert are computed as one
    rectangle. Sizes that the strides don't divide are padded below and on the right with zeros, and cropped.

    Args:
        gate: over region features [T, D] and E experts; straight (:class:`Gate`) weighs results by 1.
        experts: E modules [N, C, h, w] -> [N, K, h / scale, w / scale], by name. :class:`Skip` computes
            nothing, :class:`LowRes` at a fraction of the resolution.
        region: side of a region in pixels of the input, a multiple of every expert's stride.
        channels: C; read off the experts' first convolution where absent.
        features: (x, region) -> [T, D] for the gate; mean and standard deviation (D = 2C) by default.
        join: join adjacent regions into rectangles. Otherwise every region is computed in a shape of its own
            that doesn't depend on the others.
        max_pixels: most pixels that are computed at once.
        mode: "hard" skips work; "soft" runs every expert everywhere under the same mask and weights.
        zero_idle: give the parameters of experts without regions gradients of zeros instead of none.

    Raises:
        ValueError: no experts, experts whose outputs differ in channels or scale, one that no halo fits, a
            region that isn't a multiple of a stride, a gate for other features or experts.
    """

    cost: Tensor
    pace: Tensor

    def __init__(
        self,
        gate: Gate,
        experts: Mapping[str, nn.Module],
        region: int,
        *,
        channels: int | None = None,
        features: Features | None = None,
        join: bool = True,
        max_pixels: int = 2048 * 2048,
        mode: Mode = "hard",
        zero_idle: bool = False,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        if not experts:
            raise ValueError("a router needs at least one expert, got none")
        if region < 1 or max_pixels < region * region:
            raise ValueError(f"region must be positive and fit max_pixels, got {region} and {max_pixels}")
        self.gate, self.experts = gate, nn.ModuleDict(experts)
        self.names = tuple(experts)
        self.channels = _channels(experts) if channels is None else channels
        self.region, self.join, self.max_pixels = region, join, max_pixels
        self.mode, self.zero_idle = mode, zero_idle
        self.features = features or region_statistics
        self.known = [RegionExpert(name, module, self.channels) for name, module in experts.items()]
        self.stride = math.lcm(*(one.shape.stride for one in self.known))
        self.out_channels, self.scale = _common_shape(self.known)
        for one in self.known:
            one.check_region(region)
        check_gate(gate, self.names, 2 * self.channels if features is None else None, "regions")
        flops = torch.tensor([one.flops_per_pixel * region**2 for one in self.known])
        self.register_buffer("cost", flops)
        self.register_buffer("pace", torch.ones(len(self.known)))

    def forward(self, x: Tensor, *, valid: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        """[B, K, H / scale, W / scale] of x [B, C, H, W]; see :meth:`decide` for the masks."""
        return self.compute(x, self.decide(x, valid=valid, allowed=allowed))

    def decide(self, x: Tensor, *, valid: Tensor | None = None, allowed: Tensor | None = None) -> Decision:
        """Route every region.

        Args:
            x: [B, C, H, W].
            valid: bool [B, H, W]; regions without a valid pixel go nowhere and their result is 0.
            allowed: bool [B, R, S] or [B, R, S, E], the regions (and experts) that may be computed.

        Raises:
            ValueError: other channels or shapes, a gate for another number of experts.
        """
        padded = self._padded(x)
        shape = (len(x), *self.grid(x.shape[-2], x.shape[-1]))
        may = self._allowed(x, shape, valid, allowed)
        gated = self.gate(self.features(padded, self.region), allowed=may)
        if gated.mask.shape[1] != len(self.known):
            raise ValueError(
                f"the gate is for {gated.mask.shape[1]} experts, the regions have {len(self.known)} "
                f"{tuple(self.names)}"
            )
        return Decision(gated, shape)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """R and S of an image of H x W pixels."""
        return -(-height // self.region), -(-width // self.region)

    def compute(self, x: Tensor, decision: Decision) -> Tensor:
        """[B, K, H / scale, W / scale]: every region as it was decided.

        Raises:
            ValueError: a decision for another grid of regions.
        """
        shape = (len(x), *self.grid(x.shape[-2], x.shape[-1]))
        if decision.shape != shape:
            raise ValueError(f"the decision is for regions {decision.shape}, the image has {shape}")
        padded = self._padded(x)
        weights = dense_weights(decision.gated.routing).view(*shape, len(self.known))
        y = self._soft(padded, weights) if self.mode == "soft" else self._hard(padded, decision, weights)
        if self.zero_idle and self.mode == "hard":
            y = link_gradients(y, self._idle(decision))
        rows, cols = (-(-side // self.scale) for side in x.shape[-2:])
        return y[..., :rows, :cols]

    def plan(self, decision: Decision, height: int, width: int) -> RoutePlan:
        """What a decision costs on images of H x W, halos and joining included, before computing it."""
        regions = self._regions(*self._size(height, width))
        programs = [one.program(*regions.size) for one in self.known]
        plans = [
            regions.plan(one.name, decision.mask(e), programs[e], float(self.pace[e]))
            for e, one in enumerate(self.known)
        ]
        dearest = max(range(len(programs)), key=lambda e: float(self.cost[e]))
        everywhere = np.ones(decision.shape, bool)
        dense = regions.plan("dense", everywhere, programs[dearest], float(self.pace[dearest]))
        return RoutePlan(tuple(plans), dense.flops * dense.pace, decision.gated.routing.num_tokens)

    def budget_loss(self, decision: Decision, budget: float) -> Tensor:
        """Squared excess of the expected cost over a share (0..1) of the dearest expert's; has a gradient.

        Costs are FLOPs until :meth:`measure` replaced them by seconds.
        """
        return budget_loss(decision.gated.probs, self.cost, budget)

    @torch.no_grad()
    def measure(self, clock: Callable[[Callable[[], Any]], float]) -> Tensor:
        """Measure each expert's latency for a region with its halo, and keep it as its cost.

        Args:
            clock: runs a function and returns its seconds (see :func:`~bigvision.routing.latency.seconds`).

        Returns:
            float32 [E], seconds a region.
        """
        like = next((p for p in self.experts.parameters()), torch.zeros(()))
        for e, one in enumerate(self.known):
            self.cost[e], self.pace[e] = region_seconds(one, self.region, clock, like)
        return self.cost.clone()

    # --- geometry

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride) * self.stride, -(-width // self.stride) * self.stride

    def _padded(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels or 0 in x.shape:
            raise ValueError(f"x must be [B, {self.channels}, H, W] and not empty, got {list(x.shape)}")
        height, width = self._size(x.shape[-2], x.shape[-1])
        below, beside = height - x.shape[-2], width - x.shape[-1]
        return functional.pad(x, (0, beside, 0, below)) if below or beside else x

    def _regions(self, height: int, width: int) -> RegionGrid:
        return RegionGrid(self.region, (height, width), self.max_pixels, self.scale, self.join)

    def _allowed(
        self, x: Tensor, shape: tuple[int, int, int], valid: Tensor | None, allowed: Tensor | None
    ) -> Tensor | None:
        if valid is None and allowed is None:
            return None
        may = torch.ones(*shape, len(self.known), dtype=torch.bool, device=x.device)
        if valid is not None:
            if valid.dtype != torch.bool or valid.shape != (len(x), *x.shape[-2:]):
                raise ValueError(
                    f"valid must be bool {[len(x), *x.shape[-2:]]}, got {valid.dtype} {list(valid.shape)}"
                )
            any_valid = functional.max_pool2d(valid[:, None].float(), self.region, ceil_mode=True)[:, 0] > 0
            may &= any_valid[..., None]
        if allowed is not None:
            if allowed.dtype != torch.bool or allowed.shape not in (may.shape, may.shape[:3]):
                raise ValueError(
                    f"allowed must be bool {list(may.shape)} or {list(may.shape[:3])}, "
                    f"got {allowed.dtype} {list(allowed.shape)}"
                )
            may &= allowed if allowed.dim() == 4 else allowed[..., None]
        return may.flatten(0, 2)

    # --- computing

    def _hard(self, x: Tensor, decision: Decision, weights: Tensor) -> Tensor:
        regions = self._regions(x.shape[-2], x.shape[-1])
        pieces: list[Piece] = []
        unweighted = self.gate.straight and not (weights.requires_grad and torch.is_grad_enabled())
        for e, one in enumerate(self.known):
            mask = decision.mask(e)
            if mask.any() and not _gives_zero(one.module):
                by = None if unweighted else weights[..., e]
                pieces += computed_regions(x, mask, one.program(*regions.size), regions, by)
        full = (len(x), self.out_channels, *(int(side / self.scale) for side in regions.size))
        alone = int(decision.gated.mask.sum(1).max()) <= 1
        return paste(full, pieces, like=x, alone=alone) if pieces else x.new_zeros(full)

    def _soft(self, x: Tensor, weights: Tensor) -> Tensor:
        regions = self._regions(x.shape[-2], x.shape[-1])
        total: Tensor | None = None
        for e, one in enumerate(self.known):
            y = main_output(one.module(x))
            part = y * weight_map(weights[..., e], whole_maps(weights), regions, y).to(y.dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _idle(self, decision: Decision) -> list[Tensor]:
        counts = decision.gated.routing.counts.tolist()
        return [
            p for one, n in zip(self.known, counts, strict=True) if not n for p in one.module.parameters()
        ]


def _gives_zero(module: nn.Module) -> bool:
    """Whether an expert adds nothing to zeros and learns nothing."""
    if not isinstance(module, Skip) or (module.values.requires_grad and torch.is_grad_enabled()):
        return False
    return not bool(module.values.any())


def _channels(experts: Mapping[str, nn.Module]) -> int:
    for module in experts.values():
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                return part.in_channels
    raise ValueError(
        f"experts {tuple(experts)} have no convolution that tells their channels; give channels="
    )


def _common_shape(known: Sequence[RegionExpert]) -> tuple[int, Any]:
    first = known[0]
    for one in known[1:]:
        a, b = first.shape, one.shape
        if (a.channels, a.scale) != (b.channels, b.scale):
            raise ValueError(
                f"experts' outputs differ: {first.name!r} gives {a.channels} channels at 1/{a.scale} of the "
                f"resolution, {one.name!r} {b.channels} at 1/{b.scale}"
            )
    return first.shape.channels, first.shape.scale
