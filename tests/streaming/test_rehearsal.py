"""Kernels, statistics and derivatives are tried before work: what fails is refused by name."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bigvision.graph import UnsupportedOperatorError, trace
from bigvision.streaming import StreamedModel
from bigvision.streaming.losses import SquaredError
from bigvision.streaming.program import Program, compile_program
from bigvision.streaming.rehearsal import rehearse


class Then(nn.Module):
    """A convolution and what follows."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(2, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


def with_kernel(kernel: Callable[..., Tensor]) -> Program:
    """A program whose last stage, a ReLU, has another kernel."""
    program = compile_program(trace(Then(torch.relu), (2, 9, 7)))
    last = program.stages[program.output]
    return replace(program, stages={**program.stages, last.node: replace(last, kernel=kernel)})


def test_a_kernel_that_fails_is_refused() -> None:
    def failing(values: object, span: object) -> Tensor:
        raise IndexError("tuple index out of range")

    with pytest.raises(UnsupportedOperatorError, match=r"relu at .*themselves \(tuple index out of range\)"):
        rehearse(with_kernel(failing))


def test_a_kernel_with_other_rows_is_refused() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"relu at .*rows 0\.\.2 would be \(1, 4, 1, 7\) of"):
        rehearse(with_kernel(lambda values, span: torch.empty(1, 4, 1, 7, device="meta")))


def test_rows_of_another_type_are_refused() -> None:
    def pooled(v: Tensor) -> Tensor:
        return nn.functional.avg_pool2d((v > 0).sum(1, keepdim=True), 3, 1, 1)

    with pytest.raises(UnsupportedOperatorError, match=r"avg_pool2d at .*of torch\.float32, not .*int64"):
        compile_program(trace(Then(pooled), (2, 9, 7)))


def test_a_program_that_computes_its_rows_is_itself() -> None:
    program = compile_program(trace(Then(lambda v: v * v.std((2, 3), keepdim=True)), (2, 9, 7)))
    assert rehearse(program) is program


def through_complex(v: Tensor) -> Tensor:
    """A scale for each channel, the modulus of a complex mean."""
    mean = v.mean((2, 3), keepdim=True)
    return v * torch.view_as_complex(torch.stack([mean, mean * 2], -1)).abs()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda v: torch.igamma(v.abs() + 1, v.abs()), "igamma at .*no derivative"),
        (lambda v: torch.native_channel_shuffle(v, 2), "native_channel_shuffle at .*no derivative"),
        (through_complex, "view_as_complex at .*complex numbers"),
        (lambda v: v.argmax(1, keepdim=True), "of type torch.int64, which has no gradient"),
        (lambda v: v.mT, "with its rows on axis 3"),
        (lambda v: torch.cat([v, v]), r"output is \(2, 4, 8, 8\)"),
        (lambda v: v.mean(), r"output is \(\); a loss over one answer"),
        (lambda v: v.mean((1, 2, 3)), r"output is \(1,\); a loss over one answer"),
    ],
)
def test_what_has_no_gradient_is_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    model, image = Then(function), torch.randn(2, 8, 8)
    whole = model(image[None])
    streamed = StreamedModel(model, (2, 8, 8))
    with pytest.raises(ValueError, match=message):
        streamed.backward(image, torch.zeros(whole.shape[1:]), SquaredError())
    assert all(parameter.grad is None for parameter in model.parameters())
