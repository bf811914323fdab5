"""MobileFaceNet (Chen et al. 2018, arXiv:1804.07573), with the parameter names of the public weights.

Bottlenecks of pointwise, depthwise and linear pointwise convolutions; at the end a depthwise convolution over
the whole map instead of an average, since the corners of a face matter less than its middle. Names and shapes
follow InsightFace `arcface_torch` (twice the paper's width, its first block depthwise with 64 groups).

Shapes: x [B, 3, S, S] -> [B, dim], S the image size (112), S/16 x S/16 positions before the last convolution.
"""

from torch import Tensor, nn


class Layers(nn.Module):
    """Modules one after another under the name `layers`, with the input added if `residual`."""

    def __init__(self, *layers: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def conv_block(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Layers:
    """Convolution, batch norm, PReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return Layers(conv, nn.BatchNorm2d(outputs), nn.PReLU(outputs))


def bottleneck(inputs: int, outputs: int, groups: int, stride: int, residual: bool = False) -> Layers:
    """Widen to `groups` channels, filter each by itself, project without an activation."""
    project = Layers(nn.Conv2d(groups, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
    return Layers(
        conv_block(inputs, groups), conv_block(groups, groups, 3, stride, groups), project, residual=residual
    )


def stage(width: int, blocks: int, groups: int) -> Layers:
    """Residual bottlenecks of one width."""
    return Layers(*(bottleneck(width, width, groups, 1, residual=True) for _ in range(blocks)))


class MobileFaceNet(nn.Module):
    """MobileFaceNet.

    Args:
        dim: width of the embedding.
        image_size: S; a multiple of 16, the public weights are for 112.
        blocks: residual bottlenecks of the four stages; the first as one depthwise convolution if 1.
        scale: width relative to the paper's 64 channels.

    Raises:
        ValueError: for an image size that is no positive multiple of 16.
    """

    def __init__(
        self,
        dim: int = 512,
        image_size: int = 112,
        blocks: tuple[int, int, int, int] = (1, 4, 6, 2),
        scale: int = 2,
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(f"MobileFaceNet needs an image size that is a multiple of 16, not {image_size}")
        narrow, wide = 64 * scale, 128 * scale
        first = conv_block(narrow, narrow, 3, groups=64) if blocks[0] == 1 else stage(narrow, blocks[0], 128)
        self.layers = nn.ModuleList(
            [
                conv_block(3, narrow, 3, stride=2),
                first,
                bottleneck(narrow, narrow, 128, stride=2),
                stage(narrow, blocks[1], 128),
                bottleneck(narrow, wide, 256, stride=2),
                stage(wide, blocks[2], 256),
                bottleneck(wide, wide, 512, stride=2),
                stage(wide, blocks[3], 256),
            ]
        )
        self.conv_sep = conv_block(wide, 512)
        whole_map = nn.Conv2d(512, 512, image_size // 16, groups=512, bias=False)
        self.features = Layers(
            Layers(whole_map, nn.BatchNorm2d(512)),
            nn.Flatten(),
            nn.Linear(512, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, dim] of images [B, 3, S, S] in [-1, 1]."""
        for layer in self.layers:
            x = layer(x)
        embeddings: Tensor = self.features(self.conv_sep(x))
        return embeddings


def mobilefacenet(dim: int = 512, image_size: int = 112) -> MobileFaceNet:
    """MobileFaceNet as InsightFace's `mbf`: 2.0 M parameters at dim 512."""
    return MobileFaceNet(dim, image_size)


def mobilefacenet_large(dim: int = 512, image_size: int = 112) -> MobileFaceNet:
    """MobileFaceNet as InsightFace's `mbf_large`: twice the width, twice the blocks."""
    return MobileFaceNet(dim, image_size, blocks=(2, 8, 12, 4), scale=4)
