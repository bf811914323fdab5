"""A stream follows the network that it was made from, or says that it can't.

Values are read when they are needed, so training, other weights and other running statistics are followed,
also where the parameters themselves are new ones. What the traced graph stands on must be as it was: modules,
their settings, shapes and types.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.graph.trace import TracedGraph

_OF_TORCH = frozenset({"training", "track_running_stats", "_is_full_backward_hook", "call_super_init"})
_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"})
_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype)


class StaleError(ValueError):
    """The network is no longer the one that a stream was made from; the message says where."""


class Following:
    """The network behind a stream, as it was when the stream was made.

    Args:
        model: the network.
        written: (module, attribute) pairs that its own forward sets, which therefore tell nothing.
    """

    def __init__(self, model: nn.Module, written: Set[tuple[str, str]]) -> None:
        self.model, self._written = model, written
        self._modules = self._now()

    def update(self, traced: TracedGraph) -> None:
        """Give a graph the network's tensors as they are now.

        Raises:
            StaleError: the network computes something else now, or its tensors have other shapes or types.
        """
        now = self._now()
        if now.keys() != self._modules.keys():
            name = sorted(now.keys() ^ self._modules.keys())[0]
            raise _stale(f"its module {name!r} {'is new' if name in now else 'is gone'}")
        for name, (module, settings) in now.items():
            before, known = self._modules[name]
            if module is not before or type(module) is not known["class"]:
                raise _stale(f"its module {name or 'itself'} is another one")
            for key in settings.keys() | known.keys():
                if settings.get(key) is not known.get(key) and settings.get(key) != known.get(key):
                    what = f"{name}.{key}" if name else key
                    raise _stale(f"its {what} was {known.get(key)} and is {settings.get(key)}")
        live = _tensors(self.model)
        for node, name in traced.names.items():
            traced.tensors[node] = _followed(name, traced.tensors[node], live, node.meta["val"])

    def _now(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        return {
            name: (module, self._settings(name, module))
            for name, module in self.model.named_modules(remove_duplicate=False)
        }

    def _settings(self, name: str, module: nn.Module) -> dict[str, Any]:
        """What a module computes by, beside tensors and modules."""
        found: dict[str, Any] = {"class": type(module)}
        for key, value in vars(module).items():
            if key in _OF_TORCH or (name, key) in self._written:
                continue
            if key in _HOOKS:
                found[key] = [id(hook) for hook in value.values()]
            elif isinstance(value, _SIMPLE) or (isinstance(value, tuple | list) and _is_simple(value)):
                found[key] = value if not isinstance(value, list) else tuple(value)
            elif callable(value) and not isinstance(value, nn.Module | Tensor):
                found[key] = value
        return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and plain attributes by their qualified names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found |= dict(model.named_buffers(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                found[f"{name}.{key}" if name else key] = value
    return found


def _followed(name: str, before: Tensor, live: dict[str, Tensor], traced: Tensor) -> Tensor:
    """The tensor of a name now; a constant in the code has none and stays."""
    now = live.get(name)
    if now is None:
        if isinstance(before, nn.Parameter):
            raise _stale(f"its {name} is gone")
        return before
    if now.shape != traced.shape or now.dtype != traced.dtype:
        was, is_ = (f"{one.dtype} {tuple(one.shape)}" for one in (traced, now))
        raise _stale(f"its {name} was {was} and is {is_}")
    if now.is_meta:
        raise ValueError(f"the network's {name} has no values: it is on the meta device")
    return now


def _is_simple(values: Any) -> bool:
    return all(
        _is_simple(value) if isinstance(value, tuple | list) else isinstance(value, _SIMPLE)
        for value in values
    )


def _stale(what: str) -> StaleError:
    return StaleError(f"the network has changed since this stream was made: {what}. Make a new StreamedModel")
