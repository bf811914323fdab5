"""A whole raster routed: cheap everywhere, a score for each region, full where the budget allows.

Nothing here knows files: the scene is read and results are handed out window by window.

Legend: C channels, K logits, H, W rows and columns, R, S rows and columns of regions, h, w of a window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import LinearScorer
from bigvision.routing.boxes import Box
from bigvision.routing.experts import Program, RegionExpert
from bigvision.routing.learned import load_gate, region_features
from bigvision.routing.merging import Rectangle
from bigvision.routing.pixel import entropy, margin
from bigvision.routing.plan import ExpertPlan, RoutePlan
from bigvision.routing.region_grid import RegionGrid
from bigvision.routing.route_file import RouteSpec
from bigvision.routing.selection import BudgetedTopOne

CHEAP, FULL = 0, 1
NAMES = ("cheap", "full")
Emit = Callable[[Window, Tensor, NDArray[np.bool_]], object]
"""Takes logits [K, h, w] over a window of whole regions, and where it has data, bool [h, w]."""


class Source(Protocol):
    """A scene as the networks see it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def read(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Normalised pixels [C, h, w], 0 where there are none, and where the window has data, bool [h, w]."""


@dataclass(frozen=True)
class Block:
    """Regions scored together: `box` in regions, their scores and whether they have data, both [h, w]."""

    box: Box
    score: NDArray[np.float32]
    data: NDArray[np.bool_]


class SceneRouter:
    """The cascade of a cheap and a full network over one scene.

    Args:
        source: the scene.
        cheap, full: networks in eval mode of one output, on `device` and in `dtype`.
        spec: the route.
        gate: the learned gate of such a route; read from its file where absent.
        logits: makes logits, which gates compare, of an output [K, h, w]: of probabilities, their logarithm.
        max_pixels: most pixels computed at once.

    Raises:
        ValueError: networks of other channels or unlike outputs, that no halo fits, a region that isn't a
            multiple of their strides, a learned gate for other features or without weights.
    """

    def __init__(
        self,
        source: Source,
        cheap: nn.Module,
        full: nn.Module,
        spec: RouteSpec,
        *,
        gate: LinearScorer | None = None,
        logits: Callable[[Tensor], Tensor] = lambda output: output,
        max_pixels: int = 2048 * 2048,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.source, self.spec, self.dtype, self.device = source, spec, dtype, device
        self.logits = logits
        channels, height, width = source.shape
        networks = zip(NAMES, (cheap, full), strict=True)
        self.experts = [RegionExpert(name, one, channels, (height, width)) for name, one in networks]
        self._check()
        self._grids = [RegionGrid(spec.region, self._padded(one), max_pixels) for one in self.experts]
        self.grid = (-(-height // spec.region), -(-width // spec.region))
        if gate is None and spec.gate == "learned":
            gate = load_gate(spec.trained_gate(), channels)
        self.gate = gate
        self._programs: list[Program] = []

    def _check(self) -> None:
        for one in self.experts:
            one.check_region(self.spec.region)
        cheap, full = (one.shape for one in self.experts)
        if (cheap.channels, cheap.scale) != (full.channels, full.scale) or full.scale != 1:
            raise ValueError(
                f"the cheap network gives {cheap.channels} channels at 1/{cheap.scale} of the resolution, "
                f"the full one {full.channels} at 1/{full.scale}: both must give the same at full resolution"
            )

    def trace(self) -> None:
        """Trace both networks at the scene's padded size now rather than when they are first needed."""
        if not self._programs:
            self._programs = [one.program(*self._padded(one)) for one in self.experts]

    @property
    def programs(self) -> list[Program]:
        """Both networks over the scene's padded size."""
        self.trace()
        return self._programs

    def blocks(self) -> Iterator[Box]:
        """The scene cut into boxes of regions that are read and scored together."""
        side = self._block_side
        for row in range(0, self.grid[0], side):
            for col in range(0, self.grid[1], side):
                yield Box(row, col, min(row + side, self.grid[0]), min(col + side, self.grid[1]))

    def batches(self, mask: NDArray[np.bool_], expert: int) -> list[list[Rectangle]]:
        """The rectangles of the selected regions, those that begin in one block together."""
        side = self._block_side
        found: dict[tuple[int, int], list[Rectangle]] = {}
        for one in self.rectangles(mask, expert):
            found.setdefault((one.box.top // side, one.box.left // side), []).append(one)
        return [found[block] for block in sorted(found)]

    @torch.inference_mode()
    def score(self, box: Box, emit: Emit) -> Block:
        """The cheap network over the regions of a box that have data: results and scores."""
        shape = (box.height, box.width)
        score, data = np.zeros(shape, np.float32), np.zeros(shape, bool)
        window = self._window(box)
        pixels, valid = self.source.read(self._read_window(box, CHEAP))
        inner = _crop(valid, self._read_window(box, CHEAP), window)
        for r, c in np.ndindex(*shape):
            data[r, c] = inner[self._cell(r, c)].any()
        origin = self._read_window(box, CHEAP)
        for rectangle in self.rectangles(data, CHEAP, box):
            logits = self._run(CHEAP, rectangle.box, pixels, origin)
            for cell in rectangle.cells:
                at = self._window(cell)
                y = _crop(logits, self._window(rectangle.box), at)
                shown = _crop(valid, origin, at)
                emit(at, y, shown)
                for r, c in np.ndindex(cell.height, cell.width):
                    part = self._cell(r, c)
                    x = _crop(pixels, origin, at)[:, *part]
                    row, col = cell.top - box.top + r, cell.left - box.left + c
                    if shown[part].any():
                        score[row, col] = self._score(y[:, *part], shown[part], x)
        return Block(box, score, data)

    def decide(self, score: NDArray[np.float32], data: NDArray[np.bool_]) -> NDArray[np.int16]:
        """The expert of each region, int16 [R, S]: -1 where there is no data, else CHEAP or FULL.

        The regions that score highest, up to the budget's share of those with data; none below the
        threshold.
        """
        told = torch.from_numpy(score.reshape(-1, 1))
        least = (
            -1.0 if self.spec.threshold is None else float(np.nextafter(np.float32(self.spec.threshold), -1))
        )
        scores = torch.cat([torch.full_like(told, least), told], 1)
        allowed = torch.from_numpy(data.reshape(-1, 1)).expand(-1, 2)
        mask = BudgetedTopOne((1.0, float(self.spec.budget))).select(scores, allowed=allowed)
        expert = torch.where(mask.any(1), mask.long().argmax(1), -1)
        return expert.numpy().astype(np.int16).reshape(score.shape)

    @torch.inference_mode()
    def compute(self, expert: int, rectangle: Rectangle, emit: Emit) -> None:
        """One rectangle of regions with an expert, read with its own halo; emits the cells to keep."""
        origin = self._read_window(rectangle.box, expert)
        pixels, valid = self.source.read(origin)
        logits = self._run(expert, rectangle.box, pixels, origin)
        for cell in rectangle.cells:
            at = self._window(cell)
            emit(at, _crop(logits, self._window(rectangle.box), at), _crop(valid, origin, at))

    @torch.inference_mode()
    def rehearse(self, expert: int, box: Box) -> None:
        """Compute a box of regions as if all pixels were 0, for the time it takes."""
        job = self.programs[expert].job(self._grids[expert].out(box))
        x = torch.zeros(1, self.source.shape[0], job.read.height, job.read.width)
        x = x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        self.programs[expert].run(x, job.alike).float().cpu()

    def rectangles(self, mask: NDArray[np.bool_], expert: int, within: Box | None = None) -> list[Rectangle]:
        """The selected regions of the scene (or of a box of it), joined where that is cheaper."""
        corner = (0, 0) if within is None else (within.top, within.left)
        return self._grids[expert].rectangles(mask, self.programs[expert], corner)

    def plan(
        self, expert: NDArray[np.int16], seconds_per_flop: tuple[float, float] = (1.0, 1.0)
    ) -> RoutePlan:
        """What a decision costs: the cheap network wherever there is data, the full one where decided.

        The dense cost is the full network's over all regions with data.
        """

        def work(mask: NDArray[np.bool_], e: int) -> ExpertPlan:
            return self._grids[e].plan(NAMES[e], [mask], self.programs[e], seconds_per_flop[e])

        dense = work(expert >= 0, FULL)
        return RoutePlan(
            (work(expert >= 0, CHEAP), work(expert == FULL, FULL)), dense.flops * dense.pace, expert.size
        )

    def flops(self, expert: int, box: Box) -> float:
        """Of computing a box of regions with an expert, halo included."""
        return self._grids[expert].flops(box, self.programs[expert])

    # --- windows

    @property
    def _block_side(self) -> int:
        """Of a block, in regions."""
        return int(self._grids[CHEAP].limit ** 0.5)

    def _padded(self, one: RegionExpert) -> tuple[int, int]:
        _, height, width = self.source.shape
        s = one.shape.stride
        return -(-height // s) * s, -(-width // s) * s

    def _window(self, box: Box) -> Window:
        """A box of regions as a window of the scene."""
        at = box.scaled(self.spec.region).clipped(*self.source.shape[1:])
        return Window(at.left, at.top, at.width, at.height)

    def _read_window(self, box: Box, expert: int) -> Window:
        read = self.programs[expert].job(self._grids[expert].out(box)).read.clipped(*self.source.shape[1:])
        return Window(read.left, read.top, read.width, read.height)

    def _cell(self, row: int, col: int) -> tuple[slice, slice]:
        side = self.spec.region
        return slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side)

    # --- computing

    def _run(self, expert: int, box: Box, pixels: NDArray[np.float32], origin: Window) -> Tensor:
        """Logits [K, h, w] of a box of regions from pixels that cover what it reads."""
        out = self._grids[expert].out(box)
        job = self.programs[expert].job(out)
        top, left = job.read.top - origin.row_off, job.read.left - origin.col_off
        cut = torch.from_numpy(pixels)[None, :, top : top + job.read.height, left : left + job.read.width]
        below, beside = job.read.height - cut.shape[-2], job.read.width - cut.shape[-1]
        if below or beside:  # the scene counts as padded with zeros to whole strides
            cut = functional.pad(cut, (0, beside, 0, below))
        x = cut.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        window = self._window(box)
        return self.programs[expert].run(x, job.alike)[0, :, : window.height, : window.width].float().cpu()

    def _score(self, logits: Tensor, valid: NDArray[np.bool_], pixels: NDArray[np.float32]) -> float:
        """What the gate says of one region, 0..1, from its pixels with data."""
        logits = self.logits(logits)
        shown = torch.from_numpy(valid) & logits.isfinite().all(0)
        if not shown.any():
            return 1.0  # the cheap network has nothing to say: as unsure as can be
        if self.gate is None:
            kind = entropy if self.spec.gate == "entropy" else margin
            return float(kind(logits[None])[0][shown].mean())
        features = region_features(torch.from_numpy(pixels), logits, shown)
        return float(self.gate(features[None].to(self.gate.weight.device)).softmax(1)[0, FULL])


def _crop(x: Any, outer: Window, inner: Window) -> Any:
    """The part over `inner` of an array over `outer`."""
    top, left = inner.row_off - outer.row_off, inner.col_off - outer.col_off
    return x[..., top : top + inner.height, left : left + inner.width]
