"""The network under training and its classes, whatever it returns.

Shapes: C bands, K classes, H and W rows and columns.
"""

import torch
from torch import Tensor, nn

from bigvision.graph.geometry import trace_padded
from bigvision.graph.layout import UnsupportedOperatorError
from bigvision.graph.outputs import main_output
from bigvision.graph.trace import UntraceableError, trace
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.models.spec import load_model

PROBE = 256


class ClassLogits(nn.Module):
    """The logits [N, K, H, W] of a network's main output, with two classes for a single channel.

    One channel x means a sigmoid, which is the softmax of (0, x).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Image [N, C, H, W] to logits [N, K, H, W]."""
        logits: Tensor = main_output(self.network(image))
        if logits.shape[1] == 1:
            logits = torch.cat([logits * 0, logits], dim=1)
        return logits


def build_network(options: TrainOptions, channels: int) -> tuple[ClassLogits, int]:
    """The network with trainable parameters, and its number of classes.

    Raises:
        ValueError: where the model can't be built, doesn't take `channels` bands, or returns no map of logits
            as large as its input; or where crops aren't a multiple of its stride.
    """
    model = ClassLogits(load_model(options.model, options.weights))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    side = options.crop or PROBE
    shape, stride = _output(model, channels, side)
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] not in (side, -(-side // stride) * stride):
        raise ValueError(
            f"model {options.model} turns {side} x {side} pixels into {shape}, not a map of their classes"
        )
    if options.crop % stride:
        raise ValueError(f"--crop {options.crop} is not a multiple of the model's total stride {stride}")
    if shape[1] > 255:
        raise ValueError(f"model {options.model} has {shape[1]} classes; labels are bytes, 255 means none")
    return model, shape[1]


def _output(model: nn.Module, channels: int, side: int) -> tuple[tuple[int, ...], int]:
    """Shape of the output for an image padded to the total stride, and that (1 where the graph has none)."""
    try:
        traced, stride = trace_padded(model, (channels, side, side))
    except UntraceableError:
        with torch.inference_mode():
            return tuple(model(torch.zeros(1, channels, side, side)).shape), 1
    except UnsupportedOperatorError:
        traced, stride = trace(model, (channels, side, side)), 1
    return tuple(traced.output.meta["val"].shape), stride
