"""Which of a network's outputs counts, wherever a network is run, streamed, trained, routed or planned.

A tensor counts by itself. Of a dict, a dataclass or a named tuple (nested, too) it is the only entry that
holds a tensor, else the one called ``out`` (torchvision's segmentation networks) or ``logits`` (Hugging
Face's). Several others are equally plausible, as those of a tuple or list are: the caller names one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

CONVENTIONAL = ("out", "logits")
_LISTED = 8  # names in a message


class OutputError(ValueError):
    """None of a network's outputs is the one that counts, or several may be."""


def main_output(result: Any, name: str | int | None = None) -> Any:
    """The tensor of `result` that counts.

    Args:
        result: what a network returned: a tensor (or its node in a traced graph), or a nest of them.
        name: of the output that counts, by key, attribute or place, with dots between levels (``logits``,
            ``-1``, ``decoder.0``); None: by the rule above.

    Raises:
        OutputError: no tensor, no such name, or several that may be meant.
    """
    if name is not None:
        return _only(_named(result, str(name)), str(name), f"output {str(name)!r} of the network holds")
    return _only(result, "", "the network returns")


def name_output(model: nn.Module, name: str) -> nn.Module:
    """Let every call of `model` return its output `name` alone; changes `model` and returns it."""
    model.register_forward_hook(lambda module, inputs, result: main_output(result, name))
    return model


def tensors_alone(result: Any) -> Any:
    """The same nest as plain dicts and lists, without what is no tensor."""
    if _is_tensor(result):
        return result
    kept = {key: tensors_alone(value) for key, value in _entries(result) if _holds_tensor(value)}
    return kept if _has_names(result) else list(kept.values())


def _only(part: Any, prefix: str, who: str) -> Any:
    """The tensor that counts of a nest whose dotted name is `prefix`."""
    if _is_tensor(part):
        return part
    entries = {key: value for key, value in _entries(part) if _holds_tensor(value)}
    if not entries:
        raise OutputError(f"{who} no tensor but {type(part).__name__}")
    usual = [key for key in entries if key in CONVENTIONAL and _has_names(part)]
    if len(entries) == 1 or len(usual) == 1:
        key = usual[0] if usual else next(iter(entries))
        return _only(entries[key], _joined(prefix, key), who)
    names = [name for name, _ in _leaves(part, prefix)]
    raise OutputError(
        f"{who} {len(names)} tensors, {_listed(names)}: say which one counts, in Python with "
        f"output={names[0]!r}, in a command with #{names[0]} at the end of the model's name"
    )


def _named(result: Any, name: str) -> Any:
    """The part of a nest by its dotted name; a key with a dot in it goes before a level."""
    leaves = dict(_leaves(result))
    if name in leaves:
        return leaves[name]
    part = result
    for step in name.split("."):
        entries = [] if _is_tensor(part) else list(_entries(part))
        places = (
            {} if _has_names(part) else {str(at - len(entries)): one for at, (_, one) in enumerate(entries)}
        )
        if step not in places | dict(entries):
            raise OutputError(f"the network has no output {name!r}; it returns {_listed(list(leaves))}")
        part = (places | dict(entries))[step]
    return part


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _leaves(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor by its dotted name; of a tensor alone that is empty."""
    if _is_tensor(part):
        yield prefix, part
        return
    for key, value in _entries(part):
        yield from _leaves(value, _joined(prefix, key))


def _entries(part: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a nest by key, attribute or place."""
    if isinstance(part, Mapping):
        yield from ((str(key), value) for key, value in part.items())
    elif isinstance(part, tuple) and hasattr(part, "_fields"):
        yield from zip(part._fields, part, strict=True)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        yield from ((field.name, getattr(part, field.name)) for field in dataclasses.fields(part))
    elif isinstance(part, Sequence) and not isinstance(part, str | bytes):
        yield from ((str(place), value) for place, value in enumerate(part))


def _has_names(part: Any) -> bool:
    return isinstance(part, Mapping) or hasattr(part, "_fields") or dataclasses.is_dataclass(part)


def _is_tensor(part: Any) -> bool:
    return isinstance(part, Tensor | fx.Node)


def _holds_tensor(part: Any) -> bool:
    return next(_leaves(part), None) is not None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(name or "one tensor" for name in names[:_LISTED]) + more
