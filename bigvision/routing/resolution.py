"""Resolution routing inside a network: easy regions are kept at a fraction of the resolution from layer to
layer, and every convolution pads a region from its neighbours at the region's own resolution.

Neighbours of another resolution are averaged down or interpolated up at the seam (Verelst and Tuytelaars
2020, "SegBlocks: Block-Based Dynamic Resolution Networks"). For a network as a whole, where the halo comes
from the image, see :class:`~bigvision.routing.experts.LowRes`.

Legend: B images, C channels, H, W rows and columns, R, S rows and columns of regions, L levels, f factor of a
    level: 1 is full resolution, 2 is half.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigvision.routing.boxes import Box
from bigvision.routing.experts import RegionExpert
from bigvision.routing.pasting import Place, cut, paste


class MixedResolution(nn.Module):
    """Layers that run on each region at a resolution of its own.

    With all regions at full resolution it equals the layers in sequence, and with all at factor f the layers
    over the image averaged down by f and interpolated up. The levels are the caller's; see
    :class:`ResolutionRouter` for a gate.

    Args:
        layers: modules of stride 1 without change of size, each with the halo of its own (a convolution, a
            residual block).
        region: side of a region at full resolution, a multiple of every factor.
        factors: resolutions to choose from, ascending: (1, 2, 4) are full, half and quarter.
        channels: C of the input.

    Raises:
        ValueError: no layers, factors that don't ascend from at least 1 or don't divide the region, a layer
            with a stride, one that no halo fits, or a halo larger than the coarsest region.
    """

    def __init__(
        self, layers: Sequence[nn.Module], region: int, factors: Sequence[int] = (1, 2, 4), *, channels: int
    ) -> None:
        super().__init__()
        factors = tuple(factors)
        if not layers:
            raise ValueError("at least one layer is needed, got none")
        if not factors or factors[0] < 1 or list(factors) != sorted(set(factors)):
            raise ValueError(f"factors must ascend from at least 1, got {factors}")
        if region < 1 or any(region % f for f in factors):
            raise ValueError(f"a region of {region} px must be a multiple of every factor {factors}")
        self.layers, self.region, self.factors = nn.ModuleList(layers), region, factors
        self.known: list[RegionExpert] = []
        for i, layer in enumerate(layers):
            one = RegionExpert(f"layer {i}", layer, channels)
            if one.shape.stride != 1 or one.shape.scale != 1:
                raise ValueError(
                    f"layer {i} has stride {one.shape.stride} and scale {one.shape.scale}, not 1"
                )
            if one.shape.halo > region // factors[-1]:
                raise ValueError(
                    f"layer {i} has a halo of {one.shape.halo} px, the coarsest region "
                    f"{region // factors[-1]} px"
                )
            self.known.append(one)
            channels = one.shape.channels

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Run the layers.

        Args:
            x: [B, C, H, W]; H and W multiples of the region.
            level: int64 [B, R, S], the index into `factors` of each region.

        Returns:
            [B, K, H, W]; low-resolution regions are interpolated up bilinearly.

        Raises:
            ValueError: sizes or levels that don't fit.
        """
        self._check(x, level)
        maps = [_down(x, f) for f in self.factors]
        for i, one in enumerate(self.known):
            made = [self._run(one, maps[k], level, k) for k in range(len(maps))]
            last = i == len(self.known) - 1
            maps = [self._seen(made, level, k) for k in (range(1) if last else range(len(maps)))]
        return maps[0]

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """(B, R, S) of images [B, C, H, W]; a ValueError for other channels or sides."""
        channels, region = self.known[0].channels, self.region
        fits = x.dim() == 4 and x.shape[1] == channels and 0 not in x.shape
        if not fits or x.shape[-2] % region or x.shape[-1] % region:
            raise ValueError(
                f"x must be [B, {channels}, H, W], not empty, its sides multiples of a region of {region} "
                f"px, got {list(x.shape)}"
            )
        return len(x), x.shape[-2] // self.region, x.shape[-1] // self.region

    def _check(self, x: Tensor, level: Tensor) -> None:
        grid = self.grid(x)
        if tuple(level.shape) != grid:
            raise ValueError(
                f"an image {list(x.shape)} in regions of {self.region} px has levels {list(grid)}, "
                f"got {list(level.shape)}"
            )
        if level.numel() and not (int(level.min()) >= 0 and int(level.max()) < len(self.factors)):
            raise ValueError(
                f"levels must be in 0..{len(self.factors) - 1}, got {int(level.min())} to {int(level.max())}"
            )

    def _run(self, one: RegionExpert, x: Tensor, level: Tensor, k: int) -> Tensor:
        """One layer on the regions of level k of the map x at that resolution; zeros elsewhere."""
        side = self.region // self.factors[k]
        program = one.program(*x.shape[-2:])
        groups: dict[Hashable, list[tuple[Place, Place]]] = {}
        jobs = {}
        for image, row, col in (level == k).nonzero().tolist():
            box = Box(row, col, row + 1, col + 1).scaled(side)
            job = program.job(box)
            jobs[job.key] = job
            groups.setdefault(job.key, []).append(((image, job.read), (image, box)))
        pieces = []
        for key, places in groups.items():
            y = program.run(cut(x, [read for read, _ in places]), jobs[key].alike)
            pieces.append((y, [at for _, at in places]))
        size = (len(x), one.shape.channels, *x.shape[-2:])
        return paste(size, pieces, like=x, alone=True) if pieces else x.new_zeros(size)

    def _seen(self, made: Sequence[Tensor], level: Tensor, k: int) -> Tensor:
        """The whole map at resolution k: a region's own values, or its neighbour's brought to it."""
        result = made[k]
        for other, y in enumerate(made):
            where = level == other
            if other == k or not bool(where.any()):
                continue
            f, g = self.factors[k], self.factors[other]
            there = _down(y, f // g) if f > g else self._up(y, level, other, g // f)
            side = self.region // f
            mask = where.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
            result = torch.where(mask, there, result)
        return result

    def _up(self, y: Tensor, level: Tensor, k: int, factor: int) -> Tensor:
        """Interpolated up; beyond the regions of this level the value at their edge goes on."""
        if bool((level == k).all()):
            return _enlarge(y, factor)
        side = self.region // self.factors[k]
        batch, rows, cols = level.shape
        blocks = y.view(batch, y.shape[1], rows, side, cols, side).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        large = _enlarge(blocks, factor)
        side *= factor
        return (
            large.view(batch, rows, cols, -1, side, side)
            .permute(0, 3, 1, 4, 2, 5)
            .reshape(batch, -1, rows * side, cols * side)
        )


def _down(x: Tensor, factor: int) -> Tensor:
    return x if factor == 1 else functional.avg_pool2d(x, factor)


def _enlarge(x: Tensor, factor: int) -> Tensor:
    return functional.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)
