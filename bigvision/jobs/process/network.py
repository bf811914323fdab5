"""The network, ready to run: loaded, checked, folded, in its type and memory layout.

Legend: C bands in, K channels out, H and W rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.graph.outputs import OutputError, main_output
from bigvision.jobs.process.folding import fold_batch_norms
from bigvision.jobs.process.nature import LOGITS, Nature, nature_of
from bigvision.jobs.process.options import Options
from bigvision.models.identity import architecture_hash, state_hash
from bigvision.models.spec import first_line, load_model, parse_spec
from bigvision.streaming.compiled import require_compiler

_TRIAL = (128, 128)  # of the image that a network is tried on: the usual strides divide it
_LARGEST_TRIAL = 2048 * 2048  # pixels of a scene that a network of one size only is tried on


class BandsError(ValueError):
    """The network takes another number of bands."""


@dataclass(frozen=True)
class NetworkSpec:
    """What it takes to build the same network in any process.

    stamp: name, bytes and time of its files when the command began; others make another network.
    scene: rows and columns, for a network that runs on no other size.
    """

    model: str
    weights: Path | None
    trust: bool
    channels: int
    dtype: str = "float32"
    compile: bool = False
    device: str = "cpu"
    stamp: tuple[tuple[str, int, int], ...] = ()
    scene: tuple[int, int] | None = field(default=None, compare=False)

    def of(self, model: str, weights: Path | None) -> "NetworkSpec":
        """Another model in the same place."""
        return replace(self, model=model, weights=weights, stamp=_stamp(model, weights))


@dataclass(frozen=True)
class Network:
    """A module in its final form.

    classes: K. state: hash of its parameters and buffers as loaded; architecture: of how it prints itself.
    compile: tiles run through `torch.compile`, streams with their operators merged. nature: of its output.
    """

    module: nn.Module
    classes: int
    dtype: torch.dtype
    device: str
    state: str
    architecture: str
    compile: bool = False
    nature: Nature = LOGITS

    @cached_property
    def forward(self) -> Callable[..., Any]:
        """What computes a tile."""
        return torch.compile(self.module, dynamic=False) if self.compile else self.module

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Logits [K, H, W] of an image float32 [C, H, W]; ValueError for an output of another size."""
        prepared = image[None].to(self.device, self.dtype, memory_format=torch.channels_last)
        logits = main_output(self.forward(prepared))
        if logits.shape != (1, self.classes, *image.shape[1:]):
            raise ValueError(
                f"the model turns {tuple(image.shape)} pixels into {tuple(logits.shape)}, "
                f"expected {(1, self.classes, *image.shape[1:])}"
            )
        return logits[0]


@lru_cache(maxsize=2)
@torch.inference_mode(mode=False)  # whoever comes first: weights made in that mode can't be traced later
def load_network(spec: NetworkSpec) -> Network:
    """Build a network here (the last two are kept); ValueError where model and bands don't go together."""
    if spec.stamp != (now := _stamp(spec.model, spec.weights)):
        changed = ", ".join(sorted({name for name, *_ in {*spec.stamp} ^ {*now}}))
        raise ValueError(f"{changed}: changed while the command runs; type it again to use it as it is now")
    module = load_model(spec.model, spec.weights, trust=spec.trust)
    state, architecture = state_hash(module), architecture_hash(module)
    example = _example_for(module, spec)
    module, nature = _try_out(module, spec, example)
    if not parse_spec(spec.model).is_program:
        fold_batch_norms(module, example)
    dtype = getattr(torch, spec.dtype)
    module.to(device=spec.device, dtype=dtype)
    module.to(memory_format=torch.channels_last)
    return Network(module, nature.channels, dtype, spec.device, state, architecture, spec.compile, nature)


def network_for(scene: str, spec: NetworkSpec) -> Network:
    """`load_network`, whose complaint of a scene's bands names the scene."""
    try:
        return load_network(spec)
    except BandsError as error:
        raise ValueError(f"{scene}: {error}") from error


def network_spec(
    options: Options, channels: int, dtype: str = "float32", scene: tuple[int, int] | None = None
) -> NetworkSpec:
    """The network that the options name, for scenes of `channels` bands; `scene`: one's rows and columns."""
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available here")
    if options.compile:
        require_compiler(torch.device(device))
    stamp = _stamp(options.model, options.weights)
    trust, merge = options.trust_model, options.compile
    return NetworkSpec(options.model, options.weights, trust, channels, dtype, merge, device, stamp, scene)


def _stamp(model: str, weights: Path | None) -> tuple[tuple[str, int, int], ...]:
    spec = parse_spec(model)
    files = [file for file in (Path(spec.source) if spec.is_file else None, weights) if file is not None]
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    return tuple((name, about.st_size, about.st_mtime_ns) for name, about in stats)


@torch.inference_mode()
def _example_for(module: nn.Module, spec: NetworkSpec) -> Tensor:
    """The small image, or one of the scene's size, that the network runs on.

    ValueError for another band count, or a forward that fails on both.
    """
    seen: list[int] = []
    hooks = [
        conv.register_forward_pre_hook(lambda conv, _: seen.append(conv.in_channels))
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d)
    ]
    sizes = [_TRIAL]
    if spec.scene is not None and spec.scene != _TRIAL and prod(spec.scene) <= _LARGEST_TRIAL:
        sizes.append(spec.scene)
    try:
        for size in sizes:
            try:
                module(_example(spec.channels, size))
                return _example(spec.channels, size)
            except Exception as error:
                failure = error
    finally:
        for hook in hooks:
            hook.remove()
    if seen and seen[0] != spec.channels:
        raise BandsError(
            f"model {spec.model} takes {seen[0]} bands, the scene has {spec.channels} (--bands chooses)"
        ) from failure
    what = "an image of the scene's size, " if len(sizes) > 1 else "a trial image of "
    raise ValueError(
        f"model {spec.model} fails on {what}{spec.channels} x {size[0]} x {size[1]}: {first_line(failure)}"
    ) from failure


@torch.inference_mode()
def _try_out(module: nn.Module, spec: NetworkSpec, example: Tensor) -> tuple[nn.Module, Nature]:
    """The network with an output of four axes, and what that is; ValueError for an unusable output."""
    try:
        output = main_output(module(example))
    except OutputError as error:
        raise OutputError(f"model {spec.model}: {error}") from error
    if output.ndim not in (3, 4) or len(output) != 1 or output.shape[-2:] != example.shape[-2:]:
        raise ValueError(
            f"model {spec.model} turns {' x '.join(map(str, example.shape))} into {tuple(output.shape)}: "
            "an output of the image's height and width is needed"
        )
    flat = output.ndim == 3
    try:
        run = WithChannel(module) if flat else lambda x: main_output(module(x))
        nature = nature_of(run, example)
    except ValueError as error:
        raise ValueError(f"model {spec.model}: {error}") from error
    return WithChannel(module) if flat else module, nature


class WithChannel(nn.Module):
    """A network of [B, H, W] as one of [B, 1, H, W]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The network's output that counts, with an axis for its one channel."""
        output: Tensor = main_output(self.network(x))
        return output.unsqueeze(1)


def _example(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn((1, channels, *size), generator=torch.Generator().manual_seed(0))
