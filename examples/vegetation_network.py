"""Boosted trees as a network: every pixel by its share of colours, its brightness and its surroundings.

Shapes: x [1, 3, H, W] (red, green, blue as stored, 0 where there is no data) -> logits [1, 1, H, W].
Legend: F features.

What transfers from flight to flight is not a band's brightness but its part in the pixel's whole, and how
smooth the surroundings are: a lake can be as green as a field. A flight's exposure is one number, the scene's
mean. Trees split on such features and don't extrapolate beyond what they have seen.

A tree is three convolutions of one pixel with a step after each of the first two (the idea is that of
Nakandala et al., 2020, A Tensor Compiler for Unified Machine Learning Prediction Serving): which tests a
pixel passes, which leaf all tests on its way lead to, and that leaf's value. So a forest is streamed, planned
and routed like any network. `compiled_trees.py` makes the weights; bfloat16 can't tell a threshold from its
neighbours, so `--dtype float32` goes with it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

WINDOWS = (3, 7, 15, 31, 61)  # pixels; 15 to 305 m on the ground
GROVE = 6  # trees; measured 4 to 5 times as fast as 60 at once
DARK = 0.1  # of the scene's mean brightness: below it, grain is mostly noise


class Surroundings(nn.Module):
    """Chromaticity and brightness of each pixel, their means and variances around it, and how grainy that is.

    Args:
        windows: odd sides in pixels; a mean is over those of a window's pixels that have data.
        exposure: what brightness is divided by; where 0, the mean over the scene's pixels with data, so that
            the network needs the whole scene (streaming takes a pass of its own for it).
    """

    neighbours: Tensor

    def __init__(self, windows: tuple[int, ...] = WINDOWS, exposure: float = 0.0) -> None:
        super().__init__()
        self.windows, self.exposure = windows, exposure
        self.features = 3 + 7 * len(windows)
        kernel = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).expand(2, 1, 3, 3).clone()
        self.register_buffer("neighbours", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, 3, H, W] to [1, F, H, W]."""
        total = x.sum(1, keepdim=True)
        seen = (total > 0).to(x.dtype)
        brightness = total / self._light(total, seen)
        # About 0, so that a variance is no small difference of large numbers.
        shares = x[:, :2] / total.clamp(min=1e-6) - 1 / 3
        colour = torch.cat([shares, brightness - 1], 1) * seen
        lit = torch.cat([colour[:, 2:], seen], 1)
        beside = functional.conv2d(lit, self.neighbours, padding=1, groups=2)
        laplacian = beside[:, :1] - beside[:, 1:] * colour[:, 2:]  # of those neighbours that have data
        grain = laplacian.abs() / (brightness.clamp(min=0) + DARK) * seen
        around = torch.cat([colour, colour.square(), grain, seen], 1)
        return torch.cat([colour, *(_local(around, size) for size in self.windows)], 1)

    def _light(self, total: Tensor, seen: Tensor) -> Tensor | float:
        if self.exposure:
            return self.exposure
        everywhere = [one.mean((2, 3), keepdim=True).clamp(min=1e-6) for one in (total, seen)]
        return everywhere[0] / everywhere[1]


def _local(around: Tensor, size: int) -> Tensor:
    """Colours' means and variances and the grain's mean over windows: [1, 8, H, W] to [1, 7, H, W]."""
    # Zeros beyond the edge and without data weigh nothing: the last channel says how many do.
    tall = functional.avg_pool2d(around, (size, 1), 1, (size // 2, 0))
    sums = functional.avg_pool2d(tall, (1, size), 1, (0, size // 2))
    means = sums[:, :7] / sums[:, 7:].clamp(min=0.5 / size**2)
    variances = (means[:, 3:6] - means[:, :3].square()).clamp(min=0)
    return torch.cat([means[:, :3], variances, means[:, 6:]], 1)


class Grove(nn.Module):
    """A few boosted binary trees over F features, [1, F, H, W] to the sum of their leaves [1, 1, H, W]."""

    def __init__(self, features: int, trees: int, leaves: int) -> None:
        super().__init__()
        splits = leaves - 1
        self.tests = nn.Conv2d(features, trees * splits, 1)
        self.paths = nn.Conv2d(trees * splits, trees * leaves, 1)
        self.values = nn.Conv2d(trees * leaves, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The trees' part of the logit."""
        # (feature - threshold) times a power of two so large that all above 0 is above 1: 1 goes right.
        right = self.tests(x).clamp(0, 1)
        # 1 minus the number of tests that lead elsewhere.
        reached = functional.relu(self.paths(right))
        return self.values(reached)


class Forest(nn.Module):
    """Boosted binary trees in groves, few enough at a time that what lies between stays in the cache."""

    def __init__(self, features: int, trees: int, leaves: int) -> None:
        super().__init__()
        sizes = [min(GROVE, trees - first) for first in range(0, trees, GROVE)]
        self.groves = nn.ModuleList(Grove(features, size, leaves) for size in sizes)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, F, H, W] to the sum of all trees' leaves [1, 1, H, W]."""
        return torch.cat([grove(x) for grove in self.groves], 1).sum(1, keepdim=True)


class VegetationTrees(nn.Module):
    """A forest over a pixel's surroundings."""

    def __init__(self, trees: int, leaves: int, windows: tuple[int, ...], exposure: float) -> None:
        super().__init__()
        self.surroundings = Surroundings(windows, exposure)
        self.forest = Forest(self.surroundings.features, trees, leaves)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of vegetation."""
        return self.forest(self.surroundings(x))


def trees(
    trees: int = 120, leaves: int = 8, windows: int = len(WINDOWS), exposure: float = 0.0
) -> VegetationTrees:
    """What `--model examples/vegetation_network.py:trees` names; `windows` counts from the smallest."""
    return VegetationTrees(trees, leaves, WINDOWS[:windows], exposure)
