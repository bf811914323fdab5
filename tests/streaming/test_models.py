"""The networks that people use: streamed forward equals whole; what can't be streamed is refused by name."""

import pytest
import torch
from forward_oracle import model_error
from networks import NETWORKS
from torch import Tensor, nn

from bigvision.graph import UnsupportedOperatorError, UntraceableError
from bigvision.streaming import StreamedModel

FAST = ("Unet-resnet18", "DeepLabV3Plus-resnet18", "resnet18 (classifier)")
REFUSED = tuple(name for name in NETWORKS if name.startswith("MAnet"))


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in NETWORKS
        if name not in REFUSED
    ],
)
def test_streamed_equals_whole(name: str) -> None:
    torch.manual_seed(0)
    error, _ = model_error(NETWORKS[name](), (3, 101, 75), rows=24)
    assert error < 1e-10


@pytest.mark.parametrize(
    "name",
    [name if name == "MAnet-resnet18" else pytest.param(name, marks=pytest.mark.slow) for name in REFUSED],
)
def test_attention_over_pixels_is_refused_by_its_module(name: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"at decoder\.\S+ can't be computed row by row"):
        StreamedModel(NETWORKS[name](), (3, 301, 75))


def test_attention_over_a_few_pixels_is_gathered() -> None:
    torch.manual_seed(0)
    error, _ = model_error(NETWORKS["MAnet-resnet18"](), (3, 101, 75), rows=24)
    assert error < 1e-10


class Rolls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"roll": Roll()})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["roll"](x)


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, 1, 2)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x


def test_unknown_operators_are_refused_by_module() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"roll at inner\.roll can't be computed row by row"):
        StreamedModel(Rolls(), (3, 101, 75))


def test_control_flow_on_pixels_is_refused() -> None:
    with pytest.raises(UntraceableError, match=r"Branches can't be traced.*torch\.where"):
        StreamedModel(Branches(), (3, 101, 75))
