"""Networks for the tests of `bigvision process`, named there as FILE.py:factory?key=value."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RandomNet(nn.Module):
    """A small encoder-decoder: pools, strides, dilation, skips and upsampling drawn from a seed."""

    def __init__(self, seed: int, bands: int, classes: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def pick(*choices: int) -> int:
            return choices[int(torch.randint(len(choices), (), generator=draw))]

        self.depth = pick(0, 1, 2)
        first = conv(bands, 6, pick(1, 3, 5), dilation=pick(1, 2))
        self.stem = nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.ModuleList(down(pick(0, 1, 2)) for _ in range(self.depth))
        self.up = nn.ModuleList(conv(12, 6, 3) for _ in range(self.depth))
        self.mode = ("nearest", "bilinear")[pick(0, 1)]
        self.head = conv(6, classes, pick(1, 3))
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if tensor.is_floating_point():
                    spread = torch.randn(tensor.shape, generator=draw) * 0.3
                    tensor.copy_(spread.abs() + 0.5 if "running_var" in name else spread)

    @property
    def stride(self) -> int:
        return 2**self.depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for layer in self.down:
            skips.append(x)
            x = layer(x)
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            align = None if self.mode == "nearest" else False
            x = F.interpolate(x, scale_factor=2.0, mode=self.mode, align_corners=align)
            x = layer(torch.cat([x, skip], 1)).relu()
        return self.head(x)


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    reach = dilation * (kernel - 1) // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, reach, dilation)


def down(kind: int) -> nn.Module:
    return (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), conv(6, 6, 3, stride=2))[kind]


def random_net(seed: int = 0, bands: int = 3, classes: int = 4) -> nn.Module:
    return RandomNet(seed, bands, classes)


class Branching(RandomNet):
    """Untraceable: what it does depends on a pixel value (that no scene here has)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.flatten()[0] > 1e30:
            x = x / 1e30
        return super().forward(x)


def branching_net(seed: int = 0, bands: int = 3, classes: int = 4) -> nn.Module:
    return Branching(seed, bands, classes)


def pooling_net(bands: int = 3, classes: int = 4) -> nn.Module:
    """Every output needs the whole image."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.local = conv(bands, classes, 3)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.local(x)
            return y + self.pool(y)

    return Pooling()


def failing_factory() -> nn.Module:
    raise KeyError("no such backbone: resnet999")


def halving_net(bands: int = 3) -> nn.Module:
    return nn.Conv2d(bands, 2, 3, stride=2, padding=1)


def dict_net(bands: int = 3, classes: int = 4) -> nn.Module:
    class Dict(RandomNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"out": super().forward(x)}

    return Dict(5, bands, classes)


class Gated(nn.Module):
    """Two statistics of the scene, one after the other, and convolutions with a skip around them."""

    def __init__(self, bands: int, classes: int) -> None:
        super().__init__()
        self.stem, self.gate = conv(bands, 6, 3, stride=2), nn.Conv2d(6, 6, 1)
        self.norm, self.deep = nn.GroupNorm(2, 6), conv(6, 6, 5, dilation=2)
        self.head = conv(6 + bands, classes, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x / 100).relu()
        y = self.norm(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())
        y = F.interpolate(self.deep(y).relu(), scale_factor=2.0, mode="bilinear")
        return self.head(torch.cat([x / 100, y], 1))


def gated_net(bands: int = 3, classes: int = 4) -> nn.Module:
    torch.manual_seed(11)
    return Gated(bands, classes)


class Excited(nn.Module):
    """Two statistics behind so many convolutions that their results are better kept than computed again."""

    def __init__(self, bands: int, classes: int) -> None:
        super().__init__()
        self.stem = conv(bands, 4, 3, stride=4)
        self.bodies = nn.ModuleList(nn.Sequential(*(conv(4, 4, 7) for _ in range(24))) for _ in range(2))
        self.gate, self.head = nn.Conv2d(4, 4, 1), conv(4, classes, 3)
        for weight in self.bodies.parameters():
            weight.data = nn.init.dirac_(torch.empty_like(weight)) if weight.ndim == 4 else weight.data

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x / 100)
        for body in self.bodies:
            y = y + body(y) * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return F.interpolate(self.head(y), scale_factor=4.0, mode="bilinear")


def excited_net(bands: int = 3, classes: int = 4) -> nn.Module:
    torch.manual_seed(12)
    return Excited(bands, classes)


class Placed(nn.Module):
    """A network with a weight for each pixel: it runs on images of one size."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.conv = conv(3, 4, 3)
        draw = torch.Generator().manual_seed(5)
        self.place = nn.Parameter(torch.randn(1, 4, height, width, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.place


def placed_net(height: int, width: int) -> nn.Module:
    torch.manual_seed(5)
    return Placed(height, width)
