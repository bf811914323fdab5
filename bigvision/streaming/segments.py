"""Activation checkpointing for networks that nearly fit: which submodules to recompute under a byte budget.

The traced graph says what every submodule's results take and what they cost to compute again. A segment
keeps its inputs and its output; what is inside is recomputed when the backward pass comes to it (Chen et
al., 2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from bigvision.graph import cost, trace
from bigvision.graph.cost import flops, result_bytes
from bigvision.graph.trace import TracedGraph, module_path
from bigvision.streaming.batch_norm import frozen_statistics
from bigvision.streaming.checkpoints import BudgetError


@dataclass(frozen=True)
class Segment:
    """A submodule that runs once: bytes inside it, its output aside, and the FLOPs of doing it again."""

    module: str
    bytes: int
    flops: int

    def overlaps(self, other: Segment) -> bool:
        """One is a part of the other."""
        one, two = f"{self.module}.", f"{other.module}."
        return one.startswith(two) or two.startswith(one)


@dataclass(frozen=True)
class CheckpointedSegments:
    """What `checkpoint_segments` chose; the network recomputes it until `remove` is called.

    Attributes:
        modules: paths of the recomputed submodules.
        peak_bytes: predicted: activations kept, and the largest segment while it is recomputed.
        dense_bytes: what would be kept without.
        recomputation: FLOPs computed again, as a share of one forward pass.
    """

    modules: tuple[str, ...]
    peak_bytes: int
    dense_bytes: int
    recomputation: float
    _undo: tuple[Callable[[], None], ...] = field(repr=False, default=())

    def remove(self) -> None:
        """Give the submodules their own forward back."""
        for undo in self._undo:
            undo()


def checkpoint_segments(
    model: nn.Module, budget: int, *, shape: tuple[int, int, int], batch: int = 1
) -> CheckpointedSegments:
    """Recompute the cheapest submodules of `model` so that its activations fit `budget`.

    Args:
        model: any network of [B, C, H, W]; it is changed in place (its submodules' `forward`).
        budget: bytes of activations at once during a training step.
        shape: (C, H, W) of the images.
        batch: B, images a step.

    Raises:
        BudgetError: no choice of submodules fits; the message says the least that can.
        UntraceableError: the network can't be written down as a graph.
    """
    with frozen_statistics(model):
        traced = trace(model, shape)
    total, once = cost(traced), _single_names(model)
    candidates = [
        Segment(one.module, one.bytes * batch, one.flops)
        for one in segments(traced)
        if one.module in once and one.bytes
    ]
    dense = total.dense_bytes * batch
    chosen = _choose(candidates, dense, budget)
    undo = tuple(_recompute(model.get_submodule(one.module)) for one in chosen)
    again = sum(one.flops for one in chosen) / max(total.flops, 1)
    return CheckpointedSegments(tuple(one.module for one in chosen), _peak(chosen, dense), dense, again, undo)


def segments(traced: TracedGraph) -> list[Segment]:
    """Every submodule whose operators stand together, so that it runs once."""
    order = list(traced.operators())
    places: dict[str, list[int]] = {}
    for place, node in enumerate(order):
        parts = module_path(node).split(".")
        for depth in range(1, len(parts) + 1):
            places.setdefault(".".join(parts[:depth]), []).append(place)
    found = []
    for module, own in places.items():
        if own[-1] - own[0] + 1 != len(own):
            continue
        sizes = [result_bytes(order[place]) for place in own]
        kept = next((size for size in reversed(sizes) if size), 0)
        found.append(Segment(module, sum(sizes) - kept, sum(flops(order[place]) for place in own)))
    return found


def _single_names(model: nn.Module) -> set[str]:
    """Paths of the submodules that have one name only: a shared one runs in several places."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {own[0] for own in names.values() if len(own) == 1 and own[0]}


def _peak(chosen: list[Segment], dense: int) -> int:
    return dense - sum(one.bytes for one in chosen) + max((one.bytes for one in chosen), default=0)


def _choose(candidates: list[Segment], dense: int, budget: int) -> list[Segment]:
    """Greedy by bytes saved a FLOP; then without those that turn out to be needless.

    A segment is whole in memory while it is recomputed, so smaller limits on a segment's size are tried
    too, and the cheapest choice that fits is taken.
    """
    fitting, least = [], dense
    for limit in sorted({one.bytes for one in candidates} | {0}):
        chosen: list[Segment] = []
        allowed = [one for one in candidates if one.bytes <= limit]
        for one in sorted(allowed, key=lambda one: (one.flops / one.bytes, -one.bytes)):
            if _peak(chosen, dense) <= budget:
                break
            if not any(one.overlaps(other) for other in chosen):
                chosen.append(one)
        for one in sorted(chosen, key=lambda one: -one.flops):
            rest = [other for other in chosen if other is not one]
            if _peak(rest, dense) <= budget:
                chosen = rest
        least = min(least, _peak(chosen, dense))
        if _peak(chosen, dense) <= budget:
            fitting.append(chosen)
    if not fitting:
        raise BudgetError(f"activations of {budget} bytes can't be met; the least that can is {least}", least)
    return min(fitting, key=lambda chosen: sum(one.flops for one in chosen))


def _recompute(module: nn.Module) -> Callable[[], None]:
    """Let a submodule recompute itself; gives what undoes it."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        contexts = lambda: (contextlib.nullcontext(), _once(module))  # noqa: E731
        return checkpoint(original, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    module.forward = forward

    def undo() -> None:
        del module.forward

    return undo


@contextlib.contextmanager
def _once(module: nn.Module) -> Iterator[None]:
    """Batch norms update their running statistics the first time only, not when they are recomputed."""
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1
