"""The networks that people use: streamed forward equals whole; what can't be streamed is refused by name."""

import pytest
import segmentation_models_pytorch as smp
import torch
from forward_oracle import model_error
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.graph import UnsupportedOperatorError, UntraceableError, main_output, trace_padded
from bigvision.streaming import StreamedModel

FAST = ("Unet-resnet18", "DeepLabV3Plus-resnet18", "resnet18 (classifier)")
REFUSED = tuple(name for name in NETWORKS if name.startswith("MAnet"))


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in NETWORKS
        if name not in REFUSED
    ],
)
def test_streamed_equals_whole(name: str) -> None:
    torch.manual_seed(0)
    error, _ = model_error(NETWORKS[name](), (3, 101, 75), rows=24)
    assert error < 1e-10


def assert_equals_the_scene_itself(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Nothing is padded where the network's subsampling divides the scene."""
    model.double().eval()
    image = torch.randn(shape, dtype=torch.float64)
    streamed = StreamedModel(model, shape, dtype=torch.float64, rows=24)
    assert streamed.program.traced.shape == shape
    with torch.no_grad():
        whole = main_output(model(image[None]))
    assert (streamed(image) - whole).abs().max() < 1e-10 * whole.abs().max()


@pytest.mark.parametrize(
    "name", [name if name in FAST[:1] else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_a_scene_that_the_stride_divides_is_not_padded(name: str) -> None:
    torch.manual_seed(0)
    assert_equals_the_scene_itself(NETWORKS[name](), (3, 128, 96))


class Pooled(nn.Module):
    """`halvings` layers of stride 2, pooled adaptively, and back to the image's size."""

    def __init__(self, halvings: int, pools: list[tuple[int | None, int | None]], align: bool = True) -> None:
        super().__init__()
        layers = [nn.Conv2d(3 if i == 0 else 4, 4, 3, 2, 1) for i in range(halvings)]
        self.down = nn.Sequential(*layers) if layers else nn.Conv2d(3, 4, 3, padding=1)
        self.pools, self.align = pools, align
        self.head = nn.Conv2d(4 * (1 + len(pools)), 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        size = y.shape[-2:]
        bins = [F.adaptive_avg_pool2d(y, pool) for pool in self.pools]
        back = [F.interpolate(one, size, mode="bilinear", align_corners=self.align) for one in bins]
        return F.interpolate(self.head(torch.cat([y, *back], 1)), x.shape[-2:], mode="bilinear")


PYRAMID: list[tuple[int | None, int | None]] = [(1, 1), (2, 2), (3, 3), (6, 6)]
POOLED = {
    "strips": (lambda: Pooled(0, [(None, 1), (1, None)], align=False), (3, 64, 50)),
    "bins of rows": (lambda: Pooled(0, [(None, 3), (5, None)]), (3, 61, 47)),
    "Fast-SCNN": (lambda: Pooled(5, PYRAMID), (3, 320, 224)),
    "a pyramid over few rows": (lambda: Pooled(3, PYRAMID, align=False), (3, 72, 56)),
    "a strip by hand": (
        lambda: nn.Sequential(nn.AvgPool2d((48, 1)), nn.Upsample(scale_factor=(48, 1))),
        (3, 48, 35),
    ),
}
SEGMENTED = {
    "UPerNet": (lambda: smp.UPerNet("resnet18", encoder_weights=None, classes=2), (3, 352, 224)),
    "PSPNet": (
        lambda: smp.PSPNet("resnet18", encoder_weights=None, encoder_depth=5, classes=2),
        (3, 352, 224),
    ),
}


@pytest.mark.parametrize("name", [*POOLED, *(pytest.param(one, marks=pytest.mark.slow) for one in SEGMENTED)])
def test_bins_ask_for_no_stride(name: str) -> None:
    torch.manual_seed(0)
    make, shape = (POOLED | SEGMENTED)[name]
    assert_equals_the_scene_itself(make(), shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTED)
def test_pooled_networks_pad_to_their_subsampling(name: str) -> None:
    """Of 1100 x 700 pixels, which 32 does not divide."""
    traced, stride = trace_padded(SEGMENTED[name][0]().eval(), (3, 1100, 700))
    assert (stride, traced.shape) == (32, (3, 1120, 704))


class Placed(nn.Module):
    """Stride 2 behind an embedding of every pixel's place: one size of image only."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.places, self.down = nn.Parameter(torch.randn(1, 3, height, width)), nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.down(x + self.places), x.shape[-2:])


@pytest.mark.parametrize("size", [(40, 26), (41, 27)])
def test_a_network_of_one_size_is_traced_at_it(size: tuple[int, int]) -> None:
    assert_equals_the_scene_itself(Placed(*size), (3, *size))


def test_a_size_that_does_not_run_is_told_and_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"Placed does not run on an image of \(3, 30, 31\): \S+") as refused:
        StreamedModel(Placed(40, 26), (3, 30, 31))
    assert "1024" not in str(refused.value)
    with pytest.raises(ValueError, match=r"does not run on an image of \(5, 30, 31\)"):
        StreamedModel(NETWORKS["Unet-resnet18"](), (5, 30, 31))
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "name",
    [name if name == "MAnet-resnet18" else pytest.param(name, marks=pytest.mark.slow) for name in REFUSED],
)
def test_attention_over_pixels_is_refused_by_its_module(name: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"at decoder\.\S+ can't be computed row by row"):
        StreamedModel(NETWORKS[name](), (3, 301, 75))


def test_attention_over_a_few_pixels_is_gathered() -> None:
    torch.manual_seed(0)
    error, _ = model_error(NETWORKS["MAnet-resnet18"](), (3, 101, 75), rows=24)
    assert error < 1e-10


class Rolls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"roll": Roll()})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["roll"](x)


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, 1, 2)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x


def test_unknown_operators_are_refused_by_module() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"roll at inner\.roll can't be computed row by row"):
        StreamedModel(Rolls(), (3, 101, 75))


def test_control_flow_on_pixels_is_refused() -> None:
    with pytest.raises(UntraceableError, match=r"Branches can't be traced.*torch\.where"):
        StreamedModel(Branches(), (3, 101, 75))
