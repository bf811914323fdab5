"""What a network over a scene would take, before any work: compute, memory, time, dense against streamed.

Legend: C bands, K classes, H and W rows and columns of the scene.
"""

import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bigvision.graph.cost import Cost, cost
from bigvision.graph.geometry import trace_padded
from bigvision.graph.layout import UnsupportedOperatorError
from bigvision.graph.trace import TracedGraph, UntraceableError
from bigvision.jobs.process.geometry import analyse
from bigvision.jobs.process.network import Network, load_network, network_for, network_spec
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.planning import Plan, plan_scene
from bigvision.jobs.process.precision import choose_precision
from bigvision.jobs.process.scene import open_scene
from bigvision.jobs.process.stream import program_of
from bigvision.jobs.train_raster.memory import TooLittleMemoryError, divided_memory
from bigvision.jobs.train_raster.network import ClassLogits
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.models.spec import load_model
from bigvision.streaming.footprint import forward_bytes
from bigvision.streaming.memory import freed_memory_kept
from bigvision.streaming.model import StreamedModel
from bigvision.streaming.plan import pass_flops, row_choices
from tiling import TileGrid

_TRIAL = 512  # rows and columns of the tile that the speed is measured on


@dataclass(frozen=True)
class Streaming:
    """What the streaming engine would take.

    Attributes:
        dtype: of `bigvision train`: float32 unless another was asked for.
        forward_bytes: of buffers.
        training_bytes: predicted peak of `bigvision train --crop 0`, the process's own included.
        training_disk_bytes: of scratch.
        rows: image rows a step.
        recomputation: in forward passes.
        training_refused: why `bigvision train` would refuse the memory; the figures of training are 0 then.
    """

    dtype: str
    forward_bytes: int
    training_bytes: int = 0
    training_disk_bytes: int = 0
    rows: int = 0
    recomputation: float = 0.0
    training_refused: str = ""


@dataclass(frozen=True)
class RasterPlan:
    """One network over one scene.

    Attributes:
        shape: (C, H, W). classes: K. dtype: that `bigvision process` would choose.
        parameters, flops: of the network, and of one forward pass over the scene.
        weight_bytes, activation_bytes: all weights and all results, in float32.
        dense_forward_bytes, dense_training_bytes: peak when run whole, without and with gradients (weights,
            their gradients and one momentum included).
        stride, halo, inexact: of tiles; why they can't be exact.
        cut: how `bigvision process` would cut the scene; None, with `refused`, where it would refuse.
        overhead: pixels computed for each pixel of the scene.
        streaming: None, with `not_streamed`, where no streaming is possible.
        seconds: of computing, predicted for `bigvision process` here from the speed of one tile, without its
            start, reading and writing; 0 where refused.
        output_bytes: of the result before compression.
    """

    scene: str
    model: str
    shape: tuple[int, int, int]
    classes: int
    dtype: str
    parameters: int
    flops: int
    weight_bytes: int
    activation_bytes: int
    dense_forward_bytes: int
    dense_training_bytes: int
    stride: int
    halo: int
    inexact: tuple[str, ...]
    cut: Plan | None
    refused: str
    overhead: float
    streaming: Streaming | None
    not_streamed: str
    seconds: float
    output_bytes: int

    @property
    def flops_per_parameter(self) -> float:
        """How often the scene uses a parameter."""
        return self.flops / max(1, self.parameters)

    @property
    def bytes_per_flop(self) -> float:
        """Bytes of weights and activations for each FLOP."""
        return (self.weight_bytes + self.activation_bytes) / max(1, self.flops)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        derived = {"flops_per_parameter": self.flops_per_parameter, "bytes_per_flop": self.bytes_per_flop}
        return asdict(self) | derived


def plan(scene: str, options: Options, *, scratch_limit: int = 0) -> RasterPlan:
    """Plan `bigvision process` and training on one scene; of the scene, a few regions are read at most.

    scratch_limit: bytes that states spilled in training may take on a disk.

    Raises:
        ValueError: as `bigvision process` would, for a scene or model that doesn't load or fit.
    """
    return _Planner(scene, options, scratch_limit).plan()


class _Planner:
    def __init__(self, name: str, options: Options, scratch_limit: int) -> None:
        self.name, self.options, self.scratch_limit = name, options, scratch_limit
        self.scene = open_scene([name], options)
        self.shape = self.scene.shape
        self.spec = network_spec(options, self.shape[0], scene=self.shape[1:])
        self.network: Network = network_for(self.scene.raster.name, self.spec)
        self.kind = self.network.nature.result(options)
        self.analysis = analyse(self.network.module, self.shape)
        self.precision = choose_precision(self.scene, self.spec, options, self.kind, self.analysis.stride)

    @cached_property
    def traced(self) -> TracedGraph:
        """At the true size, as it is trained: batch norm not folded."""
        return trace_padded(self.unfolded, self.shape)[0]

    @cached_property
    def unfolded(self) -> nn.Module:
        options = self.options
        return load_model(options.model, options.weights, trust=options.trust_model)

    def plan(self) -> RasterPlan:
        try:
            found: Cost = cost(self.traced)
        except UntraceableError as error:
            raise ValueError(f"{self.options.model} can't be planned: {error}") from error
        cut, refused = self._cut()
        streaming, not_streamed = self._streaming()
        overhead = self._overhead(cut)
        _, height, width = self.shape
        seconds = self._seconds_per_pixel() * overhead * height * width if cut else 0.0
        size = np.dtype(self.kind.dtype).itemsize
        return RasterPlan(
            scene=self.name,
            model=self.options.model,
            shape=self.shape,
            classes=self.network.classes,
            dtype=self.precision.dtype,
            parameters=found.parameters,
            flops=found.flops,
            weight_bytes=found.parameter_bytes,
            activation_bytes=found.dense_bytes,
            dense_forward_bytes=found.dense_peak_bytes + found.parameter_bytes,
            dense_training_bytes=found.dense_bytes + 3 * found.parameter_bytes,
            stride=self.analysis.stride,
            halo=self.analysis.halo,
            inexact=self.analysis.inexact,
            cut=cut,
            refused=refused,
            overhead=overhead,
            streaming=streaming,
            not_streamed=not_streamed,
            seconds=seconds / (self.options.workers or 1),
            output_bytes=self.kind.bands * height * width * size,
        )

    def _cut(self) -> tuple[Plan | None, str]:
        try:
            chosen = plan_scene(
                self.shape,
                self.scene.raster.dtype,
                self.kind,
                self.analysis,
                self.options,
                self.precision,
                self.network.module,
                shutil.disk_usage(".").free,
            )
        except ValueError as error:
            return None, str(error)
        return chosen, ""

    def _overhead(self, cut: Plan | None) -> float:
        if cut is None:
            return 1.0
        _, height, width = self.shape
        if cut.engine == "tiles":
            return TileGrid(height, width, cut.tile, cut.halo, cut.stride).overhead
        if cut.phases is not None:
            program, _ = program_of(self.network.module, self.shape, self.precision.dtype, cut.scratch)
            alone = pass_flops(replace(program, boundaries=()))[-1]  # it computes all that the output takes
            return sum(pass_flops(program)) / max(alone, 1)
        return TileGrid(height, width, (cut.tile, width), (cut.halo, 0), (cut.stride, 1)).overhead

    def _streaming(self) -> tuple[Streaming | None, str]:
        """As `bigvision train` reckons, with the same network, options and function."""
        asked, pixels = self._training(), self.scene.raster.dtype
        model = ClassLogits(self.unfolded).requires_grad_(True)
        dtype = getattr(torch, asked.dtype)
        try:
            streamed = StreamedModel(model, self.shape, dtype=dtype)
        except (UntraceableError, UnsupportedOperatorError) as error:
            return None, str(error)
        rows = row_choices(*streamed.program.traced.shape[1:], self.analysis.stride)[0]
        forward = Streaming(asked.dtype, forward_bytes(streamed.program, rows, dtype))
        what = "one differentiated step"
        try:
            passes = (memory := divided_memory(asked, model)).plan_step(
                streamed.program, dtype, None, self.shape, pixels, what
            )
        except (TooLittleMemoryError, UnsupportedOperatorError) as error:
            return replace(forward, training_refused=str(error)), ""
        largest = max(passes, key=lambda one: one.peak_bytes)
        return replace(
            forward,
            training_bytes=memory.taken + largest.peak_bytes,
            training_disk_bytes=max(one.disk_bytes for one in passes),
            rows=largest.rows,
            recomputation=sum(one.recomputation for one in passes) / len(passes),
        ), ""

    def _training(self) -> TrainOptions:
        """The same wishes in a command of `bigvision train --crop 0`."""
        options = self.options
        dtype = "float32" if options.dtype == "auto" else options.dtype
        asked = TrainOptions(options.model, crop=0, dtype=dtype, memory=options.memory)
        if self.scratch_limit:
            asked = replace(asked, scratch=Path(), scratch_limit=str(self.scratch_limit))
        return asked

    @torch.inference_mode()
    def _seconds_per_pixel(self) -> float:
        """Measured on one tile, the best of three."""
        network = load_network(replace(self.spec, dtype=self.precision.dtype))
        stride = self.analysis.stride
        sides = [min(-(-side // stride) * stride, -(-_TRIAL // stride) * stride) for side in self.shape[1:]]
        image = torch.zeros(self.shape[0], *sides)
        best = float("inf")
        with freed_memory_kept():  # as the job has it
            network(image)
            for _ in range(3):
                begun = time.perf_counter()
                network(image)
                best = min(best, time.perf_counter() - begun)
        return best / (sides[0] * sides[1])
