"""IResNet ("improved residual network for face recognition"), with the parameter names of the public weights.

The residual unit is batch norm, convolution, batch norm, PReLU, convolution, batch norm (ArcFace: Deng et al.
2019, arXiv:1801.07698, section 3.1, after Han et al. 2017): normalisation before the first convolution, no
activation after the sum. Names and shapes follow InsightFace `arcface_torch`, so that its state dicts load
strictly.

Shapes: x [B, 3, S, S] -> [B, dim], S the image size (112), S/16 x S/16 positions before the linear layer.
"""

import torch
from torch import Tensor, nn

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
WIDTHS = (64, 128, 256, 512)


class ResidualUnit(nn.Module):
    """x + BN(conv(PReLU(BN(conv(BN(x)))))); the second convolution carries the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """IResNet of four stages.

    Args:
        depths: residual units of each stage.
        dim: width of the embedding.
        image_size: S; a multiple of 16, the public weights are for 112.
        dropout: before the linear layer.

    Raises:
        ValueError: for an image size that is no positive multiple of 16.
    """

    def __init__(
        self, depths: tuple[int, ...], dim: int = 512, image_size: int = 112, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(f"IResNet needs an image size that is a multiple of 16, not {image_size}")
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        befores = (WIDTHS[0], *WIDTHS[:-1])
        for number, (depth, before, width) in enumerate(zip(depths, befores, WIDTHS, strict=True), start=1):
            rest = [ResidualUnit(width, width, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(ResidualUnit(before, width, 2), *rest))
        self.bn2 = nn.BatchNorm2d(WIDTHS[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(WIDTHS[-1] * (image_size // 16) ** 2, dim)
        self.features = nn.BatchNorm1d(dim)
        # The embedding's scale is the head's business: its gain stays one, as in the public networks.
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, dim] of images [B, 3, S, S] in [-1, 1]."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for number in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        embeddings: Tensor = self.features(self.fc(self.dropout(torch.flatten(self.bn2(x), 1))))
        return embeddings


def iresnet18(dim: int = 512, image_size: int = 112, dropout: float = 0.0) -> IResNet:
    """IResNet-18: 24 M parameters, 2.6 GFLOPs (multiply-adds) at 112 x 112."""
    return IResNet(DEPTHS[18], dim, image_size, dropout)


def iresnet34(dim: int = 512, image_size: int = 112, dropout: float = 0.0) -> IResNet:
    """IResNet-34."""
    return IResNet(DEPTHS[34], dim, image_size, dropout)


def iresnet50(dim: int = 512, image_size: int = 112, dropout: float = 0.0) -> IResNet:
    """IResNet-50: 43.6 M parameters."""
    return IResNet(DEPTHS[50], dim, image_size, dropout)


def iresnet100(dim: int = 512, image_size: int = 112, dropout: float = 0.0) -> IResNet:
    """IResNet-100: 65.2 M parameters."""
    return IResNet(DEPTHS[100], dim, image_size, dropout)


def iresnet200(dim: int = 512, image_size: int = 112, dropout: float = 0.0) -> IResNet:
    """IResNet-200: 118.8 M parameters."""
    return IResNet(DEPTHS[200], dim, image_size, dropout)
