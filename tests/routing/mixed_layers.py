"""Two small layers at mixed resolutions, for the tests of both who takes levels and who selects them."""

import torch
from torch import nn

from bigvision.routing import MixedResolution

FACTORS, REGION = (1, 2, 4), 8
LAYERS = [nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 3, 3, padding=1)]


def mixed_layers() -> MixedResolution:
    """In float64; the layers keep the weights they were drawn with."""
    torch.manual_seed(0)
    for layer in LAYERS:
        layer.double()
    return MixedResolution(LAYERS, REGION, FACTORS, channels=2)
