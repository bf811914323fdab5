"""Every operator that has a rule, called with random values of every argument that the rule honours.

A draw gives an overload and its arguments; those that follow the image's rows are functions of the map x,
tensors are held. A few values (an axis of rows, an order) are such that the network has to be refused.

Legend: x [1, C, H, W].
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten

Draw = Callable[[random.Random, Tensor, str], "Call"]
DRAWS: dict[str, Draw] = {}


def x(v: Tensor) -> Tensor:
    """The map itself."""
    return v


class Call(nn.Module):
    """One call of an ATen operator.

    Args:
        overload: what is called.
        arguments: by schema name; functions of the map, tensors that are held, or plain values.
        use: a map of it and of the (first) result; None: the result, which is a map.
    """

    def __init__(
        self,
        overload: torch._ops.OpOverload,
        arguments: Mapping[str, Any],
        use: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.overload, self.arguments, self.use = overload, dict(arguments), use
        for name, value in arguments.items():
            for index, one in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(one, Tensor) and name.startswith("running"):
                    self.register_buffer(f"{name}_{index}", one)
                elif isinstance(one, Tensor):
                    self.register_parameter(f"{name}_{index}", nn.Parameter(one))

    def forward(self, v: Tensor) -> Tensor:
        def given(name: str, value: Any, index: int = 0) -> Any:
            if isinstance(value, list):
                return [given(name, one, index) for index, one in enumerate(value)]
            if isinstance(value, Tensor):
                return getattr(self, f"{name}_{index}")
            return value(v) if callable(value) else value

        y = self.overload(**{name: given(name, value) for name, value in self.arguments.items()})
        if self.use is not None:
            return self.use(v, y)
        return y[0] if isinstance(y, tuple | list) else y

    def extra_repr(self) -> str:
        return f"{self.overload}({self.arguments})"


def draws(*names: str) -> Callable[[Draw], Draw]:
    """Register how calls of these operators are drawn."""

    def register(function: Draw) -> Draw:
        DRAWS.update(dict.fromkeys(names, function))
        return function

    return register


def an_operator(draw: random.Random, v: Tensor) -> nn.Module:
    """A call of any operator that has a rule."""
    name = draw.choice(sorted(DRAWS))
    return DRAWS[name](draw, v, name)


def joined_to(v: Tensor, y: Any) -> Tensor:
    """A result of any type and number of axes that broadcasts against the map, joined to it."""
    return v + y.to(v.dtype).tanh()


def weights(*shape: int) -> Tensor:
    """Positive numbers, as a scale is."""
    return torch.rand(shape, dtype=torch.float64) + 0.5


def maybe(draw: random.Random, value: Any, otherwise: Any = None) -> Any:
    """The value, half of the time."""
    return value if draw.random() < 0.5 else otherwise


def axis(draw: random.Random) -> int:
    """Seldom that of the rows."""
    return draw.choice([1, 1, 1, -3, 3, -1, 1, 3, 1, draw.choice([2, -2])])


def a_float(draw: random.Random, v: Tensor) -> torch.dtype | None:
    """A wide enough type of a result, or None."""
    return draw.choice([None, None, torch.float64, torch.float32])


@draws("hardswish", "log_sigmoid", "relu6", "alias", "detach")
def elementwise(draw: random.Random, v: Tensor, name: str) -> Call:
    keep = (lambda v, y: v + y) if name == "detach" else None
    return Call(getattr(aten, name).default, {"self": x}, keep)


@draws("rrelu", "native_dropout", "rsub", "masked_fill", "where", "type_as", "_to_copy", "clone")
def elementwise_with_arguments(draw: random.Random, v: Tensor, name: str) -> Call:
    number, layout = draw.uniform(-2, 2), draw.choice([None, torch.channels_last, torch.contiguous_format])
    if name == "rrelu":
        lower = draw.uniform(0, 0.5)
        return Call(aten.rrelu.default, {"self": x, "lower": lower, "upper": lower + draw.random()})
    if name == "native_dropout":
        return Call(aten.native_dropout.default, {"input": x, "p": draw.random(), "train": False})
    if name == "rsub":
        other = draw.choice([number, lambda v: v.flip(1), weights(v.shape[1], 1, 1)])
        kind = aten.rsub.Scalar if isinstance(other, float) else aten.rsub.Tensor
        return Call(kind, {"self": x, "other": other, "alpha": draw.choice([1, 2, -0.5])})
    if name == "masked_fill":
        value = maybe(draw, weights())
        kind = aten.masked_fill.Scalar if value is None else aten.masked_fill.Tensor
        return Call(kind, {"self": x, "mask": lambda v: v > 1, "value": number if value is None else value})
    if name == "where":
        return Call(
            aten.where.self,
            {"condition": lambda v: v > 0, "self": x, "other": maybe(draw, lambda v: -v, weights(1))},
        )
    if name == "type_as":
        return Call(aten.type_as.default, {"self": x, "other": maybe(draw, x, weights(1))}, joined_to)
    if name == "clone":
        return Call(aten.clone.default, {"self": x, "memory_format": layout})
    given = {
        "dtype": draw.choice([None, torch.float32, torch.int32, torch.bool]),
        "device": maybe(draw, torch.device("cpu")),
        "pin_memory": maybe(draw, False),
        "non_blocking": draw.random() < 0.5,
        "memory_format": layout,
    }
    return Call(aten._to_copy.default, {"self": x, **given}, joined_to)


@draws("prelu", "channel_shuffle", "native_channel_shuffle", "_native_batch_norm_legit_no_training")
def by_channel(draw: random.Random, v: Tensor, name: str) -> Call:
    channels = v.shape[1]
    if name == "prelu":
        return Call(aten.prelu.default, {"self": x, "weight": weights(draw.choice([1, channels]))})
    if "shuffle" in name:
        groups = draw.choice([n for n in range(1, channels + 1) if channels % n == 0])
        return Call(getattr(aten, name).default, {"self": x, "groups": groups})
    scale, shift = maybe(draw, weights(channels)), maybe(draw, weights(channels))
    return Call(
        aten._native_batch_norm_legit_no_training.default,
        {"input": x, "weight": scale, "bias": shift, "running_mean": weights(channels)}
        | {"running_var": weights(channels), "momentum": draw.random(), "eps": draw.choice([1e-5, 0.1])},
    )


@draws("cat", "stack", "split", "split_with_sizes", "unbind")
def parts_and_wholes(draw: random.Random, v: Tensor, name: str) -> Call:
    at = axis(draw)
    size = v.shape[at]
    if name in ("cat", "stack"):
        held = weights(*v.shape) if draw.random() < 0.3 else torch.relu
        given = {"tensors": [x, lambda v: v * v.sigmoid(), held], "dim": at}
        return Call(getattr(aten, name).default, given, None if name == "cat" else lambda v, y: y.amax(at))

    def used(v: Tensor, parts: Any) -> Tensor:
        return torch.cat([parts[-1], parts[0].relu(), parts[0]], at)

    if name == "split":
        return Call(aten.split.Tensor, {"self": x, "split_size": draw.randint(1, size), "dim": at}, used)
    if name == "split_with_sizes":
        cut = draw.randint(0, size)
        given = {"self": x, "split_sizes": [cut, size - cut], "dim": at}
        return Call(aten.split_with_sizes.default, given, used)
    return Call(
        aten.unbind.int, {"self": x, "dim": at}, lambda v, y: torch.stack([y[-1], y[0].relu(), *y[1:2]], at)
    )


@draws("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "glu", "flip")
def along(draw: random.Random, v: Tensor, name: str) -> Call:
    at, packet = axis(draw), getattr(aten, name)
    if name in ("softmax", "log_softmax"):
        return Call(packet.int, {"self": x, "dim": at, "dtype": a_float(draw, v)}, joined_to)
    if name == "cumsum":
        return Call(packet.default, {"self": x, "dim": at, "dtype": a_float(draw, v)}, joined_to)
    if name == "glu":
        doubled = lambda v: torch.cat([v, v + 1], at)  # noqa: E731
        return Call(packet.default, {"self": doubled, "dim": at})
    if name == "flip":
        return Call(packet.default, {"self": x, "dims": draw.choice([[at], [1, 3], []])})
    return Call(packet.default, {"self": x, "dim": at, "half_to_float": False})


@draws("linear", "layer_norm", "native_layer_norm", "rms_norm", "matmul")
def over_last_axes(draw: random.Random, v: Tensor, name: str) -> Call:
    last = draw.random() < 0.7  # channels last, as transformers have them, or columns
    channels = v.shape[1] if last else v.shape[3]
    given = (lambda v: v.permute(0, 2, 3, 1)) if last else x
    back = (lambda v, y: first(y).permute(0, 3, 1, 2)) if last else (lambda v, y: first(y))
    scale, shift = maybe(draw, weights(channels)), maybe(draw, weights(channels))
    eps = draw.choice([1e-5, 0.1])
    if name == "linear":
        bias = maybe(draw, weights(5))
        return Call(aten.linear.default, {"input": given, "weight": weights(5, channels), "bias": bias}, back)
    if name == "matmul":
        return Call(aten.matmul.default, {"self": given, "other": weights(channels, 3)}, back)
    shaped = {"input": given, "normalized_shape": [channels], "weight": scale}
    if name == "rms_norm":
        return Call(aten.rms_norm.default, {**shaped, "eps": maybe(draw, eps)}, back)
    if name == "layer_norm":
        given_too = {"bias": shift, "eps": eps, "cudnn_enable": draw.random() < 0.5}
        return Call(aten.layer_norm.default, {**shaped, **given_too}, back)
    return Call(aten.native_layer_norm.default, {**shaped, "bias": shift, "eps": eps}, back)


def first(y: Any) -> Tensor:
    """The first of several results."""
    return y[0] if isinstance(y, tuple | list) else y


@draws("bmm", "einsum", "baddbmm", "scaled_dot_product_attention")
def attention(draw: random.Random, v: Tensor, name: str) -> Call:
    """None of these has a row rule; all are refused."""
    tall, flat = (lambda v: v[0]), (lambda v: v[0].mT)
    if name == "bmm":
        return Call(aten.bmm.default, {"self": tall, "mat2": flat}, lambda v, y: y[None])
    if name == "baddbmm":
        given = {"self": lambda v: v[0] @ v[0].mT, "batch1": tall, "batch2": flat, "beta": 2, "alpha": 3}
        return Call(aten.baddbmm.default, given, lambda v, y: y[None])
    if name == "einsum":
        given = {"equation": "nchw,ndhw->ncdh", "tensors": [x, torch.sin], "path": maybe(draw, [0, 1])}
        return Call(aten.einsum.default, given)
    held = {"attn_mask": None, "dropout_p": 0.0, "is_causal": draw.random() < 0.5}
    given = {"query": x, "key": x, "value": x, "scale": maybe(draw, 0.5), "enable_gqa": False}
    return Call(aten.scaled_dot_product_attention.default, {**given, **held})
