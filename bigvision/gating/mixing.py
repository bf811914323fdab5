"""Dynamic parameters: expert weights mixed for each input, then one layer instead of E.

Yang et al. 2019, "CondConv: Conditionally Parameterized Convolutions for Efficient Inference". A linear
layer is linear in its weights, so mixing weights equals mixing the outputs of all experts (soft, k = n) at
the cost of one.

Legend: B inputs, E experts, I and O channels, h and w of the kernel, H and W of the image.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def mix_parameters(weight: Tensor, probs: Tensor) -> Tensor:
    """sum_e probs[b, e] * weight[e]: weight [E, ...] and probs [B, E] -> [B, ...] in the dtype of ``weight``.

    Raises:
        ValueError: another number of experts.
    """
    if probs.dim() != 2 or probs.shape[1] != len(weight):
        raise ValueError(f"probs must be [B, {len(weight)}], got {list(probs.shape)}")
    mixed = probs.to(weight.dtype) @ weight.reshape(len(weight), -1)
    return mixed.view(len(probs), *weight.shape[1:])


def _check_inputs(x: Tensor, probs: Tensor) -> None:
    if len(x) != len(probs):
        raise ValueError(f"one row of probs for each input: got {list(x.shape)} and {list(probs.shape)}")


def mixed_linear(x: Tensor, probs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with its own mixture of weights for each input.

    Args:
        x: [B, ..., I].
        probs: [B, E], one mixture an input.
        weight: [E, O, I].
        bias: [E, O].

    Returns:
        [B, ..., O].
    """
    _check_inputs(x, probs)
    rows = x.reshape(len(x), -1, x.shape[-1]) if x.numel() else x.new_zeros(len(x), 0, x.shape[-1])
    y = rows @ mix_parameters(weight, probs).transpose(1, 2)
    if bias is not None:
        y = y + mix_parameters(bias, probs)[:, None]
    return y.view(*x.shape[:-1], weight.shape[1])


def mixed_conv2d(
    x: Tensor,
    probs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution with its own mixture of kernels for each image: one grouped convolution.

    Args:
        x: [B, I, H, W].
        probs: [B, E].
        weight: [E, O, I / groups, h, w].
        bias: [E, O].
        stride: of the convolution, as are the others.
        padding: zeros around.
        dilation: of the kernel.
        groups: of each image's channels.

    Returns:
        [B, O, H', W'].
    """
    _check_inputs(x, probs)
    batch, out_channels = len(x), weight.shape[1]
    if batch == 0:
        return functional.conv2d(x, weight[0], None, stride, padding, dilation, groups)
    kernels = mix_parameters(weight, probs).flatten(0, 1)
    biases = None if bias is None else mix_parameters(bias, probs).flatten()
    # Images become groups of one image's channels, so each meets its own kernels.
    y = functional.conv2d(
        x.reshape(1, -1, *x.shape[2:]), kernels, biases, stride, padding, dilation, batch * groups
    )
    return y.view(batch, out_channels, *y.shape[2:])


class MixedLinear(nn.Module):
    """E linear layers in one, mixed for each input; see :func:`mixed_linear`."""

    def __init__(self, in_features: int, out_features: int, num_experts: int, *, bias: bool = True) -> None:
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_features, in_features).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None

    def forward(self, x: Tensor, probs: Tensor) -> Tensor:
        """[B, ..., O] of x [B, ..., I] and probs [B, E]."""
        return mixed_linear(x, probs, self.weight, self.bias)


class MixedConv2d(nn.Module):
    """E convolutions in one, mixed for each image; see :func:`mixed_conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        num_experts: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        shape = (num_experts, out_channels, in_channels // groups, kernel_size, kernel_size)
        bound = (in_channels // groups * kernel_size**2) ** -0.5
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_channels)) if bias else None
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor, probs: Tensor) -> Tensor:
        """[B, O, H', W'] of x [B, I, H, W] and probs [B, E]."""
        return mixed_conv2d(
            x,
            probs,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
