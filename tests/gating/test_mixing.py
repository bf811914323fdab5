import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from bigvision.gating import (
    MixedConv2d,
    MixedLinear,
    apply_experts_soft,
    mix_parameters,
    mixed_conv2d,
    mixed_linear,
    normalize,
    route,
)


def draw_probs(batch: int, num_experts: int) -> torch.Tensor:
    return normalize(torch.randn(batch, num_experts, dtype=torch.float64))


@given(st.integers(0, 4), st.integers(1, 3), st.lists(st.integers(0, 3), max_size=2))
def test_a_linear_layer_is_the_loop(batch: int, num_experts: int, middle: list[int]) -> None:
    layer = MixedLinear(3, 2, num_experts).double()
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    x, probs = torch.randn(batch, *middle, 3, dtype=torch.float64), draw_probs(batch, num_experts)
    y = layer(x, probs)
    assert y.shape == (batch, *middle, 2)
    for b in range(batch):
        mixed = sum(
            probs[b, e] * functional.linear(x[b], layer.weight[e], layer.bias[e]) for e in range(num_experts)
        )  # type: ignore[index]
        torch.testing.assert_close(y[b], mixed)


@given(
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
)
def test_a_convolution_is_the_loop(
    batch: int, num_experts: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    layer = MixedConv2d(
        4, 2, 3, num_experts, stride=stride, padding=padding, dilation=dilation, groups=groups
    ).double()
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    x, probs = torch.randn(batch, 4, 7, 6, dtype=torch.float64), draw_probs(batch, num_experts)
    y = layer(x, probs)
    for b in range(batch):
        outputs = [
            functional.conv2d(x[b : b + 1], layer.weight[e], layer.bias[e], stride, padding, dilation, groups)  # type: ignore[index]
            for e in range(num_experts)
        ]
        torch.testing.assert_close(y[b : b + 1], sum(p * o for p, o in zip(probs[b], outputs, strict=True)))
    empty = functional.conv2d(x[:0], layer.weight[0], None, stride, padding, dilation, groups)
    assert y.shape == (batch, *empty.shape[1:])


def test_mixing_weights_equals_soft_experts_with_all_of_them() -> None:
    layer, x, probs = MixedLinear(3, 2, 4).double(), torch.randn(5, 3, dtype=torch.float64), draw_probs(5, 4)
    experts = [
        lambda rows, w=w, b=b: functional.linear(rows, w, b)
        for w, b in zip(layer.weight, layer.bias, strict=True)
    ]  # type: ignore[arg-type]
    soft = apply_experts_soft(x, route(torch.ones_like(probs, dtype=torch.bool), probs), experts)
    torch.testing.assert_close(layer(x, probs), soft)


def test_gradients() -> None:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(mixed_linear, (leaf(2, 3), leaf(2, 2), leaf(2, 4, 3), leaf(2, 4)))
    assert torch.autograd.gradcheck(
        lambda *a: mixed_conv2d(*a, padding=1),
        (leaf(2, 2, 4, 3), leaf(2, 2), leaf(2, 3, 2, 3, 3), leaf(2, 3)),
    )


def test_bad_input_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match=r"\[B, 3\], got \[2, 4\]"):
        mix_parameters(torch.zeros(3, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"got \[3, 2\] and \[2, 4\]"):
        mixed_linear(torch.zeros(3, 2), torch.zeros(2, 4), torch.zeros(4, 1, 2))
