"""Batch normalisation by the statistics of all ranks' samples, on any backend (torch's own needs a GPU).

With it a training step is a function of the global batch alone: the same on one rank and on four, to
rounding. Parameter and buffer names are those of the batch norms it replaces.

Shapes: x [b, N] or [b, N, H, W] per rank; statistics [N] over all samples and places of all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """all_reduce with its gradient: every rank's output depends on this rank's input, so gradients are summed
    too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d` and `2d` over the samples of all ranks; like them in eval mode and for one rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"batch norm of [b, N] or [b, N, H, W], not of {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [b, N] or [b, N, H, W]; b may differ between ranks."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float()
        places = [0, *range(2, x.dim())]
        count = x.new_full((1,), x.numel() / x.shape[1])
        total = _SumOverRanks.apply(torch.cat([x.sum(places), count]))
        assert isinstance(total, Tensor)
        mean = total[:-1] / total[-1]
        shape = (1, -1, *([1] * (x.dim() - 2)))
        centred = x - mean.view(shape)
        # A second sum over the centred values: squares minus squared mean would cancel in float32.
        spread = _SumOverRanks.apply(centred.square().sum(places))
        assert isinstance(spread, Tensor)
        variance = spread / total[-1]
        self._follow(mean.detach(), variance.detach(), float(total[-1]))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        out = centred * scale.view(shape)
        return (out + self.bias.view(shape) if self.affine else out).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: float) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)


def with_global_norms(model: nn.Module) -> nn.Module:
    """Replace every batch norm of a model, in place, by one over all ranks; parameters and buffers stay the
    same.
    """
    for name, module in list(model.named_children()):
        if isinstance(module, _BatchNorm) and not isinstance(module, GlobalBatchNorm):
            replaced = GlobalBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
            replaced._parameters, replaced._buffers = module._parameters, module._buffers
            replaced.training = module.training
            setattr(model, name, replaced)
        else:
            with_global_norms(module)
    return model


@torch.no_grad()
def average_statistics(model: nn.Module, ranks: int) -> None:
    """Give all ranks the mean of their running statistics: local batch norms have seen different images."""
    if ranks == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    dist.all_reduce(statistic)
                    statistic /= ranks
