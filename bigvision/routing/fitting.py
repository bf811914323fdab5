"""What fits what, found before anything is computed: gates and what they see, experts and each other.

Modules are run on fake tensors, which have a shape and a dtype but no values, so nothing is computed. They
run as copies that share the parameters and have no hooks, so that buffers, counters and caches stay as they
are, and whoever watches an expert sees its true work only.

Legend: T tokens, D features, E experts.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from bigvision.gating import CosineScorer, Gate, LinearScorer

# Only values tell what comes next: found when it runs.
_TOLD_BY_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def check_gate(gate: Gate, experts: Sequence[Any], features: int | None, tokens: str) -> None:
    """Hold a gate with weights against its experts and features; other gates are found out when they run.

    Args:
        gate: over T tokens.
        experts: E names.
        features: D, where it is known.
        tokens: what they are, for the message ("regions").

    Raises:
        ValueError: a gate for another number of features or experts.
    """
    scorer = gate.scorer
    if not isinstance(scorer, LinearScorer | CosineScorer):
        return
    num_experts, dim = scorer.weight.shape
    if num_experts != len(experts) or (features is not None and features != dim):
        raise ValueError(
            f"the gate is for {dim} features and {num_experts} experts, the {tokens} have "
            f"{dim if features is None else features} features and {len(experts)} experts {tuple(experts)}"
        )


def check_features(
    gate: Gate, experts: Sequence[Any], features: Callable[[Tensor], Tensor], images: Tensor
) -> None:
    """:func:`check_gate` with the features that the images [B, ...] will have.

    Raises:
        ValueError: a gate for another number of features or experts, features that don't take such images.
    """
    seen = made_of("features", features, images)
    if isinstance(seen, Tensor):
        check_gate(gate, experts, seen.shape[-1], f"images {list(images.shape[1:])}")


def check_alike(name: str, made: Sequence[Any], images: Tensor) -> None:
    """Refuse modules whose rows differ in shape or dtype, from what each :func:`made_of` images [B, ...].

    Raises:
        ValueError: with what the first two that differ return.
    """
    first: tuple[int, str] | None = None
    for number, result in enumerate(made):
        if not isinstance(result, Tensor):
            continue
        row = f"{str(result.dtype).removeprefix('torch.')} {list(result.shape[1:])}"
        if first is not None and row != first[1]:
            raise ValueError(
                f"{name}s differ in what they return for an image {list(images.shape[1:])}: "
                f"{name} {first[0]} {first[1]}, {name} {number} {row}"
            )
        first = first or (number, row)


def made_of(name: str, function: Callable[[Tensor], Any], images: Tensor) -> Any:
    """What a function makes of two images like these, as fake tensors; None where only their values tell.

    Raises:
        ValueError: a function that doesn't take such images, or leaves torch on its way.
    """
    if isinstance(function, nn.Module) and any(map(nn.parameter.is_lazy, function.parameters())):
        return None  # its shape is what the first run makes it
    try:
        twin = copy.deepcopy(function, _kept(function))
    except (RuntimeError, TypeError):
        return None  # it holds what can't be copied: a lock, a tensor in the midst of a graph
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        # Two, because batch norm in training refuses a single value a channel.
        fake = torch.empty(2, *images.shape[1:], dtype=images.dtype, device=images.device)
        try:
            return twin(fake)
        except _TOLD_BY_VALUES:
            return None
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{name} doesn't run on an image {list(images.shape[1:])}: {reason}") from error


def _kept(function: Callable[[Tensor], Any]) -> dict[int, Any]:
    """The memo of a deep copy that shares parameters and leaves hooks out."""
    if not isinstance(function, nn.Module):
        return {}
    memo: dict[int, Any] = {id(p): p for p in function.parameters()}
    for part in function.modules():
        hooks = [held for name, held in vars(part).items() if name.endswith("_hooks")]
        memo |= {id(held): OrderedDict() for held in hooks}
    return memo
