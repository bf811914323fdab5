"""Total stride and halo, against what is known by hand and against NaN propagation."""

import random
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.graph import geometry, padded_size, trace, trace_padded
from bigvision.graph.probe import probe


def test_a_unet() -> None:
    found = geometry(trace(smp.Unet("resnet18", encoder_weights=None, in_channels=4).eval(), (4, 1024, 1024)))
    assert (found.stride, found.halo, found.inexact, found.output_scale) == (32, 288, (), 1)


@pytest.mark.parametrize(
    ("model", "stride", "halo"),
    [
        (nn.Conv2d(2, 3, 7, padding=3), 1, 3),
        (nn.Conv2d(2, 3, (1, 5), padding=(0, 2)), 1, 2),
        (nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2)), 2, 0),
        (nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=4, mode="bilinear")), 4, 4),
        (nn.Sequential(nn.MaxPool2d(3, 3), nn.MaxPool2d(2, 2), nn.Upsample(scale_factor=6)), 6, 0),
    ],
)
def test_by_hand(model: nn.Module, stride: int, halo: int) -> None:
    found = geometry(trace(model, (2, 192, 192)))
    assert (found.stride, found.halo, found.inexact) == (stride, halo, ())


class Net(nn.Module):
    """A random encoder and decoder of strides that are powers of two."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        k, d = draw.choice([1, 3, 5]), draw.choice([1, 2])
        self.first = nn.Conv2d(2, 3, k, padding=d * (k // 2), dilation=d)
        self.down = draw.choice(
            [nn.Conv2d(3, 3, 3, 2, 1), nn.MaxPool2d(2), nn.AvgPool2d(4), nn.Conv2d(3, 3, 3, 4, 1)]
        )
        self.deep = nn.Conv2d(3, 3, 3, padding=1)
        self.mode = draw.choice(["nearest", "bilinear"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        deep = self.deep(self.down(x))
        factor = x.shape[-1] // deep.shape[-1]
        return x + F.interpolate(deep, scale_factor=factor, mode=self.mode)


@settings(max_examples=3)
@given(st.integers(0, 2**31))
def test_agrees_with_nan_propagation(seed: int) -> None:
    torch.manual_seed(seed)
    model = Net(random.Random(seed)).eval()
    read, seen = geometry(trace(model, (2, 256, 256))), probe(model, 2)
    assert read.stride == seen.stride
    assert (
        seen.halo <= read.halo <= seen.halo + read.stride
    )  # the graph may not know that a tap weighs nothing


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.GroupNorm(1, 2), "group_norm at the top level needs the whole image"),
        (nn.Upsample(size=(300, 300), mode="bilinear"), "resamples by a ratio"),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), "resamples by a ratio"),
    ],
)
def test_why_tiles_are_not_exact(model: nn.Module, reason: str) -> None:
    (found,) = geometry(trace(model, (2, 192, 192))).inexact
    assert reason in found


@pytest.mark.parametrize(("size", "padded"), [((1, 1), (32, 32)), ((32, 33), (32, 64)), ((95, 96), (96, 96))])
def test_padded_sizes(size: tuple[int, int], padded: tuple[int, int]) -> None:
    assert padded_size(*size, 32) == padded


def test_padded_to_its_own_stride() -> None:
    traced, stride = trace_padded(nn.Sequential(nn.MaxPool2d(4), nn.Upsample(scale_factor=4)), (2, 5, 9))
    assert (stride, traced.shape) == (4, (2, 8, 12))
    with pytest.raises(ValueError, match="all positive"):
        trace_padded(nn.Conv2d(2, 1, 1), (2, 0, 9))


class Pooled(nn.Module):
    """Stride 2, and a statistic of the whole image, which is no layer of few pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.gate = nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return F.interpolate(x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid(), scale_factor=2)


@pytest.mark.parametrize(
    ("model", "stride"),
    [
        (nn.Conv2d(2, 3, 7, padding=3), 1),
        (nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=4, mode="bilinear")), 4),
        (nn.Sequential(nn.MaxPool2d(3, 3), nn.MaxPool2d(2, 2), nn.Upsample(scale_factor=6)), 6),
        (Pooled(), 2),
        (smp.Unet("resnet18", encoder_weights=None, in_channels=2), 32),
    ],
)
def test_one_trace_is_enough(model: nn.Module, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    export = torch.export.export

    def counted(model: nn.Module, args: tuple[Tensor], **more: Any) -> torch.export.ExportedProgram:
        sizes.append(tuple(args[0].shape))
        return export(model, args, **more)

    monkeypatch.setattr(torch.export, "export", counted)
    before = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    traced, found = trace_padded(model, (2, 71, 103))
    expected = (2, *padded_size(71, 103, stride))
    assert (found, traced.shape, sizes) == (stride, expected, [(1, *expected)])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Binned(nn.Module):
    """Stride 1, beside a statistic in so many bins that they look like a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(F.adaptive_avg_pool2d(x, 32), size=x.shape[-2:])


def test_a_wrong_guess_costs_traces_only() -> None:
    traced, stride = trace_padded(Binned().eval(), (2, 71, 103))
    assert (stride, traced.shape) == (1, (2, 71, 103))
