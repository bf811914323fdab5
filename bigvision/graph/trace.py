"""Tracing: a network becomes a graph of ATen operators with true shapes, without computing a pixel.

`torch.export` runs the network on a fake tensor of the image's real size (`FakeTensorMode`), so a scene of
4 x 30016 x 30016 is traced in a second and takes no memory.

Legend: C channels, H rows and W columns of the image.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from bigvision.graph.outputs import OutputError, main_output, tensors_alone
from bigvision.graph.untouched import untouched
from bigvision.graph.watch import UncarriedError, Watch, differentiable, without_needless_stops

_TRACES, _TRACES_A_SWEEP = itertools.count(1), 8
_INSIDE = "network."  # what a `_Called` network's own names begin with


class UntraceableError(ValueError):
    """A network's forward can't be written down as one graph: its control flow depends on data."""


@dataclass(frozen=True)
class TracedGraph:
    """One network at one image size.

    Attributes:
        graph: ATen operators in execution order; `node.meta["val"]` carries each result's shape and dtype.
        image: the placeholder of the image, [1, C, H, W].
        outputs: the nodes that the network returns.
        rebuild: puts as many values as there are outputs into the nest that the network returns, as plain
            dicts and lists of tensors.
        tensors: the live parameter, buffer or constant behind every other placeholder.
        names: the same placeholders' qualified names in the network (``encoder.conv1.weight``).
        shape: (C, H, W).
        named: which output counts, where the caller named one.
        refused: why the graph does not compute what the network does, half a sentence each.
        ungradable: what of the network's own gradient the graph does not have, by name.
        written: (module, attribute) pairs that the forward sets; they are as they were before.
    """

    graph: fx.Graph
    image: fx.Node
    outputs: tuple[fx.Node, ...]
    rebuild: Callable[[list[Any]], Any]
    tensors: dict[fx.Node, Tensor]
    names: dict[fx.Node, str]
    shape: tuple[int, int, int]
    named: str | int | None = None
    refused: tuple[str, ...] = ()
    ungradable: tuple[str, ...] = ()
    written: frozenset[tuple[str, str]] = frozenset()

    @cached_property
    def output(self) -> fx.Node:
        """The output that counts; OutputError where several may be meant (see `main_output`)."""
        return main_output(self.rebuild(list(self.outputs)), self.named)

    def operators(self) -> Iterator[fx.Node]:
        """The computing nodes, in execution order."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the graph uses, with their qualified names."""
        for node, tensor in self.tensors.items():
            if isinstance(tensor, nn.Parameter):
                yield self.names[node], tensor


def trace(model: nn.Module, shape: tuple[int, int, int], output: str | int | None = None) -> TracedGraph:
    """Trace `model` on one image of `shape` (C, H, W), in the mode (eval or train) that the model is in.

    The graph's tensors are the model's own: training the one trains the other. `output` names the one that
    counts, where the model returns several.

    Raises:
        ValueError: the shape isn't three positive numbers, or the model refuses an image of it.
        UntraceableError: the forward branches on pixel values, or leaves torch.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"an image's shape is (channels, rows, columns), all positive, not {tuple(shape)}")
    with _collected():
        return _traced(model, shape, output)


def _traced(model: nn.Module, shape: tuple[int, int, int], output: str | int | None) -> TracedGraph:
    called = _Called(model)
    program = _export(called, shape, type(model).__name__)
    signature = program.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted |= signature.inputs_to_lifted_tensor_constants
    live: dict[str, Tensor] = dict(called.named_parameters(remove_duplicate=False))
    live |= dict(called.named_buffers(remove_duplicate=False))
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    names = {node: lifted[node.name] for node in placeholders if node.name in lifted}
    tensors = {node: live[name] if name in live else program.constants[name] for node, name in names.items()}
    (image,) = (node for node in placeholders if node.name in signature.user_inputs)
    outputs, rebuild = _outputs(program)
    names = {node: name.removeprefix(_INSIDE) for node, name in names.items()}
    refused = (*called.watch.refused, *_changed_state(program, names, outputs))
    without_needless_stops(program.graph, lambda node: operator_name(node) == "detach")
    return TracedGraph(
        program.graph, image, outputs, rebuild, tensors, names, shape, output, refused,
        tuple(dict.fromkeys(called.watch.ungradable)), frozenset(called.watch.written),
    )  # fmt: skip


def ancestors(outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that some outputs are made from, themselves included."""
    found = set(outputs)
    waiting = list(found)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _changed_state(
    program: torch.export.ExportedProgram, names: dict[fx.Node, str], outputs: tuple[fx.Node, ...]
) -> list[str]:
    """What a forward reads and changes, so that no two of its calls need be alike; batch norms' own apart."""
    signature = program.graph_signature
    changed = {name.removeprefix(_INSIDE) for name in signature.buffers_to_mutate.values()}
    changed |= {name.removeprefix(_INSIDE) for name in signature.parameters_to_mutate.values()}
    used = {names[node] for node in ancestors(outputs) if node in names}
    running = ("running_mean", "running_var", "num_batches_tracked")
    return [f"each call changes {name}" for name in sorted(changed & used) if not name.endswith(running)]


def result_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's result (of its first, where the operator has several)."""
    return result_shapes(node)[0]


def result_shapes(node: fx.Node) -> list[tuple[int, ...]]:
    """The shapes of all of a node's results."""
    value = node.meta["val"]
    return [tuple(one.shape) for one in (value if isinstance(value, list | tuple) else [value])]


def module_path(node: fx.Node) -> str:
    """Where in the network the operator stands (``encoder.layer1.0``), "" at the top."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return f"{stack[-1][0]}.".removeprefix(_INSIDE).removesuffix(".") if stack else ""


def describe(node: fx.Node) -> str:
    """An operator as a person looks for it: ``conv2d at encoder.conv1``."""
    path = module_path(node) or "the top level"
    return f"{operator_name(node)} at {path}"


def operator_name(node: fx.Node) -> str:
    """``conv2d`` for `aten.conv2d.default`, ``mine::conv2d`` for an operator of another library."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        own = f"{target.namespace}::{target.overloadpacket.__name__}"
        return own.removeprefix("aten::")
    return getattr(target, "__name__", str(target))


class _Called(nn.Module):
    """A network whose every return value is plain: any class can hold its tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.watch = Watch(network)

    def forward(self, image: Tensor) -> Any:
        with untouched(self.network) as written:  # export takes a tensor kept in an attribute for a mistake
            result = tensors_alone(self.watch.run(self.network, image))
        self.watch.written |= written
        return result


def _export(model: _Called, shape: tuple[int, int, int], name: str) -> torch.export.ExportedProgram:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(False), FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, *shape, dtype=dtype, device=device)
    # Nothing may be differentiated around tensors that were made in inference mode.
    frozen = any(one.is_inference() for one in (*model.parameters(), *model.buffers()))
    grad = torch.no_grad() if frozen else torch.enable_grad()
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    ordinary = torch.inference_mode(False), grad, torch.autocast(kind, enabled=False)
    with warnings.catch_warnings(), quiet_torch(), ExitStack() as modes:
        for mode in (*ordinary, differentiable(model), untouched(model.network)):
            modes.enter_context(mode)
        warnings.simplefilter("ignore")
        try:
            # An empty table of decompositions leaves composite operators (linear, group_norm) whole.
            program = torch.export.export(model, (image,), strict=False).run_decompositions({})
            return _without_assertions(program)
        except OutputError:
            raise  # its own sentence says what to do
        except UncarriedError as error:
            raise UntraceableError(f"{name} can't be traced: {error}") from error
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            message = f"{name} can't be traced at {tuple(shape)}: {error} goes by the image's values"
            raise UntraceableError(message) from error
        except torch._dynamo.exc.UserError as error:
            raise UntraceableError(_first_sentence(error, name, shape)) from error
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
            if "data-dependent" in str(error) or "Could not guard" in str(error):
                raise UntraceableError(_first_sentence(error, name, shape)) from error
            raise ValueError(
                f"{name} does not run on an image of {tuple(shape)}: {_first_line(error)}"
            ) from error


def _without_assertions(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Checks of dtypes that `Tensor.to` leaves behind hold by construction and compute nothing."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and operator_name(node) == "_assert_tensor_metadata":
            program.graph.erase_node(node)
    return program


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """Free what a trace leaves behind: circles that hold the network's weights, caches that grow with sizes.

    Python would look for circles late, as they are few objects, if large ones. New objects are looked at each
    time, and now and then all of them, for the graphs of streams that are gone.
    """
    alone = gc.get_freeze_count() == 0  # else it is the caller's, or another thread's
    if alone:
        gc.freeze()
    try:
        yield
    finally:
        FakeTensorMode.cache_clear()  # torch keeps an entry of every operator at every size
        everything = next(_TRACES) % _TRACES_A_SWEEP == 0
        if alone and everything:
            gc.unfreeze()
        gc.collect()
        if alone and not everything:
            gc.unfreeze()


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """A forward that fails on fake tensors logs torch's own account of it; ours is one sentence."""
    names = ("torch.export", "torch._export", "torch.fx", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _outputs(
    program: torch.export.ExportedProgram,
) -> tuple[tuple[fx.Node, ...], Callable[[list[Any]], Any]]:
    """The user's outputs and how they were nested; buffer updates of a training graph are left out."""
    named = set(program.graph_signature.user_outputs)
    (returned,) = next(node for node in program.graph.nodes if node.op == "output").args
    nodes = tuple(node for node in returned if isinstance(node, fx.Node) and node.name in named)
    spec = program.call_spec.out_spec

    def rebuild(values: list[Any]) -> Any:
        return pytree.tree_unflatten(values, spec)

    return nodes, rebuild


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _first_sentence(error: Exception, name: str, shape: tuple[int, int, int]) -> str:
    return (
        f"{name} can't be traced at {tuple(shape)}: {_first_line(error)} "
        "Make the branch independent of pixel values (torch.where, or a decision outside forward)."
    )
