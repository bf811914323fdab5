"""A network stays as its user has it, whatever is done with it in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CONTAINERS = (dict, list, set)  # what a forward may fill: caches, hooks, registered parameters


@contextmanager
def untouched(model: nn.Module) -> Iterator[set[tuple[str, str]]]:
    """While it lasts attributes may be set; afterwards every module has its own again, modes included.

    Gives a set that holds (module, attribute) of all that were set or filled, once it has ended.
    """
    before = [(name, module, _contents(module)) for name, module in model.named_modules()]
    changed: set[tuple[str, str]] = set()
    try:
        yield changed
    finally:
        for name, module, (attributes, filled) in before:
            changed.update((name, key) for key in _restore(module, attributes, filled))


def _contents(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    attributes = dict(vars(module))
    filled = {key: one.copy() for key, one in attributes.items() if isinstance(one, _CONTAINERS)}
    return attributes, filled


def _restore(module: nn.Module, attributes: dict[str, Any], filled: dict[str, Any]) -> set[str]:
    now = vars(module)
    changed = {key for key in now if key not in attributes or now[key] is not attributes[key]}
    changed |= attributes.keys() - now.keys()
    for key in changed:
        now.pop(key, None)
    now |= {key: attributes[key] for key in changed & attributes.keys()}
    for key, copy in filled.items():
        container = attributes[key]
        if not _same(container, copy):
            changed.add(key)
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(copy)
    return changed


def _same(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects; tensors don't compare."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(one[key] is other[key] for key in one)
    if isinstance(one, set):
        return {id(part) for part in one} == {id(part) for part in other}
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
