"""The inference step moves as little as it can: rows are made where they are read, and stay there."""

from collections.abc import Callable

import pytest
import torch
from forward_oracle import in_place
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.graph import trace
from bigvision.streaming import StreamedModel, buffers
from bigvision.streaming.lines import LinePlan, plan_lines
from bigvision.streaming.program import compile_program
from bigvision.streaming.schedule import schedule

SIZES = st.integers(1, 23)


def lines_of(model: nn.Module, shape: tuple[int, int, int], rows: int) -> dict[str, LinePlan]:
    (walk,) = compile_program(trace(model.eval(), shape)).passes
    return {node.name: line for node, line in plan_lines(walk, schedule(walk, rows)).items()}


class Skip(nn.Module):
    """An encoder and a decoder that takes the encoder's map later, above or below the upsampled one."""

    def __init__(self, factor: tuple[int, int], first: bool) -> None:
        super().__init__()
        self.factor, self.first = factor, first
        self.down = nn.Conv2d(3, 4, factor, factor)
        self.deep = nn.Conv2d(4, 4, 5, padding=2)
        self.head = nn.Conv2d(7, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        deep = torch.relu(self.deep(self.down(x)))
        up = F.interpolate(deep, scale_factor=self.factor, mode="nearest")
        return self.head(torch.cat([up, x] if self.first else [x, up], 1))


@settings(max_examples=25)
@given(
    factor=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    first=st.booleans(),
    size=st.tuples(SIZES, SIZES),
    rows=SIZES,
)
def test_upsampled_rows_are_made_in_the_concatenation(
    factor: tuple[int, int], first: bool, size: tuple[int, int], rows: int
) -> None:
    model = Skip(factor, first).double()
    shape = (3, size[0] * factor[0], size[1] * factor[1])
    image = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        streamed = in_place(compile_program(trace(model, shape)), image, rows)
        assert torch.allclose(streamed, model(image[None]), rtol=0, atol=1e-12)


def test_a_part_of_a_concatenation_knows_its_place() -> None:
    place = lines_of(Skip((2, 2), first=False), (3, 64, 16), 8)["upsample_nearest2d"].part_of
    assert place is not None
    assert (place[0].node.name, place[1]) == ("cat", 3)


def test_rows_that_wait_in_pieces_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Skip((2, 2), first=True).double()
    image = torch.randn(3, 64, 16, dtype=torch.float64)
    streamed = StreamedModel(model, (3, 64, 16), rows=6, dtype=torch.float64)
    with torch.no_grad():
        whole = model(image[None])

    def joined(*args: object) -> None:
        raise AssertionError("rows were copied to be joined")

    with monkeypatch.context() as patched:
        patched.setattr(buffers.torch, "cat", joined)
        pieces = [y for _, y in streamed.stream(image)]
    assert torch.allclose(torch.cat(pieces, -2), whole, rtol=0, atol=1e-12)


class Readers(nn.Module):
    """One map and the convolutions that read it."""

    def __init__(self, *convolutions: nn.Module) -> None:
        super().__init__()
        self.readers = nn.ModuleList(convolutions)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([reader(x).mean(1) for reader in self.readers]).sum(0)


@pytest.mark.parametrize(
    ("readers", "columns"),
    [
        ([nn.Conv2d(2, 4, 3, padding=1)], (1, 1)),
        ([nn.Conv2d(2, 4, (3, 4), padding="same")], (1, 2)),
        ([nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)], (1, 1)),
        ([nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(3, 1, 1)], (1, 1)),
        ([nn.Conv2d(2, 4, 3, padding=d, dilation=d) for d in (1, 2, 3)], (0, 0)),
        ([nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")], (0, 0)),
        ([nn.MaxPool2d(3, 1, 1)], (0, 0)),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_buffer_has_the_zero_columns_that_most_of_the_work_wants(
    readers: list[nn.Module], columns: tuple[int, int], rows: int
) -> None:
    model = Readers(*readers).double()
    assert lines_of(model, (2, 12, 7), rows)["image"].columns == columns
    image = torch.randn(2, 12, 7, dtype=torch.float64)
    streamed = StreamedModel(model, (2, 12, 7), rows=rows, dtype=torch.float64)(image)
    with torch.no_grad():
        assert torch.allclose(streamed, model(image[None]), rtol=0, atol=1e-12)


OPERATORS = {
    "add": lambda x, y: torch.add(x, y, alpha=3),
    "sub": lambda x, y: torch.sub(x, y, alpha=2),
    "div": torch.div,
    "div floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "div trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "leaky relu": lambda x, y: F.leaky_relu(x, 0.3),
    "elu": lambda x, y: F.elu(x, 0.7),
    "relu6": lambda x, y: F.relu6(x),
    "broadcast": lambda x, y: x * y[:, :1],
}


class Between(nn.Module):
    """An elementwise operator that a convolution reads."""

    def __init__(self, operator: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.operator, self.before = operator, nn.Conv2d(2, 2, 3, padding=1)
        self.after = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.operator(7 * self.before(x), x.abs() + 0.5))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("compile", [False, True])
def test_elementwise_operators_keep_their_arguments(name: str, compile: bool) -> None:
    model = Between(OPERATORS[name]).double().eval()
    image = torch.randn(2, 13, 9, dtype=torch.float64)
    streamed = StreamedModel(model, (2, 13, 9), rows=3, dtype=torch.float64, compile=compile)(image)
    with torch.no_grad():
        assert torch.allclose(streamed, model(image[None]), rtol=0, atol=1e-12)


class OtherTypes(nn.Module):
    """Results whose type is not that of the operand in whose memory they could stand."""

    def __init__(self, integers: bool) -> None:
        super().__init__()
        self.integers, self.convolution = integers, nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        if not self.integers:
            return torch.relu(torch.round(y * 4).float()) + y / 3
        best = y.argmax(1, keepdim=True)
        twice = best + best
        return twice / (best + 1)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_results_of_another_type_get_memory_of_their_own(integers: bool, compile: bool) -> None:
    model = OtherTypes(integers).double().eval()
    image = torch.randn(2, 13, 9, dtype=torch.float64)
    streamed = StreamedModel(model, (2, 13, 9), rows=3, dtype=torch.float64, compile=compile)(image)
    with torch.no_grad():
        whole = model(image[None])
    assert streamed.double().allclose(whole.double(), rtol=0, atol=1e-6 if integers else 1e-12)
