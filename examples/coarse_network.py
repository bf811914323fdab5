"""A cheap network for land cover from colour: what `vegetation_network.py` sees, at half the resolution.

Shapes: x [B, 3, H, W] (red, green, blue, standardised) -> logits [B, classes, H, W]; H, W multiples of 16.

A quarter of the pixels and of the cost: right inside of fields and lakes, blurred along their edges.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = (2, 8)  # cells, in pixels of half the resolution


class CoarseNetwork(nn.Module):
    """Colours, their differences, and cells' means and mean absolute deviations, at half the resolution.

    Args:
        width: channels of the two hidden layers.
        classes: channels of the output.
    """

    def __init__(self, width: int = 32, classes: int = 2) -> None:
        super().__init__()
        features = 5 + 6 * len(SIZES)
        self.head = nn.Sequential(
            nn.BatchNorm2d(features),
            nn.Conv2d(features, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel."""
        x = functional.avg_pool2d(x, 2)
        red, green, blue = x.split(1, dim=1)
        features = [x, green - red, blue - green]
        for size in SIZES:
            mean = _cells(x, size)
            apart = x - mean
            features += [mean, _cells(functional.relu(apart) + functional.relu(-apart), size)]
        return _enlarged(self.head(torch.cat(features, 1)), 2)


def _cells(x: Tensor, size: int) -> Tensor:
    """Means of size x size cells, interpolated back to every pixel."""
    return _enlarged(functional.avg_pool2d(x, size), size)


def _enlarged(x: Tensor, factor: int) -> Tensor:
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def coarse(width: int = 32, classes: int = 2) -> CoarseNetwork:
    """A `CoarseNetwork`; what `examples/coarse_network.py:coarse` names in a route."""
    return CoarseNetwork(width, classes)
