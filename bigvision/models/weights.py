"""A file of weights into a module: safetensors, or a state dict read without unpickling code."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a `.safetensors` or `.pth`/`.pt` state dict into `model`, strictly.

    A dict nested under `state_dict`, `model_state_dict` or `model` is found, and the prefix `module.` of
    DistributedDataParallel or `_orig_mod.` of torch.compile is dropped. ValueError where the file can't be
    read or does not fit.
    """
    state = _without_wrappers(read_state(path))
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model's {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    types = [
        f"{name} is {state[name].dtype}, the model's {expected[name].dtype}"
        for name in expected
        if name in state and not _converts(name, state[name].dtype, expected[name].dtype)
    ]
    problems = [
        _some("missing", missing),
        _some("unknown", unexpected),
        _some("of another shape", shapes),
        _some("of another kind of number", types),
    ]
    if any(problems):
        raise ValueError(f"weights {path} don't fit the model: {'; '.join(p for p in problems if p)}")
    model.load_state_dict(state)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a file of weights; ValueError where it is none."""
    if not path.is_file():
        raise ValueError(f"weights {path} do not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights {path} are neither safetensors nor a state dict of plain tensors: {told(error)}"
        ) from error
    return _state_of(loaded, path)


def _state_of(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"weights {path} hold {type(loaded).__name__}, not a state dict of tensors")
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise ValueError(f"weights {path}: the key {name!r} is {type(name).__name__}, not a name")
        if why := _unusable(value):
            raise ValueError(f"weights {path}: {name} is {why}, not a plain tensor")
    return dict(loaded)


def _unusable(value: Any) -> str:
    """What else than a plain tensor with values a value is; empty for one."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"stored as {str(value.layout).removeprefix('torch.')}"
    if value.is_meta:
        return "a meta tensor, which has no values"
    return "quantised" if value.is_quantized else ""


def _converts(name: str, found: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether numbers of one type are meant by the other: of the same kind, whatever their precision.

    Averaged weights have fractions where a batch norm counted its batches, which decides nothing here.
    """
    if name.rpartition(".")[2] == "num_batches_tracked":
        return not found.is_complex
    kinds = [(dtype.is_complex, dtype.is_floating_point) for dtype in (found, wanted)]
    return kinds[0] == kinds[1]


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}"


def told(error: BaseException) -> str:
    """What is wrong with a file, in the first line of an error.

    torch's refusal to unpickle begins with advice on switching it off; its cause stands further below.
    """
    text = str(error).strip()
    called = re.search(r"GLOBAL (\S+)", text)
    if called:
        return f"it needs {called[1]!r}, and only tensors are loaded"
    if "TorchScript archive" in text:
        return "it is a TorchScript program"
    cause = re.search(r"WeightsUnpickler error: (.+)", text)
    line = next(iter((cause[1] if cause else text).splitlines()), type(error).__name__)[:200]
    return "it holds more than tensors" if "weights_only" in line else line
