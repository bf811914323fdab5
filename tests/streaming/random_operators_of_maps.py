"""Draws of the operators that move axes, read windows, resample or need the whole image."""

from __future__ import annotations

import random
from typing import Any

import torch
from random_operators import Call, a_float, aten, axis, draws, joined_to, maybe, weights, x
from torch import Tensor


@draws("permute", "transpose", "t", "unsqueeze", "squeeze", "view", "_unsafe_view", "expand")
def moved(draw: random.Random, v: Tensor, name: str) -> Call:
    _, c, h, w = v.shape
    a, b = draw.choice([(1, 3), (2, 3), (1, -2), (-3, 3), (0, 2)])
    if name == "transpose":
        back = lambda v, y: y.relu().transpose(a, b)  # noqa: E731
        return Call(aten.transpose.int, {"self": x, "dim0": a, "dim1": b}, back)
    if name == "permute":
        order = draw.sample(range(4), 4)
        back = lambda v, y: y.relu().permute([order.index(one) for one in range(4)])  # noqa: E731
        return Call(aten.permute.default, {"self": x, "dims": order}, back)
    if name == "t":
        return Call(aten.t.default, {"self": lambda v: v[0, 0]}, lambda v, y: v * y.sigmoid().t())
    if name == "unsqueeze":
        at = draw.choice([0, 1, 2, 3, 4, -1, -3])
        return Call(aten.unsqueeze.default, {"self": x, "dim": at}, lambda v, y: y.relu().squeeze(at))
    if name == "squeeze":
        one = lambda v: v[:, :1]  # noqa: E731
        dim = draw.choice([None, 1, [0, 1], -3])
        kind = {type(None): "default", int: "dim", list: "dims"}[type(dim)]
        given = {"self": one} if dim is None else {"self": one, "dim": dim}
        return Call(getattr(aten.squeeze, kind), given, lambda v, y: v * y.sigmoid().view(1, 1, h, w))
    if name == "expand":
        given = {"self": lambda v: v[:, :1], "size": draw.choice([[1, c, h, w], [-1, c, -1, -1]])}
        return Call(aten.expand.default, given, lambda v, y: v * y.sigmoid())
    size = draw.choice([[c, h, w], [1, 1, c, h, w], [1, c, h, w, 1], [1, c, 1, h, w], [1, c * h, w]])
    view = getattr(aten, name).default
    return Call(view, {"self": lambda v: v.contiguous(), "size": size}, lambda v, y: y.relu().view(v.shape))


@draws("select", "slice")
def cut(draw: random.Random, v: Tensor, name: str) -> Call:
    at = axis(draw) if name == "select" else draw.choice([1, 2, 3, -1, -2, -3])
    size = v.shape[at]
    if name == "select":
        given = {"self": x, "dim": at, "index": draw.randrange(-size, size)}
        return Call(aten.select.int, given, lambda v, y: v * y.unsqueeze(at).sigmoid())
    start, end = draw.randrange(-size, size), draw.randint(-size, size + 2)
    given = {"self": x, "dim": at, "start": maybe(draw, start), "end": maybe(draw, end)}
    return Call(aten.slice.Tensor, {**given, "step": draw.choice([1, 1, 2, 3])})


@draws("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d")
def resampled(draw: random.Random, v: Tensor, name: str) -> Call:
    by_size = draw.random() < 0.5
    given: dict[str, Any] = {"input": x, "output_size": None, "scale_factors": None}
    if by_size:
        given["output_size"] = [draw.choice([max(n // 2, 1), n, 2 * n, 3 * n, n + 1]) for n in v.shape[2:]]
    else:
        given["scale_factors"] = [draw.choice([0.5, 0.7, 1.0, 2.0, 2.3, 3.0]) for _ in range(2)]
    if name in ("upsample_bilinear2d", "upsample_bicubic2d"):
        given["align_corners"] = draw.random() < 0.5
    return Call(getattr(aten, name).vec, given)


@draws("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")
def adaptive(draw: random.Random, v: Tensor, name: str) -> Call:
    size = [draw.choice([1, 2, 3, n, max(n // 2, 1), n + 1]) for n in v.shape[2:]]
    return Call(getattr(aten, name).default, {"self": x, "output_size": size})


@draws("conv2d", "conv_transpose2d")
def convolved(draw: random.Random, v: Tensor, name: str) -> Call:
    channels = v.shape[1]
    groups = draw.choice([n for n in range(1, channels + 1) if channels % n == 0])
    kernel = (draw.randint(1, 4), draw.randint(1, 4))
    pairs = {
        "stride": [draw.choice([1, 1, 2, 3]) for _ in range(2)],
        "padding": [draw.randint(0, 3) for _ in range(2)],
        "dilation": [draw.choice([1, 1, 2]) for _ in range(2)],
    }
    if name == "conv2d":
        weight, bias = torch.randn(2 * groups, channels // groups, *kernel), maybe(draw, weights(2 * groups))
        overload = aten.conv2d.default
        if draw.random() < 0.3:
            overload, pairs["padding"] = aten.conv2d.padding, draw.choice(["same", "valid"])  # type: ignore[assignment]
            pairs["stride"] = [1, 1]
    else:
        weight, bias = torch.randn(channels, 2, *kernel), maybe(draw, weights(2 * groups))
        room = zip(pairs["stride"], pairs["dilation"], strict=True)
        pairs["output_padding"] = [draw.randrange(max(s, d)) for s, d in room]
        overload = aten.conv_transpose2d.input
    return Call(overload, {"input": x, "weight": weight.double(), "bias": bias, "groups": groups, **pairs})


@draws("max_pool2d", "max_pool2d_with_indices", "avg_pool2d")
def pooled(draw: random.Random, v: Tensor, name: str) -> Call:
    kernel = [draw.randint(1, 4), draw.randint(1, 4)]
    if draw.random() < 0.2:
        kernel = list(v.shape[2:])
    given: dict[str, Any] = {
        "self": x,
        "kernel_size": kernel,
        "stride": maybe(draw, [draw.randint(1, 3), draw.randint(1, 3)], []),
        "padding": maybe(draw, [draw.randint(0, k // 2) for k in kernel], [0, 0]),
        "ceil_mode": draw.random() < 0.5,
    }
    if name == "avg_pool2d":
        given |= {
            "count_include_pad": draw.random() < 0.5,
            "divisor_override": maybe(draw, draw.randint(1, 9)),
        }
    else:
        given["dilation"] = [draw.choice([1, 1, 2]) for _ in range(2)]
    return Call(getattr(aten, name).default, given)


@draws("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def padded(draw: random.Random, v: Tensor, name: str) -> Call:
    amounts = [draw.randint(0, 3) for _ in range(4)]
    if name in ("reflection_pad2d", "replication_pad2d"):
        return Call(getattr(aten, name).default, {"self": x, "padding": amounts})
    fewer = amounts[: draw.choice([2, 4])]
    if name == "constant_pad_nd":
        signed = [draw.choice([1, -1]) * amount for amount in fewer]
        return Call(aten.constant_pad_nd.default, {"self": x, "pad": signed, "value": draw.choice([0, 1.5])})
    mode = draw.choice(["constant", "reflect", "replicate", "circular"])
    value = maybe(draw, 1.5) if mode == "constant" else None
    given = {"self": x, "pad": fewer if mode == "constant" else amounts, "mode": mode, "value": value}
    return Call(aten.pad.default, given)


@draws("pixel_shuffle", "pixel_unshuffle")
def shuffled(draw: random.Random, v: Tensor, name: str) -> Call:
    r = draw.choice([1, 2, 3])
    if name == "pixel_shuffle":
        several = lambda v: torch.cat([v, v.sin()] * r * r, 1)[:, : v.shape[1] * r * r]  # noqa: E731
        return Call(aten.pixel_shuffle.default, {"self": several, "upscale_factor": r})
    return Call(aten.pixel_unshuffle.default, {"self": x, "downscale_factor": r})


REDUCTIONS = ("mean", "sum", "prod", "linalg_vector_norm", "amax", "amin", "max", "min", "argmax", "argmin")


@draws(*REDUCTIONS, "std", "var", "std_mean", "var_mean", "logsumexp", "any", "all")
def reduced(draw: random.Random, v: Tensor, name: str) -> Call:
    """Over channels or columns, or over the image; kept axes or not."""
    packet, keep = getattr(aten, name), draw.random() < 0.5
    single = name in ("prod", "max", "min", "argmax", "argmin")
    dims = draw.choice([[1], [3], [2, 3], [-1, -2], [1, 2, 3], [2], [1, 3], [0, 1]])
    given: dict[str, Any] = {"self": (lambda v: v > 0.5) if draw.random() < 0.2 and name == "sum" else x}
    given |= {"dim": axis(draw) if single else dims, "keepdim": keep}
    names = [given["dim"]] if single else dims

    def back(v: Tensor, y: Any) -> Tensor:
        whole = y if isinstance(y, Tensor) else y[0] + (0 if name in ("max", "min") else y[1])
        for dim in [] if keep else sorted(dim % 4 for dim in names):
            whole = whole.unsqueeze(dim)
        return joined_to(v, whole / v.shape[2])

    if name in ("std", "var", "std_mean", "var_mean"):
        if draw.random() < 0.5:
            return Call(packet.correction, {**given, "correction": draw.choice([None, 0, 1, 2])}, back)
        return Call(packet.dim, {**given, "unbiased": draw.random() < 0.5}, back)
    if name in ("mean", "sum", "prod"):
        given["dtype"] = a_float(draw, v)
    if name == "linalg_vector_norm":
        given |= {"ord": draw.choice([2, 1, 3, 2.5, 0.5, float("inf")]), "dtype": maybe(draw, torch.float64)}
    overloads = {"mean": "dim", "sum": "dim_IntList", "prod": "dim_int", "max": "dim", "min": "dim"}
    overloads |= {"any": "dims", "all": "dims"}
    return Call(getattr(packet, overloads.get(name, "default")), given, back)


@draws("group_norm", "native_group_norm", "_native_batch_norm_legit", "instance_norm")
def normalised(draw: random.Random, v: Tensor, name: str) -> Call:
    _, c, h, w = v.shape
    groups = draw.choice([n for n in range(1, c + 1) if c % n == 0])
    given: dict[str, Any] = {"input": x, "weight": maybe(draw, weights(c)), "bias": maybe(draw, weights(c))}
    given["eps"] = draw.choice([1e-5, 0.1])
    if name == "group_norm":
        return Call(
            aten.group_norm.default, {**given, "num_groups": groups, "cudnn_enabled": draw.random() < 0.5}
        )
    if name == "native_group_norm":
        given |= {"N": 1, "C": c, "HxW": h * w, "group": groups}
        given["input"] = lambda v: v.contiguous()
        return Call(aten.native_group_norm.default, given)
    given["momentum"] = draw.random()
    if name == "_native_batch_norm_legit":
        return Call(aten._native_batch_norm_legit.no_stats, {**given, "training": True})
    running = draw.random() < 0.5
    given |= {"running_mean": weights(c) if running else None, "running_var": weights(c) if running else None}
    given |= {"use_input_stats": not running, "cudnn_enabled": draw.random() < 0.5}
    return Call(aten.instance_norm.default, given)
