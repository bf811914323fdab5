"""Region routing: each region of an image or feature map goes to an expert of its own cost.

Legend: B images, C channels, H, W rows and columns, R, S rows and columns of regions, T = B * R * S regions,
    E experts, K output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import Gate, Gated, LinearScorer, budget_loss, dense_weights, link_gradients
from bigvision.routing.boxes import Box
from bigvision.routing.experts import Program, RegionExpert, Skip, first_output
from bigvision.routing.latency import region_seconds
from bigvision.routing.merging import Rectangle, merge, singles
from bigvision.routing.pasting import Place, cut, paste
from bigvision.routing.plan import ExpertPlan, RoutePlan

Mode = Literal["hard", "soft"]
Features = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Decision:
    """Where each region goes, decided once.

    Attributes:
        gated: what the gate decided, of T regions, image by image and row by row.
        shape: (B, R, S).
    """

    gated: Gated
    shape: tuple[int, int, int]

    @property
    def expert(self) -> Tensor:
        """int64 [B, R, S], the expert of the highest weight; -1 where there is none (nodata)."""
        mask = self.gated.mask
        best = self.gated.probs.detach().masked_fill(~mask, -torch.inf).argmax(1)
        return torch.where(mask.any(1), best, -1).view(self.shape)

    @property
    def score(self) -> Tensor:
        """float32 [B, R, S], that expert's probability; 0 where there is none."""
        best = self.expert.view(-1, 1)
        found = self.gated.probs.detach().gather(1, best.clamp(min=0)).squeeze(1)
        return torch.where(best.squeeze(1) >= 0, found, 0).view(self.shape)

    def mask(self, expert: int) -> NDArray[np.bool_]:
        """bool [B, R, S], the regions that an expert works on."""
        taken = self.gated.routing
        chosen = torch.zeros(taken.num_tokens, dtype=torch.bool)
        chosen[taken.token[taken.expert == expert].cpu()] = True
        return chosen.view(self.shape).numpy()


def region_statistics(x: Tensor, region: int) -> Tensor:
    """Mean and standard deviation of each channel in each region: [T, 2C] of x [B, C, H, W]."""
    wide = x if x.dtype == torch.float64 else x.float()

    def average(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, region, ceil_mode=True)

    mean = average(wide)
    spread = (average(wide.square()) - mean.square()).clamp(min=0).add(1e-12).sqrt()
    return torch.cat([mean, spread], 1).permute(0, 2, 3, 1).flatten(0, 2)


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
        _check_gate(gate, self.names, 2 * self.channels if features is None else None)
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
            ValueError: other channels or shapes.
        """
        padded = self._padded(x)
        shape = (len(x), *self.grid(x.shape[-2], x.shape[-1]))
        may = self._allowed(x, shape, valid, allowed)
        return Decision(self.gate(self.features(padded, self.region), allowed=may), shape)

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
        size = self._size(height, width)
        programs = [one.program(*size) for one in self.known]
        plans = []
        for e, (one, program) in enumerate(zip(self.known, programs, strict=True)):
            mask = decision.mask(e)
            found = [r for image in mask for r in self._rectangles(image, program, size)]
            alone = sum(program.flops(self._out(r.box, size)) for image in mask for r in singles(image))
            work = sum(program.flops(self._out(r.box, size)) for r in found)
            plans.append(ExpertPlan(one.name, int(mask.sum()), len(found), work, alone, float(self.pace[e])))
        dearest = max(range(len(programs)), key=lambda e: float(self.cost[e]))
        everywhere = np.ones(decision.shape[1:], bool)
        parts = self._rectangles(everywhere, programs[dearest], size)
        dense = decision.shape[0] * sum(programs[dearest].flops(self._out(r.box, size)) for r in parts)
        return RoutePlan(tuple(plans), dense * float(self.pace[dearest]), decision.gated.routing.num_tokens)

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

    def _out(self, box: Box, size: tuple[int, int]) -> Box:
        """A box of regions in pixels of the output."""
        inside = box.scaled(self.region).clipped(*size)
        return Box(*(int(side / self.scale) for side in inside))

    def _rectangles(
        self, mask: NDArray[np.bool_], program: Program, size: tuple[int, int]
    ) -> list[Rectangle]:
        if not self.join:
            return singles(mask)
        limit = max(self.max_pixels // self.region**2, 1)
        return merge(mask, lambda box: program.flops(self._out(box, size)), limit)

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
        size = (x.shape[-2], x.shape[-1])
        pieces: list[tuple[Tensor, list[Place]]] = []
        unweighted = self.gate.straight and not (weights.requires_grad and torch.is_grad_enabled())
        for e, one in enumerate(self.known):
            mask = decision.mask(e)
            if not mask.any() or _gives_zero(one.module):
                continue
            program = one.program(*size)
            for batch in self._batches(mask, program, size):
                read = [(image, job.read) for image, _, job in batch]
                y = program.run(cut(x, read), batch[0][2].alike)
                pieces += self._kept(y, batch, None if unweighted else weights[..., e], size)
        full = (len(x), self.out_channels, *(int(side / self.scale) for side in size))
        alone = int(decision.gated.mask.sum(1).max()) <= 1
        return paste(full, pieces, like=x, alone=alone) if pieces else x.new_zeros(full)

    def _batches(self, mask: NDArray[np.bool_], program: Program, size: tuple[int, int]) -> list[list[Any]]:
        """(image, rectangle, job) of windows that are alike, as many together as max_pixels allows."""
        groups: dict[Any, list[Any]] = {}
        for image, regions in enumerate(mask):
            for rectangle in self._rectangles(regions, program, size):
                job = program.job(self._out(rectangle.box, size))
                key = _alike(job.alike) if self.join else (image, rectangle.box)
                groups.setdefault((job.read.height, job.read.width, key), []).append((image, rectangle, job))
        batches = []
        for group in groups.values():
            many = max(self.max_pixels // max(group[0][2].read.area, 1), 1)
            batches += [group[at : at + many] for at in range(0, len(group), many)]
        return batches

    def _kept(
        self, y: Tensor, batch: Sequence[Any], weights: Tensor | None, size: tuple[int, int]
    ) -> list[tuple[Tensor, list[Place]]]:
        """The results that were asked for, weighted, and where they go."""
        if all(rectangle.cells == (rectangle.box,) for _, rectangle, _ in batch):
            places = [(image, self._out(rectangle.box, size)) for image, rectangle, _ in batch]
            if weights is not None:
                boxes = [(image, rectangle.box) for image, rectangle, _ in batch]
                y = y * self._weight_map(weights, boxes, y).to(y.dtype)
            return [(y, places)]
        pieces = []
        for row, (image, rectangle, _) in zip(y, batch, strict=True):
            outer = self._out(rectangle.box, size)
            for cell in rectangle.cells:
                at = self._out(cell, size)
                part = row[
                    None,
                    :,
                    at.top - outer.top : at.bottom - outer.top,
                    at.left - outer.left : at.right - outer.left,
                ]
                if weights is not None:
                    part = part * self._weight_map(weights, [(image, cell)], part).to(y.dtype)
                pieces.append((part, [(image, at)]))
        return pieces

    def _weight_map(self, weights: Tensor, boxes: Sequence[Place], like: Tensor) -> Tensor:
        """Each region's weight on each of its pixels: [N, 1, h, w]."""
        found = torch.stack([weights[image, b.top : b.bottom, b.left : b.right] for image, b in boxes])
        side = int(self.region / self.scale)
        wide = found.repeat_interleave(side, 1).repeat_interleave(side, 2)
        return wide[:, None, : like.shape[-2], : like.shape[-1]]

    def _soft(self, x: Tensor, weights: Tensor) -> Tensor:
        total: Tensor | None = None
        whole = [Box(0, 0, *weights.shape[1:3])] * len(x)
        for e, one in enumerate(self.known):
            y = first_output(one.module(x))
            part = y * self._weight_map(weights[..., e], list(enumerate(whole)), y).to(y.dtype)
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


def _alike(alike: Any) -> Any:
    """A key for what may run as one batch: cuts by identity, which windows share, and numbers by value."""
    first = alike[0]
    return tuple(map(id, alike)) if isinstance(first, tuple) and not isinstance(first, Box) else alike


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


def _check_gate(gate: Gate, names: Sequence[str], dim: int | None) -> None:
    """A linear gate tells its features and experts before it is run; others are checked by running."""
    scorer = gate.scorer
    if not isinstance(scorer, LinearScorer):
        return
    experts, features = scorer.weight.shape
    if experts != len(names) or (dim is not None and features != dim):
        raise ValueError(
            f"the gate is for {features} features and {experts} experts, the regions have "
            f"{features if dim is None else dim} features (two a channel) and {len(names)} experts "
            f"{tuple(names)}"
        )
