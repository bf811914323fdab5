"""How the lines of `operator_table` draw their arguments, where one line is too short for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from any_operator import Draw

Call = Callable[["Draw", Tensor], Any]


def unary(
    names: str, prepare: Callable[[Tensor], Tensor] = lambda x: x, where: Any = torch
) -> dict[str, Call]:
    """Functions of one tensor, of values that `prepare` makes."""

    def call(name: str) -> Call:
        return lambda d, x: getattr(where, name)(prepare(x))

    return {name: call(name) for name in names.split()}


def sizes(names: str, call: Callable[..., Any]) -> dict[str, Call]:
    """Operators of 1, 2 and 3 dimensions, called with their name and dimensions."""

    def one(name: str, dims: int) -> Call:
        return lambda d, x: call(d, x, name, dims)

    return {f"{name}{dims}d": one(name, dims) for name in names.split() for dims in (1, 2, 3)}


def binary(names: str, prepare: Callable[[Any], Any] = lambda x: x) -> dict[str, Call]:
    """Functions of two tensors, either of which streams."""

    def call(name: str) -> Call:
        return lambda d, x: getattr(torch, name)(*map(prepare, d.two(x)))

    return {name: call(name) for name in names.split()}


def whole(x: Any) -> Any:
    """Small whole numbers of a tensor's values."""
    return (x * 3).round().to(torch.int64)


def truth(x: Any) -> Any:
    """Truth values of a tensor's values."""
    return x > 0


def positive(x: Any) -> Any:
    """Values above 0."""
    return x.abs() + 0.1


def changed(x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    """A copy of x that `change` wrote into."""
    y = x.clone()
    change(y)
    return y


def cut(d: Draw, x: Tensor) -> Any:
    """A subscript of x: for every axis all, a range, a number or a list."""
    return tuple(
        d.pick(
            slice(None),
            slice(None),
            slice(d.number(0, n - 1), None),
            slice(None, None, d.number(1, 3)),
            slice(None, -1 if n > 1 else None),
            d.number(-n, n - 1),
            [d.number(0, n - 1), d.number(0, n - 1)],
        )
        for n in x.shape
    )


def resized(d: Draw, x: Tensor) -> Tensor:
    """x at another size."""
    mode = d.pick("nearest", "nearest-exact", "bilinear", "bicubic", "area", "linear", "trilinear")
    smooth = mode in ("bilinear", "bicubic", "linear", "trilinear")
    given: dict[str, Any] = {"mode": mode}
    if smooth:
        given["align_corners"] = d.yes(0.4)
    if mode in ("bilinear", "bicubic"):
        given["antialias"] = d.yes(0.3)
    spatial = x.shape[2:]
    if d.yes(0.3):
        x = x.mean((-2, -1), keepdim=True) if d.yes() else F.adaptive_avg_pool2d(x, 1)
    if d.yes(0.4):
        return F.interpolate(x, scale_factor=d.pick(0.5, 2.0, 1.5, 3.0), **given)
    return F.interpolate(x, size=[max(1, n * d.number(1, 4) // 2) for n in spatial], **given)


def convolved(d: Draw, x: Tensor, name: str, dims: int) -> Tensor:
    """A convolution of 1, 2 or 3 dimensions; now and then its weight or bias streams."""
    channels = x.shape[1] if x.ndim == dims + 2 else x.shape[0]
    groups = d.pick(1, 1, channels)
    kernel = [d.number(1, 3) for _ in range(dims)]
    out, transposed = d.pick(1, 2, 3), name == "conv_transpose"
    shape = [channels, out, *kernel] if transposed else [out * groups, channels // groups, *kernel]
    weight = d.held(*shape)
    if d.yes(0.1):
        weight = weight * x.mean()
    given: dict[str, Any] = {"stride": d.number(1, 2), "padding": d.number(0, 2), "dilation": d.number(1, 2)}
    operator = getattr(F, f"{name}{dims}d")
    if d.yes(0.05):
        return operator(d.held(*x.shape), x, padding=1)
    return operator(x, weight, d.held(out * groups) if d.yes() else None, groups=groups, **given)


def pooled(d: Draw, x: Tensor, name: str, dims: int) -> Any:
    """A pool of 1, 2 or 3 dimensions, of windows or (adaptive) of bins."""
    operator = getattr(F, f"{name}{dims}d")
    if name.startswith("adaptive"):
        return operator(
            x, [d.pick(1, 1, 2, 3, None if name.endswith("avg_pool") else 4) for _ in range(dims)]
        )
    kernel = [d.number(1, 3) for _ in range(dims)] if d.yes(0.8) else list(x.shape[-dims:])
    if name == "lp_pool":
        return operator(
            x, d.pick(1.0, 2.0, 3.0), kernel[0] if dims == 1 else kernel, d.pick(None, 1, 2), d.yes()
        )
    given = {"stride": d.pick(None, 1, 2, 3), "padding": d.pick(0, 0, 1), "ceil_mode": d.yes()}
    if name == "avg_pool":
        extra = {"divisor_override": d.pick(None, None, 3)} if dims > 1 else {}
        return operator(x, kernel, count_include_pad=d.yes(), **extra, **given)
    return operator(x, kernel, dilation=d.pick(1, 1, 2), return_indices=d.yes(0.3), **given)


def unpooled(d: Draw, x: Tensor) -> Tensor:
    """Max pooling undone by its own indices, as SegNet does."""
    y, at = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y, at, 2, output_size=x.shape)


def attention(d: Draw, x: Tensor) -> Tensor:
    """Of the value with itself or with held keys."""
    other = x if d.yes() else d.held(*x.shape)
    return F.scaled_dot_product_attention(x, other, other, is_causal=d.yes(0.3))


def einsum(d: Draw, x: Tensor) -> Tensor:
    """A few contractions of a map."""
    _, c, h, w = x.shape
    formula, *others = d.pick(
        ("nchw,oc->nohw", d.held(3, c)),
        ("nchw,c->nhw", d.held(c)),
        ("nchw,nchw->nhw", d.tensor(x).expand(x.shape)),
        ("nchw,wk->nchk", d.held(w, 2)),
        ("nchw,hk->nckw", d.held(h, 2)),
        ("nchw->nhwc",),
        ("nchw->nc",),
        ("nchw,nohw->nco", x),
        ("nchw,h->nchw", d.held(h)),
    )
    return torch.einsum(formula, x, *others)


def viewed(d: Draw, x: Tensor) -> Tensor:
    """Another shape of as many elements: two axes merged, one split, or all mixed."""
    shape = list(x.shape)
    kind = d.pick("merge", "split", "all", "one")
    if kind == "merge":
        at = d.number(0, x.ndim - 2)
        shape[at : at + 2] = [shape[at] * shape[at + 1]]
    elif kind == "split":
        at = d.number(0, x.ndim - 1)
        parts = d.pick(*[k for k in range(1, shape[at] + 1) if shape[at] % k == 0])
        shape[at : at + 1] = [parts, shape[at] // parts]
    elif kind == "all":
        shape = [-1]
    else:
        shape.insert(d.number(0, x.ndim), 1)
    return d.pick(x.reshape, x.contiguous().view)(shape)


def normed(d: Draw, x: Tensor, name: str) -> Tensor:
    """A normalisation over the batch, or by images and channels."""
    channels = x.shape[1]
    weight, bias = (d.held(channels), d.held(channels)) if d.yes(0.6) else (None, None)
    mean, variance = d.held(channels).detach(), d.held(channels).detach().abs() + 0.1
    if name == "group_norm":
        return F.group_norm(x, d.pick(1, channels), weight, bias, d.pick(1e-5, 0.1))
    moments = (mean, variance) if d.yes() else (None, None)
    alone = d.yes() or moments == (None, None)
    return getattr(F, name)(x, *moments, weight, bias, alone, 0.0, d.pick(1e-5, 0.1))


def over_last(d: Draw, x: Tensor, name: str) -> Tensor:
    """A normalisation over the last axes."""
    shape = list(x.shape[-d.number(1, x.ndim) :])
    weight = d.held(*shape) if d.yes() else None
    if name == "rms_norm":
        return F.rms_norm(x, shape, weight, d.pick(None, 0.1))
    return F.layer_norm(x, shape, weight, d.held(*shape) if d.yes() else None, d.pick(1e-5, 0.1))


def sampled(d: Draw, x: Tensor, grid: Tensor | None = None) -> Tensor:
    """grid_sample at the grid's, held or streamed places."""
    n, _, h, w = x.shape
    if grid is None:
        grid = d.held(n, h, w, 2) if d.yes() else x[:, :2].permute(0, 2, 3, 1)
    return F.grid_sample(x, grid.tanh(), align_corners=d.yes())
