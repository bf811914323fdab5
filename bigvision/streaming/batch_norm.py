"""Batch norm over a whole scene: one image is the batch, and its statistics are a phase.

By default a network is streamed with its running statistics, frozen. In training mode every batch norm takes
mean and variance of its input over the scene instead, as it would over a batch, and its running statistics
follow once the gradient is complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class SceneMoments:
    """One batch norm's input over the scene.

    Attributes:
        module: its path in the network.
        mean, variance: float64 [C]; the variance is the biased one.
        count: pixels.
    """

    module: str
    mean: Tensor
    variance: Tensor
    count: int


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """While it lasts the network is in eval mode; its modules' own modes come back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def streaming_mode(model: nn.Module) -> Iterator[nn.Module]:
    """While it lasts the network is in eval mode, but for batch norms that `scene_statistics` has taken over.

    Flags alone are set: a network whose own `eval` does more (merging weights, say) is not asked to.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, training in modes:
            module.training = training and isinstance(module, _BatchNorm) and _over_the_scene(module)
        yield model
    finally:
        for module, training in modes:
            module.training = training


def _over_the_scene(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and not norm.track_running_stats


@contextlib.contextmanager
def scene_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """While it lasts batch norms take the image's own statistics and write none; all else is in eval mode.

    with scene_statistics(model):
        streamed = StreamedModel(model, shape)  # its gradient gives moments for `update_running_statistics`
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    with frozen_statistics(model):
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        try:
            yield model
        finally:
            for norm, track in zip(norms, tracked, strict=True):
                norm.track_running_stats = track


@torch.no_grad()
def update_running_statistics(model: nn.Module, moments: Iterable[SceneMoments]) -> None:
    """Move every batch norm's running statistics towards the scene's, as a training step over a batch would.

    The running variance follows the unbiased one (Ioffe and Szegedy, 2015, algorithm 2); a momentum of None
    is the cumulative average.
    """
    for one in moments:
        norm = model.get_submodule(one.module)
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None or norm.running_var is None:
            continue
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        unbiased = one.variance * (one.count / max(one.count - 1, 1))
        norm.running_mean.lerp_(one.mean.to(norm.running_mean), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var), momentum)
