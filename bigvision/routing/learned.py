"""The learned gate of a cascade: what it sees of a region, and the file that it is kept in.

Training and processing both come here, so that a gate sees of a region in use what it saw when it learned.

Legend: C bands, K logits, h, w rows and columns of a region, n of its pixels with data, D = 2C + 2 features.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bigvision.gating import LinearScorer
from bigvision.routing.pixel import entropy, margin


def feature_count(channels: int) -> int:
    """D of scenes with C bands."""
    return 2 * channels + 2


def region_features(pixels: Tensor, logits: Tensor, shown: Tensor) -> Tensor:
    """Mean and deviation of each band, mean entropy and mean margin of the cheap network: float32 [D].

    Args:
        pixels: [C, h, w].
        logits: [K, h, w], of the cheap network.
        shown: bool [h, w], the pixels with data; at least one.
    """
    seen = pixels[:, shown].float()
    doubts = [kind(logits[None])[0][shown].mean() for kind in (entropy, margin)]
    return torch.cat([seen.mean(1), seen.std(1, correction=0), torch.stack(doubts)])


def load_gate(path: Path, channels: int) -> LinearScorer:
    """A gate over D features and two experts, from a safetensors file with `weight` [2, D] and `bias` [2].

    Raises:
        ValueError: a file that holds no such gate, or one for another number of bands.
    """
    features = feature_count(channels)
    try:
        state = load_file(path)
        weight, bias = state["weight"], state["bias"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: no learned gate with weight and bias: {error}") from error
    if weight.shape != (2, features) or bias.shape != (2,):
        raise ValueError(
            f"{path}: a gate of {list(weight.shape)} with a bias of {list(bias.shape)}, the scene's regions "
            f"have {features} features: it must be [2, {features}] and [2]"
        )
    gate = LinearScorer(features, 2, bias=True).requires_grad_(False)
    gate.load_state_dict({"weight": weight, "bias": bias})
    return gate
