"""The networks that people use, by name, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import segmentation_models_pytorch as smp
import torchvision
from torch import nn

CLASSES = 4
DECODERS = ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "PAN", "Linknet", "MAnet", "DeepLabV3", "DeepLabV3Plus")
ENCODERS = ("resnet18", "efficientnet-b0", "mobilenet_v2")
TORCHVISION = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)
CLASSIFIERS = (
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "regnet_x_400mf",
)


def _torchvision_segmentation(name: str) -> Callable[[], nn.Module]:
    make = getattr(torchvision.models.segmentation, name)
    return lambda: make(weights=None, weights_backbone=None, num_classes=CLASSES)


def _torchvision_classifier(name: str) -> Callable[[], nn.Module]:
    make = getattr(torchvision.models, name)
    return lambda: make(weights=None, num_classes=CLASSES)


def _smp(name: str, encoder: str) -> Callable[[], nn.Module]:
    return lambda: getattr(smp, name)(encoder, encoder_weights=None, in_channels=3, classes=CLASSES)


SEGMENTATION: dict[str, Callable[[], nn.Module]] = {
    **{name: _torchvision_segmentation(name) for name in TORCHVISION},
    **{f"{name}-{encoder}": _smp(name, encoder) for name in DECODERS for encoder in ENCODERS},
}
CLASSIFICATION = {name: _torchvision_classifier(name) for name in CLASSIFIERS}
NETWORKS = SEGMENTATION | {f"{name} (classifier)": make for name, make in CLASSIFICATION.items()}
