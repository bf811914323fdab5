"""Arguments that change what an operator computes: exact, forward and gradient, also over tiny maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forward_oracle import error, in_place, restored
from gradient_oracle import compare
from test_several_results import Between
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.graph import trace
from bigvision.streaming.losses import CrossEntropy
from bigvision.streaming.program import compile_program

norm = torch.linalg.vector_norm


def spread(pool: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A map with a statistic of it, [1, C] or [1, C, 1, 1], spread over it again."""
    return lambda v: v * (pool(v).view(1, -1, 1, 1).to(v.dtype) / v.shape[-1]).tanh() + v


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a divisor over the whole map": spread(lambda v: F.avg_pool2d(v, v.shape[-2:], divisor_override=3)),
    "a divisor": lambda v: F.avg_pool2d(v, 3, 1, 1, divisor_override=5),
    "a sum of truths": spread(lambda v: (v > 0).sum((2, 3))),
    "a sum of truths in floats": spread(lambda v: (v > 0).sum((2, 3), dtype=torch.float32)),
    "a sum of integers": spread(lambda v: (3 * v).to(torch.int16).sum((2, 3))),
    "a sum of integers as bytes": spread(lambda v: (3 * v).int().sum((2, 3), dtype=torch.int8)),
    "a mean in half precision": spread(lambda v: v.mean((2, 3), dtype=torch.float16)),
    "a norm of single numbers in double": spread(lambda v: norm(v.float(), 2, (2, 3), dtype=torch.float64)),
    "a sum of truths over channels": lambda v: v * (v > 0).sum(1, keepdim=True),
    "a mean over channels as floats": lambda v: v * v.mean(1, keepdim=True, dtype=torch.float32).to(v),
    "a softmax in single precision": lambda v: v.softmax(1, dtype=torch.float32).to(v),
    "a cumulative sum in single precision": lambda v: v.cumsum(1, dtype=torch.float32).to(v),
    "the least of integers": spread(lambda v: (50 * v).to(torch.uint8).amin((2, 3))),
    "the greatest of truths": spread(lambda v: (v > 1).amax((2, 3))),
    "the greatest of all": lambda v: v / (v.max() + 2),
    "the greater of two": lambda v: torch.max(v, v.flip(1)),
    "a taxicab norm": spread(lambda v: v.norm(p=1, dim=(2, 3))),
    "a cubic norm": spread(lambda v: v.norm(p=3, dim=(2, 3))),
    "a norm of a dead channel": spread(lambda v: torch.cat([v, v.relu() * 0], 1).norm(dim=(2, 3))[:, 2:6]),
    "a deviation of a dead channel": spread(lambda v: torch.cat([v, v * 0], 1).std((2, 3))[:, 2:6]),
    "a deviation by a correction": spread(lambda v: v.std((2, 3), correction=0)),
    "a deviation over channels too": lambda v: v * v.std((1, 2, 3), keepdim=True),
    "a deviation over rows": lambda v: v * v.std(2, keepdim=True),
    "variance and mean": spread(lambda v: torch.sub(*torch.var_mean(v, (2, 3), correction=0))),
    "deviation and mean": spread(lambda v: torch.add(*torch.std_mean(v, (2, 3)))),
    "a deviation of everything": lambda v: v * v.std(),
}


class Normalised(nn.Module):
    """A norm with affine parameters and running statistics that are far from its input's."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), norm
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 2)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.conv(x)))
        return y


NORMS: dict[str, Callable[[], nn.Module]] = {
    "running statistics of instances": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "the same, affine": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True, eps=0.3),
    "a batch norm without running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "an eps": lambda: nn.GroupNorm(2, 4, eps=0.5),
}


def networks() -> dict[str, Callable[[], nn.Module]]:
    made: dict[str, Callable[[], nn.Module]] = {name: lambda f=f: Between(f) for name, f in FUNCTIONS.items()}
    return made | {name: lambda norm=norm: Normalised(norm()) for name, norm in NORMS.items()}


@pytest.mark.parametrize("name", networks())
def test_the_result_is_the_whole_images(name: str) -> None:
    torch.manual_seed(0)
    model, image = networks()[name]().double().eval(), torch.randn(3, 11, 8, dtype=torch.float64)
    program = compile_program(trace(model, (3, 11, 8)))
    with torch.no_grad():
        whole = model(image[None])
        for rows in (1, 3, 11):
            # A sum in half precision is rounded once here, in ATen after every few numbers.
            close = 1e-3 if "half" in name else 1e-6 if "single" in name or "floats" in name else 1e-10
            assert error(in_place(program, image, rows), whole) < close
            assert error(restored(program, image, rows), whole) < close


@pytest.mark.parametrize("name", [name for name in networks() if "half" not in name])
def test_the_gradient_is_the_whole_images(name: str) -> None:
    torch.manual_seed(0)
    found = compare(networks()[name](), (3, 11, 8), CrossEntropy(), torch.randint(0, 3, (11, 8)), rows=2)
    assert found.gradient < (1e-6 if "single" in name or "floats" in name else 1e-9)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "std": lambda v: v.std((2, 3)),
    "var": lambda v: v.var((2, 3)),
    "var by 0": lambda v: v.var((2, 3), correction=0),
    "var by 3": lambda v: v.var((2, 3), correction=3),
    "std over rows": lambda v: v.std(2).mean(-1),
    "mean": lambda v: v.mean((2, 3)),
    "sum": lambda v: v.sum((2, 3)),
    "norm": lambda v: v.norm(dim=(2, 3)),
    "amax": lambda v: v.amax((2, 3)),
    "amin": lambda v: v.amin((2, 3)),
    "adaptive average": lambda v: F.adaptive_avg_pool2d(v, 1).flatten(1),
    "adaptive average to bins": lambda v: F.adaptive_avg_pool2d(v, 3).flatten(2).sum(2),
    "adaptive maximum": lambda v: F.adaptive_max_pool2d(v, 1).flatten(1),
    "adaptive maximum to bins": lambda v: F.adaptive_max_pool2d(v, (2, 3)).flatten(2).sum(2),
    "average of a window": lambda v: F.avg_pool2d(v, v.shape[-2:]).flatten(1),
    "maximum of a window": lambda v: F.max_pool2d(v, v.shape[-2:]).flatten(1),
    "group norm": lambda v: F.group_norm(v, 1).amax((2, 3)),
}


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_tiny_maps(name: str, size: tuple[int, int]) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.precision = nn.Parameter(torch.zeros((), dtype=torch.float64))  # that of the trace

        def forward(self, x: Tensor) -> Tensor:
            return STATISTICS[name](x)

    image = torch.randn(3, *size, dtype=torch.float64)
    program = compile_program(trace(Network(), image.shape))
    torch.testing.assert_close(in_place(program, image, 1), Network()(image[None]), equal_nan=True)
