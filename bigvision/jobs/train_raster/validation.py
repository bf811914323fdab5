"""Held-out scenes: confusion counts over whole scenes, each streamed exactly as `bigvision process` does.

Shapes: C bands, K classes, h and w rows and columns; confusion float64 [K, K], rows are the truth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor, nn

from bigvision.graph.layout import UnsupportedOperatorError
from bigvision.graph.trace import UntraceableError
from bigvision.jobs.process.engine import to_strides
from bigvision.jobs.process.geometry import Analysis, analyse
from bigvision.jobs.process.stream import SceneRows
from bigvision.jobs.train_raster.data import pixel_type
from bigvision.jobs.train_raster.memory import divided_memory, most_demanding
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.jobs.train_raster.parallel import Ranks
from bigvision.streaming.model import StreamedModel
from datasets.pairs import IGNORE, LabelledScene
from tiling import TileGrid

TILE = 512
# Of tiles where no exact halo exists: what they see of their surroundings.
APPROXIMATE_HALO = 128

Scored = tuple[Tensor, NDArray[np.uint8]]
"""Logits [K, h, w] of some pixels and their classes [h, w]."""


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


class Validation:
    """The held-out scenes of a run, divided among its ranks.

    Args:
        say: is told where the score is not exactly that of whole scenes.

    Raises:
        TooLittleMemoryError: `--memory` can't hold a stream; it says what could.
    """

    def __init__(
        self,
        model: nn.Module,
        scenes: Sequence[LabelledScene],
        options: TrainOptions,
        classes: int,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.scenes, self.classes, self.ranks = model, scenes, classes, ranks
        self.dtype = getattr(torch, options.dtype)
        self.own = scenes[ranks.rank :: ranks.size]
        self._streamed: dict[tuple[int, int, int], StreamedModel] = {}
        self._tiles: Analysis | None = None
        try:
            self._prepare_streams(options)
        except (UntraceableError, UnsupportedOperatorError) as error:
            self._tiles = analyse(model, scenes[0].shape)
            how = "approximated by" if self._tiles.inexact else "scored by"
            say(f"held-out scenes are {how} tiles with a halo of {self._halo} px: {error}")

    def _prepare_streams(self, options: TrainOptions) -> None:
        """One stream for every size of scene."""
        memory = divided_memory(options, self.model)
        with most_demanding() as attempt:
            for shape, pixels in dict.fromkeys((scene.shape, pixel_type(scene)) for scene in self.scenes):
                if shape not in self._streamed:
                    self._streamed[shape] = StreamedModel(
                        self.model, shape, rows=options.rows, dtype=self.dtype, device=self.ranks.device
                    )
                streamed = self._streamed[shape]
                with attempt():
                    rows = memory.rows_to_stream(streamed, options.rows, shape, pixels)
                    streamed.rows = min(streamed.rows, rows)

    @torch.inference_mode()
    def __call__(self) -> Score:
        """Score the model as it is now, in eval mode, on all scenes of all ranks."""
        self.model.eval()
        confusion = torch.zeros(self.classes, self.classes, dtype=torch.float64, device=self.ranks.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for scene in self.own:
            for logits, truth in self._tiled(scene) if self._tiles else self._whole(scene):
                target = torch.from_numpy(truth.astype(np.int64)).to(self.ranks.device)
                loss += F.cross_entropy(logits[None], target[None], ignore_index=IGNORE, reduction="sum")
                seen = target != IGNORE
                pairs = target[seen] * self.classes + logits.argmax(0)[seen]
                confusion += torch.bincount(pairs, minlength=self.classes**2).view_as(confusion)
        confusion, loss = self.ranks.sum_(confusion), self.ranks.sum_(loss)
        pixels = max(1.0, float(confusion.sum()))
        return Score(confusion.cpu().numpy().astype(np.int64), float(loss) / pixels)

    def _whole(self, scene: LabelledScene) -> Iterator[Scored]:
        """The rows of a whole scene, as they leave its stream."""
        _, height, width = scene.shape
        with SceneRows(scene.image, Window(0, 0, width, height)) as source:
            for row, y in self._streamed[scene.shape].stream(source):
                stop = row + y.shape[-2]
                valid = source.valid(row, stop)
                yield y[0].float(), scene.truth(Window(0, row, width, stop - row), valid)

    def _tiled(self, scene: LabelledScene) -> Iterator[Scored]:
        """Tiles of a network without a graph."""
        assert self._tiles is not None
        stride, device = self._tiles.stride, self.ranks.device
        for tile in TileGrid(scene.shape[1], scene.shape[2], TILE, self._halo, stride):
            pixels, truth = scene.read(tile.padded)
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(to_strides(pixels, stride)[None].to(device))[0].float()
            yield logits[:, *tile.crop], truth[tile.crop]

    @property
    def _halo(self) -> int:
        assert self._tiles is not None
        return APPROXIMATE_HALO if self._tiles.inexact else self._tiles.halo
