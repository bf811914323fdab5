"""What a forward does beside computing: where it stops gradients, and what no graph of operators holds.

`torch.export` writes down the operators alone. Gradients that `torch.no_grad`, `detach`, `.data` and the like
stop are written down here, as `detach`. A gradient that the network defines itself (a hook, a function of
`torch.autograd`) is not, and is told, so that nobody differentiates such a graph unaware.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_DATA = (vars(torch._C.TensorBase)["data"].__get__, vars(torch._C.TensorBase)["data"].__set__)
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")


class UncarriedError(Exception):
    """What a forward does and no graph can hold, in half a sentence."""


class Watch(TorchFunctionMode):
    """Sees every function of torch that a network calls.

    Attributes:
        refused: why the graph does not compute what the network does.
        ungradable: why the graph's gradient is not the network's.
        written: (module, attribute) pairs that the forward set.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.refused: list[str] = []
        self.written: set[tuple[str, str]] = set()
        self.ungradable: list[str] = [
            f"the backward hook of {name or 'the network'}"
            for name, module in model.named_modules()
            if module._backward_hooks or module._backward_pre_hooks
        ]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._graded: dict[int, Any] = {}  # storages that a gradient passes, kept so that none is reused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func is torch._C._set_grad_enabled:
            with torch._C.DisableTorchFunction():  # export would hide the region in a graph of its own
                return func(*args)
        if func in _DATA:  # export takes them for constants
            if len(args) > 1:
                raise UncarriedError(f"it sets the .data of a tensor at {self._place()}")
            name, func = "detach", torch.Tensor.detach
        given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        for device in {one.device.type for one in given} | {"cpu"}:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                raise UncarriedError(f"it computes under torch.autocast at {self._place()}")
        if name in _HOOKS:
            self.ungradable.append(f"{name} at {self._place()}")
        if getattr(func, "__module__", "") == "torch.autograd":
            self.ungradable.append(f"torch.autograd.{name} at {self._place()}")
        before = [_version(one) for one in given]
        result = func(*args, **kwargs)
        for one, version in zip(given, before, strict=True):
            if _version(one) != version:
                self._changed(one, name)
        wanted = any(one.requires_grad for one in given)
        if torch._C._functorch.peek_interpreter_stack() is not None:  # of what it wraps nothing is to be seen
            if not torch.is_grad_enabled():
                self.ungradable.append(f"torch.no_grad inside of torch.func at {self._place()}")
            return result
        return self._stopped(result, wanted, {id(one) for one in given})

    def _stopped(self, result: Any, wanted: bool, given: set[int]) -> Any:
        """A function's result, cut off from gradients where autograd cuts it off."""
        if isinstance(result, Tensor):
            return self._kept(result, wanted and id(result) not in given)
        if not isinstance(result, tuple | list) or not any(isinstance(one, Tensor) for one in result):
            return result
        parts = [self._stopped(one, wanted, given) for one in result]
        if all(part is one for part, one in zip(parts, result, strict=True)):
            return result
        fields = hasattr(result, "_fields")
        return type(result)(*parts) if fields else type(result)(parts)

    def _kept(self, result: Tensor, graded: bool) -> Tensor:
        """The result, cut off where autograd has let go of a gradient that would have passed."""
        if result.requires_grad:
            if (storage := _storage(result)) is not None:
                self._graded[storage._cdata] = storage
        elif graded and (result.is_floating_point() or result.is_complex()):
            return result.detach()
        return result

    def _changed(self, tensor: Tensor, name: str) -> None:
        stopped = not (tensor.requires_grad and torch.is_grad_enabled())
        storage = _storage(tensor)
        if stopped and storage is not None and storage._cdata in self._graded:
            self.ungradable.append(
                f"{name} at {self._place()}, which changes a result behind autograd's back"
            )

    def _place(self) -> str:
        """The module whose forward is running."""
        frame = sys._getframe(1)
        while frame is not None:
            name = self._names.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name or "the top level"
            frame = frame.f_back  # type: ignore[assignment]
        return "the top level"

    def run(self, network: nn.Module, image: Tensor) -> Any:
        """What the network returns, watched."""
        drawn = _drawn()
        with self:
            result = network(image)
        if _drawn() != drawn:
            self.refused.append("it draws random numbers from Python or NumPy, other ones in each pass")
        self._examine(result)
        return result

    def _examine(self, result: Any) -> None:
        """Look for gradients of the network's own behind its results."""
        names = {type(one).__name__.removesuffix("Backward") for one in _functions(result)}
        for name in sorted(names):
            if name == "CheckpointFunction":
                name += " (torch.utils.checkpoint, which streams with use_reentrant=False)"
            self.ungradable.append(f"the torch.autograd.Function {name}")


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """While it lasts every parameter asks for a gradient, so that it is seen where one is stopped."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [p for p in parameters if not p.requires_grad and not p.is_inference()]
    useless = [p for p in parameters if p.requires_grad and p.is_inference()]  # export can't stand them
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for parameter in useless:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.inference_mode():
            for parameter in useless:
                parameter.requires_grad_(True)


def without_needless_stops(graph: fx.Graph, is_stop: Callable[[fx.Node], bool]) -> None:
    """Take out the stops of gradients that only lead to other stops: most of a frozen backbone's."""
    ends: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        stops = all(user in ends or is_stop(user) for user in node.users)
        if node.op != "output" and stops:
            ends.add(node)
    for node in list(graph.nodes):
        if node in ends and is_stop(node) and node.users:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def _functions(result: Any) -> Iterator[Any]:
    """The gradient functions of the user's own (and of torch's Python code) behind a result."""
    waiting = [one.grad_fn for one in pytree.tree_leaves(result) if isinstance(one, Tensor)]
    seen: set[Any] = set()
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        waiting.extend(behind for behind, _ in function.next_functions)
        own = isinstance(function, torch.autograd.function.BackwardCFunction)
        if own and not type(function).__name__.startswith("GeneratedBackwardFor_"):  # of a custom operator
            yield function


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> Any:
    """Where a tensor's values lie; None for those of `torch.func`'s, which can't be changed in place."""
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def _drawn() -> tuple[Any, ...]:
    """Where the generators that a network could draw from stand."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return random.getstate(), kind, np.asarray(keys).tobytes(), rest
