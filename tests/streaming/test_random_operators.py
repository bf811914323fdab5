"""Every operator with a rule, with random values of all that it honours: as the whole image, or refused."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import random_operators_of_maps  # noqa: F401, registers its draws
import torch
from forward_oracle import in_place
from gradient_oracle import graph_gradient_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import BLOCKS, RandomGraph
from random_operators import DRAWS, Call, an_operator
from test_forward import in_double, streamed_equals_whole
from torch import Tensor, nn

from bigvision.graph import trace
from bigvision.graph.layout import UnsupportedOperatorError
from bigvision.graph.rules import RULES
from bigvision.graph.rules.registry import ANY
from bigvision.graph.trace import operator_name
from bigvision.streaming.program import compile_program

CHOICES = [*BLOCKS, *[an_operator] * len(BLOCKS)]


def test_every_rule_has_a_draw() -> None:
    assert set(DRAWS) == set(RULES)


def drawn(name: str, count: int) -> list[Call]:
    """As many calls of the operator as drawn from the first seeds."""
    draw, found = random.Random(name), []
    for _ in range(count):
        shape = (1, draw.choice([2, 4, 6]), draw.randint(1, 12), draw.randint(1, 12))
        call = DRAWS[name](draw, torch.rand(shape, dtype=torch.float64), name)
        assert isinstance(call, Call)
        assert call.overload.overloadpacket.__name__ == name
        found.append(call)
    return found


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_argument_that_a_rule_honours_is_drawn(name: str) -> None:
    seen: dict[str, set[str]] = {}
    for call in drawn(name, 80):
        for argument in call.overload._schema.arguments:
            default = argument.default_value if argument.has_default_value() else None
            value = call.arguments.get(argument.name, default)
            if value is not None and value != default if not isinstance(value, Tensor) else True:
                seen.setdefault(argument.name, set()).add(repr(value))
    honoured = {argument for argument, value in RULES[name].honours.items() if value is ANY}
    assert honoured - set(seen) == set(), f"never away from its default in a draw of {name}"


class Alone(nn.Module):
    """One call, with a trainable convolution before it."""

    def __init__(self, call: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv, self.call = nn.Conv2d(channels, channels, 1), call
        self.double().eval()

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.call(self.conv(image))
        return y


def runs(model: nn.Module, image: Tensor) -> bool:
    """Whether the arguments drawn are such that the operator takes them at this size."""
    try:
        with torch.no_grad():
            y = model(image[None])
    except (RuntimeError, ValueError, IndexError):
        return False
    return bool(y.numel()) and bool(y.isfinite().all())


# Attention over pixels, and two axes of a map swapped into a matrix: all have rules that refuse.
REFUSED = ("t", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")


@pytest.mark.parametrize("name", sorted(RULES))
def test_an_operator_alone(name: str) -> None:
    draw, outcomes = random.Random(name), Counter[str]()
    for _ in range(30):
        torch.manual_seed(draw.randrange(1000))
        shape = (draw.choice([2, 4]), draw.randint(2, 9), draw.randint(2, 7))
        image = torch.randn(shape, dtype=torch.float64)
        model = Alone(DRAWS[name](draw, image[None], name), shape[0]).double()
        if not runs(model, image):
            continue
        if outcomes["streamed"] or outcomes["refused"] == (1 if name in REFUSED else 12):
            break
        traced = trace(model, shape)
        assert name in {operator_name(node) for node in traced.operators()}
        try:
            program = compile_program(traced)
        except UnsupportedOperatorError:
            outcomes["refused"] += 1
            continue
        with torch.no_grad():
            torch.testing.assert_close(in_place(program, image, draw.randint(1, 4)), model(image[None]))
        outcomes["streamed"] += 1
    assert outcomes, "no draw runs"
    assert outcomes["streamed"] or name in REFUSED


# The same ones each time; the long test below draws anew.
@settings(max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
def test_random_networks_of_every_operator(seed: int) -> None:
    outcome(seed)
    gradient_outcome(seed)


def outcome(seed: int) -> str:
    """A random network's forward equals the whole image's, or it is refused by name."""
    try:
        return "equal" if streamed_equals_whole(seed, CHOICES) else "unsettled"
    except UnsupportedOperatorError:
        return "refused"


def gradient_outcome(seed: int) -> str:
    """Likewise its gradient."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    shape = (draw.randint(1, 4), draw.randint(1, 20), draw.randint(1, 14))
    model = RandomGraph(draw, shape, draw.randint(1, 6), CHOICES)
    try:
        found = graph_gradient_error(model, shape, draw.randint(1, shape[1]))
    except UnsupportedOperatorError:
        return "refused"
    if found is None:
        return "unsettled"
    bound = 1e-7 if found < 1e-7 or in_double(trace(model.double().eval(), shape)) else 1e-4
    assert found < bound, f"relative gradient error {found:.1e}"
    return "equal"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=800, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
def test_very_many_random_networks_of_every_operator(seed: int) -> None:
    outcome(seed)
    gradient_outcome(seed)


def main(first: int, count: int) -> Counter[Any]:
    """Outcomes of many seeds, and those that are wrong: ``python test_random_operators.py FIRST COUNT``."""
    outcomes: Counter[Any] = Counter()
    for seed in range(first, first + count):
        for kind, judge in (("forward", outcome), ("gradient", gradient_outcome)):
            try:
                outcomes[kind, judge(seed)] += 1
            except Exception as error:
                outcomes[kind, "WRONG"] += 1
                print(seed, kind, type(error).__name__, str(error).splitlines()[:2], flush=True)
        if seed % 20 == 0:
            print(seed, dict(outcomes), flush=True)
    return outcomes


if __name__ == "__main__":
    import sys

    print(main(int(sys.argv[1]), int(sys.argv[2])))
