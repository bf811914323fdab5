"""A small U-Net: exact halos of under a hundred pixels, some ten thousand multiplications a pixel.

Shapes: x [B, in_channels, H, W] -> logits [B, classes, H, W]; H and W multiples of `2**depth`.
"""

import torch
from torch import Tensor, nn


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution 3 x 3, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class SmallUnet(nn.Module):
    """Encoder and decoder with skips (Ronneberger et al., 2015), the first skip at half resolution.

    The stem halves the image at once, and the last upsampling is a learned pixel shuffle: a full-resolution
    level would cost more than all others together. Every operator has an exact row rule.

    Args:
        in_channels: bands of the image.
        classes: channels of the output.
        width: channels at half resolution; every further level has twice as many.
        depth: halvings, at least 1; the total stride is 2**depth.

    Raises:
        ValueError: if an argument is below 1.
    """

    def __init__(self, in_channels: int = 4, classes: int = 5, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        if min(in_channels, classes, width, depth) < 1:
            raise ValueError(
                f"in_channels, classes, width and depth must be at least 1, not "
                f"{in_channels}, {classes}, {width}, {depth}"
            )
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(
            nn.Sequential(_block(before, after, stride=2), _block(after, after))
            for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _block(deep + skip, skip) for skip, deep in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.head = nn.Sequential(nn.Conv2d(width, 4 * classes, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel."""
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        for level, skip in zip(self.up, skips[-2::-1], strict=True):
            x = level(torch.cat([self.enlarge(x), skip], dim=1))
        return self.head(x)


def small_unet(in_channels: int = 4, classes: int = 5, width: int = 16, depth: int = 3) -> SmallUnet:
    """A `SmallUnet`; the factory that `--model bigvision.models.small_unet:small_unet` names."""
    return SmallUnet(in_channels, classes, width, depth)
