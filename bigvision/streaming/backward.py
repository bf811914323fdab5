"""The exact gradient of a loss over a whole scene, in bounded memory.

The first pass adds up the loss's sums and keeps some states (see `checkpoints`); the second walks back,
step by step from below, recomputing what was not kept. Where a network has statistics over the image, its
passes are walked back in reverse: once the gradient of a statistic has been summed over all rows of the
later passes, it seeds the pass that took it.

Legend: H, W rows and columns of the scene; K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bigvision.graph.trace import module_path, operator_name, result_shape
from bigvision.streaming.batch_norm import SceneMoments
from bigvision.streaming.checkpoints import CheckpointPlan
from bigvision.streaming.forecast import Budget, plan_backward
from bigvision.streaming.forward import scanned
from bigvision.streaming.held import Held, narrowed, weights_of
from bigvision.streaming.losses import Loss
from bigvision.streaming.losses import Sums as LossSums
from bigvision.streaming.memory import freed_memory_kept
from bigvision.streaming.program import Program
from bigvision.streaming.rehearsal import require_differentiable
from bigvision.streaming.row_store import GivenRows
from bigvision.streaming.scan import StepResult
from bigvision.streaming.schedule import schedule
from bigvision.streaming.source import ImageRows
from bigvision.streaming.states import StateStack
from bigvision.streaming.statistics import Moments, Sums
from bigvision.streaming.tape import (
    Gradients,
    NonFiniteError,
    Seeded,
    TapedWalk,
    active_nodes,
    differentiate,
    leaves_of,
)
from bigvision.streaming.targets import TargetRows
from bigvision.streaming.walks import Scene, walk_down, walk_up


@dataclass(frozen=True)
class BackwardResult:
    """What a gradient step found; the gradients themselves are in the parameters.

    Attributes:
        loss: its value.
        sums: the loss's sums over all pixels that count.
        pixels: how many those are (with ignored ones, which the loss itself leaves out).
        confusion: int64 [K, K], rows the truth, columns the network's answer; None where the target is not
            one class a pixel.
        plans: how every pass over the scene was differentiated, in order of the passes.
        moments: what batch norms in training mode saw (see `batch_norm`).
    """

    loss: float
    sums: LossSums
    pixels: int
    confusion: Tensor | None
    plans: tuple[CheckpointPlan, ...]
    moments: tuple[SceneMoments, ...]


@dataclass
class _Tally:
    """The loss's sums and the pixels counted so far."""

    sums: LossSums | None = None
    pixels: int = 0
    confusion: Tensor | None = None

    def add(self, sums: LossSums, y: Tensor, truth: Tensor) -> None:
        self.sums = sums if self.sums is None else pytree.tree_map(torch.add, self.sums, sums)
        self.pixels += truth.numel() if truth.ndim < y.ndim else truth.numel() // truth.shape[1]
        counted = confusion(y, truth)
        if counted is not None:
            self.confusion = counted if self.confusion is None else self.confusion + counted


def backward(
    program: Program,
    image: ImageRows,
    target: Any,
    loss: Loss,
    *,
    mask: Any = None,
    budget: Budget | None = None,
) -> BackwardResult:
    """Add the gradient of `loss` over the scene to every parameter's `grad`.

    Args:
        program: the network at the scene's size.
        image: the scene, in the dtype and on the device to compute with; gradients add up in float32 (float64
            for float64) and arrive in the parameters' own dtype.
        target: [H, W] or [K, H, W], sliceable by rows; for a network with one answer, what `loss` takes.
        mask: [H, W], true where a pixel counts; None: all do.
        budget: memory and scratch space.

    Raises:
        ValueError: the network's output is not at the scene's resolution or has no gradient, the target's
            shape isn't the scene's, or a label is unknown.
        UnsupportedOperatorError: an operator has no derivative, or the network has a gradient of its own
            somewhere, which its graph has not; the message names it.
        BudgetError: the budget can't hold the state and tape of a step.
        NonFiniteError: the loss or a gradient is not finite; the parameters' gradients are as they were.
    """
    budget = budget or Budget()
    size = _output_size(program, image)
    active = active_nodes(program)
    require_differentiable(program, active)
    plans = plan_backward(program, image.dtype, budget)
    schedules = tuple(schedule(walk, plan.rows) for walk, plan in zip(program.passes, plans, strict=True))
    rows = TargetRows(target, mask, size, image.device)
    scene = Scene(program, image, rows, loss, plans, schedules, budget.scratch, active, size or (0, 0))
    gradients, tally = Gradients(), _Tally()
    with freed_memory_kept():
        value, held = _walk_all(scene, tally, gradients)
    assert tally.sums is not None
    _accumulate(program, gradients)
    moments = _moments(program, held)
    return BackwardResult(value, tally.sums, tally.pixels, tally.confusion, plans, moments)


def _walk_all(scene: Scene, tally: _Tally, gradients: Gradients) -> tuple[float, Held]:
    """Every pass down, then every pass back in reverse: the loss, and the last held values."""
    helds, sums = _statistics(scene)
    value = None
    last = len(scene.plans) - 1
    if scene.image_level:
        value = _seed_answer(scene, helds[-1], tally, gradients)
    for index in range(last, -1, -1):
        if index == last and not scene.image_level:
            value = _back_through_output(scene, helds[last], tally, gradients)
        else:
            seeds = _back_through_held(scene, index, helds[index], sums[index], gradients)
            if seeds:
                _back_through_statistics(scene, index, helds[index], sums[index], seeds, gradients)
    _back_through_weights(scene, gradients)
    assert value is not None
    return value, helds[-1]


def confusion(y: Tensor, truth: Tensor) -> Tensor | None:
    """Counts of (truth, answer), int64 [K, K], of labels 0..K-1; None for other truth than classes.

    A network with one output channel answers 1 where its logit is positive.
    """
    if truth.is_floating_point() or truth.shape != y.shape[:1] + y.shape[2:]:
        return None
    answer = y.detach().argmax(1) if y.shape[1] > 1 else (y[:, 0] > 0).long()
    classes = max(y.shape[1], 2)
    known = (truth >= 0) & (truth < classes)
    pairs = truth[known].long() * classes + answer[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def _output_size(program: Program, image: ImageRows) -> tuple[int, int] | None:
    """The scene's size, None where the network gives one answer for the image."""
    given, value = result_shape(program.output), program.output.meta["val"]
    if not value.is_floating_point():
        raise ValueError(f"the network's output is of type {value.dtype}, which has no gradient")
    if program.output not in program.stages:
        if len(given) < 2 or given[0] != 1:
            raise ValueError(f"the network's output is {given}; a loss over one answer needs [1, K]")
        return None
    rows = program.stages[program.output].axis
    if (given[:1], given[-2:], len(given), rows) != ((1,), image.padded, 4, -2):
        raise ValueError(
            f"the network's output is {given} with its rows on axis {rows % len(given)} for an image of "
            f"{image.padded[0]} x {image.padded[1]}; a loss over pixels needs [1, K, H, W] at the image's "
            "own size: upsample inside the network"
        )
    return image.shape[1:]


def _statistics(scene: Scene) -> tuple[list[Held], list[dict[fx.Node, Sums]]]:
    """Held values before every pass and after the last statistics, and every pass's sums."""
    program, given = scene.program, GivenRows(scene.program.traced.image, scene.image)
    helds, taken = [program.finish({}, weights_of(scene.program, scene.image.device))], []
    for index, walk in enumerate(program.passes):
        sums: dict[fx.Node, Sums] = {}
        if walk.statistics:
            for _ in scanned(program, walk, scene.schedules[index], helds[-1], given, sums):
                pass
            helds.append(program.finish(sums, helds[-1]))
        taken.append(sums)
    return helds, taken


def _seed_answer(scene: Scene, held: Held, tally: _Tally, gradients: Gradients) -> float:
    """The loss of a network with one answer for the image; its gradient seeds the held values."""
    output = scene.program.output
    with torch.enable_grad():
        y = held[output].detach().requires_grad_()
        truth = scene.target.whole()
        tally.add(pytree.tree_map(torch.detach, scene.loss.sums(y, truth)), y, truth)
        value = scene.loss(y, truth)
        _require_finite(value, "the loss")
        gradients.add((output, 0), torch.autograd.grad(value, y)[0])
    return float(value.detach())


def _back_through_output(scene: Scene, held: Held, tally: _Tally, gradients: Gradients) -> float:
    """The last pass: down with the loss's sums, then back with their gradient."""
    index = len(scene.plans) - 1
    walk, plan = scene.program.passes[index], scene.schedules[index]
    held = narrowed(held, scene.image.dtype)

    def add(done: StepResult) -> None:
        counted = None if done.output is None else scene.counted(done.output, done.row)
        if counted is not None:
            sums = scene.loss.sums(*counted)
            _require_finite(sums, f"the loss of output rows {done.row}..{done.row + counted[0].shape[-2]}")
            tally.add(sums, *counted)

    with StateStack(scene.plans[index].on_disk, scene.scratch) as stack:
        walk_down(scene, index, held, stack, add)
        value, seeds = _differentiated_loss(scene, tally)

        def seed(y: Tensor, row: int) -> Tensor | None:
            y = y.detach().requires_grad_()
            with torch.enable_grad():
                counted = scene.counted(y, row)
                if counted is None:
                    return None
                sums = pytree.tree_leaves(scene.loss.sums(*counted))
            return differentiate(list(zip(sums, seeds, strict=True)), {"y": y}).get("y")

        leaves = leaves_of(held, scene.active)
        taped = TapedWalk(walk, plan, leaves, {}, {}, seed, scene.active)
        walk_up(scene, index, taped, held, stack, gradients)
    return value


def _differentiated_loss(scene: Scene, tally: _Tally) -> tuple[float, list[Tensor]]:
    if tally.sums is None:
        raise ValueError("the mask leaves no pixel to train on")
    leaves, spec = pytree.tree_flatten(tally.sums)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        value = scene.loss.value(pytree.tree_unflatten(leaves, spec))
        _require_finite(value, "the loss")
        seeds = torch.autograd.grad(value, leaves, allow_unused=True)
    return float(value.detach()), [
        torch.zeros_like(leaf) if seed is None else seed for leaf, seed in zip(leaves, seeds, strict=True)
    ]


def _back_through_held(
    scene: Scene, index: int, held: Held, sums: dict[fx.Node, Sums], gradients: Gradients
) -> dict[fx.Node, list[Tensor | None]]:
    """From the held values that pass `index` made possible back to its sums and to earlier held values."""
    leaves = leaves_of(held, scene.active)
    roots = {
        (node, place): part.detach().requires_grad_()
        for node, taken in sums.items()
        if node in scene.active
        for place, part in enumerate(taken)
    }
    whole = {
        node: tuple(roots.get((node, place), part) for place, part in enumerate(taken))
        for node, taken in sums.items()
    }
    with torch.enable_grad():
        made = scene.program.finish(whole, leaves.values)
        seeded = _held_seeds(made, set(made) - set(held), gradients)
    found = differentiate(
        seeded,
        {("sum", *key): root for key, root in roots.items()}
        | {("held", *key): leaf for key, leaf in leaves.leaves.items()},
    )
    seeds: dict[fx.Node, list[Tensor | None]] = {}
    for (kind, node, place), gradient in found.items():
        _require_finite(gradient, f"the gradient of {node.name}")
        if kind == "held":
            gradients.add((node, place), gradient)
        else:
            seeds.setdefault(node, [None] * len(sums[node]))[place] = gradient
    return seeds


def _held_seeds(made: Held, nodes: set[fx.Node], gradients: Gradients) -> Seeded:
    """Newly made held values with the gradients that later passes summed for them."""
    seeded: Seeded = []
    for node in nodes:
        parts = pytree.tree_leaves(made[node])
        for part, gradient in zip(parts, gradients.pop(node, len(parts)), strict=True):
            if gradient is not None:
                seeded.append((part, gradient.to(part.dtype)))
    return seeded


def _back_through_statistics(
    scene: Scene,
    index: int,
    held: Held,
    sums: dict[fx.Node, Sums],
    seeds: dict[fx.Node, list[Tensor | None]],
    gradients: Gradients,
) -> None:
    """A pass that only takes statistics, from below, seeded with the gradients of their sums."""
    walk, plan = scene.program.passes[index], scene.schedules[index]
    held = narrowed(held, scene.image.dtype)
    with StateStack(scene.plans[index].on_disk, scene.scratch) as stack:
        walk_down(scene, index, held, stack, None)
        leaves = leaves_of(held, scene.active)
        taped = TapedWalk(walk, plan, leaves, sums, seeds, lambda y, row: None, scene.active)
        walk_up(scene, index, taped, held, stack, gradients)


def _back_through_weights(scene: Scene, gradients: Gradients) -> None:
    """From what was computed of weights alone back to them."""
    weights = weights_of(scene.program, scene.image.device)
    leaves = leaves_of(weights, scene.active)
    with torch.enable_grad():
        made = scene.program.finish({}, leaves.values)
        seeded = _held_seeds(made, set(made) - set(weights), gradients)
    for key, gradient in differentiate(seeded, leaves.leaves).items():
        gradients.add(key, gradient)


def _moments(program: Program, held: Held) -> tuple[SceneMoments, ...]:
    """What every batch norm in training mode saw, in the order of the graph."""
    return tuple(
        SceneMoments(module_path(node), held[node][0], held[node][1], statistic.count)
        for node, statistic in program.statistics.items()
        if operator_name(node) == "_native_batch_norm_legit" and isinstance(statistic, Moments)
    )


def _accumulate(program: Program, gradients: Gradients) -> None:
    """Into the parameters and past their hooks, all at once and only when everything went well."""
    found: dict[Tensor, Tensor] = {}
    for node, tensor in program.traced.tensors.items():
        gradient = gradients.get((node, 0))
        if gradient is not None and tensor.requires_grad:
            gradient = gradient.to(tensor.device, tensor.dtype)
            found[tensor] = found[tensor] + gradient if tensor in found else gradient
    if found:
        torch.autograd.backward(list(found), list(found.values()))


def _require_finite(values: LossSums, what: str) -> None:
    for value in pytree.tree_leaves(values):
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{what} is not finite: {value.flatten()[:4].tolist()}")
