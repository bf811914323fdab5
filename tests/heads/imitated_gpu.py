"""A GPU without one: tensors that say they are on it, compute on the CPU, and mix with no others.

Inside `imitated_gpu()` whatever is asked for on "cuda" is an `OnGpu`, and an operation that torch would
refuse for tensors on different devices is refused here with torch's words. Numbers of no dimension mix, as in
torch, indices of a GPU's tensor may be the CPU's, and copies go from one to the other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# What torch itself does across devices.
CROSSING = {
    Tensor.copy_,
    Tensor.to,
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.masked_scatter,
    torch.autograd.grad,
}
ON_CPU = {Tensor.cpu, Tensor.tolist, Tensor.numpy}


class OnGpu(Tensor):
    """A tensor that says that it is on the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return imitate(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return imitate(func, args, kwargs or {})


@contextmanager
def imitated_gpu() -> Iterator[None]:
    """Where "cuda" is the imitated GPU."""
    with _Mode():
        yield


def run_backward(loss: Tensor) -> None:
    """`loss.backward()`, within which tensors go on saying where they are."""
    with torch._C.DisableTorchFunction():
        plain = loss.as_subclass(Tensor)
    # What `torch.autograd.backward` calls, but that it would first be imitated as a whole.
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (plain,), (torch.ones_like(plain),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def imitate(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls `func` on the CPU and says where the result is."""
    with torch._C.DisableTorchFunction():
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        if func == Tensor.__deepcopy__ and isinstance(args[0], OnGpu):
            kept = args[0].as_subclass(Tensor).detach().clone()
            return args[1].setdefault(id(args[0]), _placed(kept.requires_grad_(args[0].requires_grad), True))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        gpu = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if gpu else func(*args, **kwargs)
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return bool(gpu)
        if gpu and func not in CROSSING and any(x.ndim and not isinstance(x, OnGpu) for x in leaves):
            name = getattr(func, "__name__", func)
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu"
            )
        if func is Tensor.__getitem__ and not isinstance(args[0], OnGpu) and gpu and any(x.ndim for x in gpu):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        asked = [x for x in (*args, *kwargs.values()) if _device(x, func) is not None]
        wanted = _device(asked[-1], func) if asked else None
        args, kwargs = tree_map(_on_cpu, args), {k: _on_cpu(v) for k, v in kwargs.items()}
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        out = func(*args, **kwargs)
    if func in ON_CPU:
        return tree_map(lambda x: x.as_subclass(Tensor) if isinstance(x, Tensor) else x, out)
    if wanted is not None:
        there = wanted.type == "cuda"
    elif func in (Tensor.__getitem__, Tensor.copy_):
        there = isinstance(args[0], OnGpu)
    else:
        there = bool(gpu)
    return tree_map(lambda x: _placed(x, there), out)


def _device(x: Any, func: Any) -> torch.device | None:
    if isinstance(x, torch.device):
        return x
    if (
        isinstance(x, str)
        and (func is Tensor.to or x.startswith("cuda"))
        and x.split(":")[0] in ("cpu", "cuda")
    ):
        return torch.device(x)
    return None


def _on_cpu(x: Any) -> Any:
    named = isinstance(x, str) and x.startswith("cuda")
    return torch.device("cpu") if named or (isinstance(x, torch.device) and x.type == "cuda") else x


def _placed(x: Any, there: bool) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, OnGpu) == there:
        return x
    with torch._C.DisableTorchFunction():
        kind = OnGpu if there else Tensor
        if x.is_leaf and type(x) is Tensor:
            return Tensor._make_subclass(kind, x, x.requires_grad)
        return x.as_subclass(kind)
