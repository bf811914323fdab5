"""A folded graph computes the same, with fewer operators and tensors of its own."""

import pytest
import torch
from torch import Tensor, fx, nn

from bigvision.graph import fold_batch_norm, trace
from bigvision.graph.trace import TracedGraph, operator_name

NORM = "_native_batch_norm_legit_no_training"


def run(traced: TracedGraph, image: Tensor) -> Tensor:
    values: dict[fx.Node, object] = {**traced.tensors, traced.image: image}
    for node in traced.operators():
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    (output,) = traced.outputs
    return values[output]  # type: ignore[return-value]


class Twice(nn.Module):
    """The convolution's result is read by others than the norm: it must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize(
    ("model", "norms"),
    [
        (nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.BatchNorm2d(4), nn.ReLU()), 0),
        (nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)), 0),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)), 0),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), 1),
        (nn.Sequential(nn.ConvTranspose2d(2, 4, 2, 2), nn.BatchNorm2d(4)), 1),
        (Twice(), 1),
    ],
)
def test_the_same_numbers(model: nn.Module, norms: int) -> None:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.double().eval()
    image = torch.randn(1, 2, 9, 11, dtype=torch.float64)
    traced = trace(model, (2, 9, 11))
    folded = fold_batch_norm(traced)
    with torch.no_grad():
        torch.testing.assert_close(run(folded, image), model(image), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(run(traced, image), model(image), rtol=0, atol=0)
    assert [operator_name(node) for node in folded.operators()].count(NORM) == norms
