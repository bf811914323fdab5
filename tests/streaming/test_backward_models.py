"""Gradients of the networks that people use, against whole-image autograd in float64."""

from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from gradient_oracle import compare
from torch import nn

from bigvision.streaming.losses import CrossEntropy, Dice

segmentation = torchvision.models.segmentation
IGNORING = CrossEntropy(torch.tensor([1.0, 2.0, 0.5, 1.0]), ignore_index=255) + 0.5 * Dice(ignore_index=255)


def torchvision_segmentation(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4)


def torchvision_classifier(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=4)


def smp_network(name: str, encoder: str) -> Callable[[], nn.Module]:
    return lambda: getattr(smp, name)(encoder, encoder_weights=None, in_channels=3, classes=4)


SEGMENTATION = {
    name: torchvision_segmentation(name)
    for name in (
        "fcn_resnet50",
        "fcn_resnet101",
        "deeplabv3_resnet50",
        "deeplabv3_resnet101",
        "deeplabv3_mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
    )
}
SEGMENTATION |= {
    f"{name}-{encoder}": smp_network(name, encoder)
    for name in ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "Linknet", "DeepLabV3", "DeepLabV3Plus")
    for encoder in ("resnet18", "efficientnet-b0", "mobilenet_v2")
}
CLASSIFIERS = {
    name: torchvision_classifier(name)
    for name in (
        "resnet18",
        "resnet50",
        "convnext_tiny",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "regnet_y_400mf",
    )
}
FAST = {"Unet-resnet18", "FPN-resnet18"}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SEGMENTATION]
)
def test_segmentation(name: str) -> None:
    torch.manual_seed(0)
    height, width = 83, 65
    target = torch.randint(0, 4, (height, width))
    target[20:30] = 255
    found = compare(SEGMENTATION[name](), (3, height, width), IGNORING, target, rows=32)
    assert found.gradient < 1e-9
    assert found.loss < 1e-10


@pytest.mark.parametrize(
    "name", [n if n == "resnet18" else pytest.param(n, marks=pytest.mark.slow) for n in CLASSIFIERS]
)
def test_classifiers(name: str) -> None:
    torch.manual_seed(0)
    found = compare(CLASSIFIERS[name](), (3, 75, 65), CrossEntropy(), torch.tensor([2]), rows=32)
    assert found.gradient < 1e-9
    assert found.loss < 1e-10


@pytest.mark.slow
def test_pixels_weighted_by_a_coarser_branch_are_exact() -> None:
    model = smp_network("PAN", "resnet18")()
    found = compare(model, (3, 75, 65), IGNORING, torch.randint(0, 4, (75, 65)), rows=32)
    assert found.gradient < 1e-9
