"""A network for land cover from colour: every pixel by its own colours and by its surroundings' texture.

Shapes: x [B, 3, H, W] (red, green, blue, standardised) -> logits [B, classes, H, W]; H, W multiples of 16.

Colour tells little across dates, when a lake can be as green as a field; that water is smooth and plants are
not holds in every season. The texture is therefore given, not learned, and what is learned is small: under
two thousand weights can't remember five photographs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = (4, 16)  # pixels; 20 and 80 m on the ground


class TextureNetwork(nn.Module):
    """Colours, their differences, and cells' means and mean absolute deviations, into 1 x 1 convolutions.

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
        red, green, blue = x.split(1, dim=1)
        features = [x, green - red, blue - green]
        for size in SIZES:
            mean = _cells(x, size)
            apart = x - mean
            # |apart|, of two ReLUs: an operator that whole scenes are streamed through.
            features += [mean, _cells(functional.relu(apart) + functional.relu(-apart), size)]
        return self.head(torch.cat(features, 1))


def _cells(x: Tensor, size: int) -> Tensor:
    """Means of size x size cells, interpolated back to every pixel."""
    means = functional.avg_pool2d(x, size)
    return functional.interpolate(means, scale_factor=size, mode="bilinear", align_corners=False)


def texture(width: int = 32, classes: int = 2) -> TextureNetwork:
    """A `TextureNetwork`; what `--model examples/vegetation_network.py:texture` names."""
    return TextureNetwork(width, classes)
