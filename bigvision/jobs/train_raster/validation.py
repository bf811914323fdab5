"""Held-out scenes: the loss-free part of truth. Confusion counts over whole scenes, tile by exact tile.

Shapes: K classes; confusion int64 [K, K], rows are the truth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor, nn

from bigvision.graph.geometry import Geometry, geometry
from bigvision.graph.trace import UntraceableError, trace
from bigvision.jobs.train_raster.network import PROBE
from bigvision.jobs.train_raster.parallel import Ranks
from datasets.pairs import IGNORE, LabelledScene
from tiling import TileGrid

TILE = 512
# Where no exact halo exists (global pooling, attention), what tiles see of their surroundings.
APPROXIMATE_HALO = 128


@dataclass(frozen=True)
class Score:
    """What a confusion matrix says, and the mean negative log-likelihood of the labelled pixels."""

    confusion: NDArray[np.int64]
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of labelled pixels whose class is right."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class [K], NaN for classes neither labelled nor predicted."""
        right = np.diag(self.confusion).astype(np.float64)
        union = self.confusion.sum(0) + self.confusion.sum(1) - right
        return np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that occur."""
        iou = self.iou
        return float(np.nanmean(iou)) if np.isfinite(iou).any() else 0.0


def tile_geometry(model: nn.Module, channels: int) -> tuple[int, int]:
    """Total stride and halo for validation tiles: exact where the graph says so."""
    try:
        found: Geometry = geometry(trace(model, (channels, PROBE, PROBE)))
    except (UntraceableError, ValueError):
        return 64, APPROXIMATE_HALO
    return found.stride, APPROXIMATE_HALO if found.inexact else found.halo


def logits_of(
    model: nn.Module, scene: LabelledScene, stride: int, halo: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Window, Tensor, NDArray[np.uint8]]]:
    """Window, logits [K, h, w] and classes [h, w] of every tile of a scene."""
    for tile in TileGrid(scene.shape[1], scene.shape[2], TILE, halo, stride):
        pixels, truth = scene.read(tile.padded)
        below, right = (-pixels.shape[1]) % stride, (-pixels.shape[2]) % stride
        image = F.pad(torch.from_numpy(pixels)[None].to(device), (0, right, 0, below))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(image)[0].float()
        yield tile.core, logits[:, *tile.crop], truth[tile.crop]


@torch.inference_mode()
def validate(
    model: nn.Module,
    scenes: Sequence[LabelledScene],
    classes: int,
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
) -> Score:
    """Score the model (in eval mode) on whole scenes, divided among the ranks."""
    model.eval()
    confusion = torch.zeros(classes, classes, dtype=torch.float64, device=ranks.device)
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    stride, halo = tile_geometry(model, scenes[0].shape[0])
    for scene in scenes[ranks.rank :: ranks.world]:
        for _, logits, truth in logits_of(model, scene, stride, halo, ranks.device, dtype):
            target = torch.from_numpy(truth.astype(np.int64)).to(ranks.device)
            loss += F.cross_entropy(logits[None], target[None], ignore_index=IGNORE, reduction="sum")
            seen = target != IGNORE
            pairs = target[seen] * classes + logits.argmax(0)[seen]
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    confusion, loss = ranks.total(confusion), ranks.total(loss)
    pixels = max(1.0, float(confusion.sum()))
    return Score(confusion.cpu().numpy().astype(np.int64), float(loss) / pixels)
