"""FLOPs against torch's own counter, bytes by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bigvision.graph import cost, trace


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(3, 8, (3, 5), (2, 1), 1, 2),
        nn.Conv2d(3, 6, 3, groups=3),
        nn.ConvTranspose2d(3, 6, 3, 2, 1, groups=3),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7)),
    ],
)
def test_multiplications_as_torch_counts_them(model: nn.Module) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 19, 23))
    heavy = ("conv2d", "conv_transpose2d", "linear")
    counted = cost(trace(model, (3, 19, 23))).operators
    assert sum(one.flops for one in counted if one.operator in heavy) == counter.get_total_flops()


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)  # x, y
        z = self.conv(y.relu())  # y, relu(y) and z are alive at once, and x is not
        return torch.cat([y, z], 1)  # y, z and twice as much


def test_bytes_by_hand() -> None:
    one = 2 * 8 * 8 * 4
    found = cost(trace(Skip(), (2, 8, 8)))
    assert found.parameters == 2 * 2 * 9 + 2
    assert found.parameter_bytes == 4 * found.parameters
    assert found.dense_bytes == 6 * one  # the image, y, relu(y), z, and cat's two
    assert found.dense_peak_bytes == 4 * one
    assert [operator.bytes for operator in found.operators] == [one, one, one, 2 * one]


def test_views_are_free() -> None:
    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)[:, 1:].reshape(1, -1) + 1

    found = cost(trace(View(), (2, 4, 4)))
    assert [operator.flops for operator in found.operators][-1] == 24
    assert found.flops == 24


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_dropout_that_is_off_is_free(share: float) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Dropout(share)).eval()
    found, without = (cost(trace(model, (2, 8, 8))) for model in (network, network[:1]))
    assert found.dense_bytes == without.dense_bytes
    assert found.dense_peak_bytes == without.dense_peak_bytes
    assert found.flops == without.flops
