"""Merged operators, packed convolutions and compiled loops give what the operators gave.

That merging changes nothing is part of the property of random networks (`test_forward`), in float64 and
without a compiler; here are the compiled loops and oneDNN's own convolutions.
"""

import pytest
import torch
from forward_oracle import error
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F

from bigvision.streaming import StreamedModel
from bigvision.streaming.compiled import NoCompilerError


class Residual(nn.Module):
    """Convolutions with activations, max pooling, a residual sum, upsampling and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.two, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        deep = F.max_pool2d(x, 3, 2, 1)
        deep = F.relu(deep + self.two(F.relu(self.one(deep))))
        return self.head(torch.cat([F.interpolate(deep, scale_factor=2), x], 1))


def merged(model: nn.Module, shape: tuple[int, int, int]) -> list[list[str]]:
    """The operators of every stage that has several."""
    streamed = StreamedModel(model, shape, compile=True)
    stages = (stage for walk in streamed.inference.passes for stage in walk.stages)
    return [[node.name for node in stage.operators] for stage in stages if len(stage.operators) > 1]


def test_what_is_merged() -> None:
    assert merged(Residual(), (2, 32, 16)) == [
        ["conv2d", "silu"],
        ["conv2d_1", "relu"],
        ["add", "relu_1", "upsample_nearest2d"],
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_compiled_loops_equal_the_whole_image(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigvision.streaming.compiled.LEAST_RESULTS", 0)
    torch.manual_seed(0)
    model, image = Residual().eval(), torch.randn(2, 44, 30)
    streamed = StreamedModel(model, (2, 44, 30), rows=10, dtype=dtype, compile=True)(image)
    with torch.no_grad():
        assert error(streamed.float(), model(image[None])) <= tolerance


ACTIVATIONS = [F.relu, F.silu, torch.sigmoid, torch.tanh, F.hardswish]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_convolution_takes_its_activation_along(activation: nn.Module, dtype: torch.dtype) -> None:
    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return activation(self.convolution(x)) * 2

    torch.manual_seed(0)
    model, image = Activated().eval(), torch.randn(4, 20, 13)
    assert len(merged(model, (4, 20, 13))) == 1
    streamed = StreamedModel(model, (4, 20, 13), rows=7, dtype=dtype, compile=True)(image)
    with torch.no_grad():
        whole = model.double()(image[None].double())
    assert error(streamed.double(), whole) <= {torch.bfloat16: 0.02, torch.float32: 1e-5}.get(dtype, 1e-6)


def test_weights_that_changed_are_packed_anew() -> None:
    torch.manual_seed(0)
    model, image = nn.Conv2d(3, 4, 3, padding=1).eval(), torch.randn(3, 12, 9)
    streamed = StreamedModel(model, (3, 12, 9), rows=5, compile=True)
    before = streamed(image)
    with torch.no_grad():
        model.weight.mul_(2)
        after, whole = streamed(image), model(image[None])
    assert error(after, whole) <= 1e-5
    assert error(before, whole) > 0.1


def test_without_a_compiler_nothing_is_begun() -> None:
    none = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with none, pytest.raises(NoCompilerError, match="needs a C\\+\\+ compiler"):
        StreamedModel(Residual(), (2, 32, 16), compile=True)


class Standardised(nn.Conv2d):
    """Its weight is computed, and so has no version where nothing is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Unbatched(nn.Module):
    """Pools without the axis of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.convolution(x).squeeze(0), 3, 2, 1).unsqueeze(0)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Standardised(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        Unbatched(),
    ],
    ids=["standardised", "batch norm", "unbatched"],
)
def test_inference_mode(model: nn.Module) -> None:
    model, image = model.eval(), torch.randn(3, 24, 20)
    streamed = StreamedModel(model, (3, 24, 20), rows=5, compile=True)
    with torch.inference_mode():
        assert error(streamed(image), model(image[None])) <= 1e-5
