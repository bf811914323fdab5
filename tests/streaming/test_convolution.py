"""The convolution of the taped step against torch's own in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bigvision.streaming.convolution import channels_first, convolve

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
PADDINGS = st.tuples(st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.tuples(st.integers(5, 17), st.integers(5, 17)),
    kernel=PAIRS,
    stride=PAIRS,
    padding=PADDINGS,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    biased=st.booleans(),
    layout=st.sampled_from([torch.channels_last, torch.contiguous_format]),
    image_wanted=st.booleans(),
)
def test_gradients_equal_float64(
    seed, size, kernel, stride, padding, dilation, groups, biased, layout, image_wanted
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(1, 4, *size).to(memory_format=layout).requires_grad_(image_wanted)
    weight = torch.randn(6, 4 // groups, *kernel).to(memory_format=layout).requires_grad_()
    bias = torch.randn(6).requires_grad_() if biased else None
    given = (stride, padding, dilation, groups)
    y = convolve(x, weight, bias, *given)
    wide = [
        None if v is None else v.detach().double().requires_grad_(v.requires_grad) for v in (x, weight, bias)
    ]
    expected = F.conv2d(*wide, *given)
    seed_rows = torch.randn_like(y)
    y.backward(seed_rows)
    expected.backward(seed_rows.double())
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)
    for value, reference in zip((x, weight, bias), wide, strict=True):
        if value is None or reference.grad is None:
            assert value is None or value.grad is None
            continue
        scale = reference.grad.abs().max().clamp_min(1)
        assert (value.grad - reference.grad).abs().max() < 1e-5 * scale


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_channels_first_are_the_same_values(channels: int, height: int, width: int) -> None:
    x = torch.randn(1, channels, height + 2, width).to(memory_format=torch.channels_last)[:, :, 1:-1]
    found = channels_first(x)
    assert torch.equal(found, x)
    assert found.is_contiguous()
