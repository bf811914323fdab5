"""What a rule states about its operator's arguments: nothing is overlooked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bigvision.graph import trace
from bigvision.graph.flow import flows
from bigvision.graph.layout import HELD, UnsupportedOperatorError
from bigvision.graph.rules import RULES
from bigvision.graph.rules.registry import rule


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ({}, "with the arguments that it honours"),
        ({"relu": "self slope"}, "relu has no argument slope"),
        ({"relu_of_mine": "self"}, "no operator relu_of_mine"),
        ({"conv2d": "input weight"}, "conv2d has a rule already"),
    ],
)
def test_a_rule_states_its_operators_own_arguments(statements: dict[str, str], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rule(**statements)(lambda node, args, source: HELD)
    assert "relu" not in RULES


def unhonoured() -> Iterator[tuple[torch._ops.OpOverload, str]]:
    """Every argument of every overload of every operator with a rule that the rule does not name."""
    for name, one in RULES.items():
        packet = getattr(torch.ops.aten, name)
        for overload in (getattr(packet, one) for one in packet.overloads()):
            for argument in overload._schema.arguments:
                if argument.name not in one.honours:
                    yield overload, argument.name


def test_every_argument_that_a_rule_does_not_name_is_refused_by_name() -> None:
    """Whatever the operator, whatever the argument: the check stands in front of all rules."""
    cases = list(unhonoured())
    assert ("rrelu", "generator") in {(one.overloadpacket.__name__, name) for one, name in cases}
    for overload, argument in cases:
        graph, value = fx.Graph(), object()
        given = {one.name: None for one in overload._schema.arguments} | {argument: value}
        node = graph.call_function(overload, kwargs=given)
        node.meta["nn_module_stack"] = {"": ("encoder.head", nn.Module)}
        with pytest.raises(UnsupportedOperatorError) as error:
            RULES[overload.overloadpacket.__name__](node, HELD)
        assert f"{overload.overloadpacket.__name__} at encoder.head" in str(error.value)


class Of(nn.Module):
    """A function of the image."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


aten = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda v: v.view(torch.int32).float(), "view at .* the argument dtype=torch.int32"),
        (lambda v: aten.upsample_nearest2d(v, [3, 4]), "upsample_nearest2d at .* argument self=a tensor of"),
        (lambda v: F.conv2d(v, v[:, :, :2, :2]), "conv2d at .* its `weight` is made of rows"),
        (lambda v: v.norm(p=0.5, dim=(2, 3)), "linalg_vector_norm at .* not ord=0.5"),
        (lambda v: v.prod(2).prod(2), "prod at .* no rule as a statistic"),
    ],
)
def test_arguments_that_are_not_honoured(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        flows(trace(Of(function), (4, 6, 8)))
