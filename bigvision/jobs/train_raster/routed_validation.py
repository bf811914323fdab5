"""Held-out scenes routed as `bigvision process --route` routes them, and scored.

Shapes: K classes, h, w rows and columns of a window, R, S rows and columns of regions.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import Tensor

from bigvision.jobs.train_raster.parallel import Ranks
from bigvision.jobs.train_raster.validation import Score
from bigvision.routing.cascade import Cascade
from bigvision.routing.route_file import RouteSpec
from bigvision.routing.scene import FULL, SceneRouter
from datasets.pairs import IGNORE, LabelledScene


class Tally:
    """What a network makes of each region of one scene: its confusion and its summed log-likelihood.

    Attributes:
        confusion: int64 [R, S, K, K], rows are the truth. loss: float64 [R, S].
    """

    def __init__(self, scene: LabelledScene, region: int, grid: tuple[int, int], classes: int) -> None:
        self.scene, self.region, self.classes = scene, region, classes
        self.confusion = np.zeros((*grid, classes, classes), np.int64)
        self.loss = np.zeros(grid, np.float64)

    def add(self, window: Window, logits: Tensor, valid: NDArray[np.bool_]) -> None:
        """Count logits [K, h, w] over a window of whole regions."""
        truth = torch.from_numpy(self.scene.read(window)[1].astype(np.int64))
        losses = F.cross_entropy(logits[None], truth[None], ignore_index=IGNORE, reduction="none")[0]
        pairs = torch.where(truth == IGNORE, self.classes**2, truth * self.classes + logits.argmax(0))
        for top in range(0, window.height, self.region):
            for left in range(0, window.width, self.region):
                part = (slice(top, top + self.region), slice(left, left + self.region))
                at = (window.row_off + top) // self.region, (window.col_off + left) // self.region
                counts = torch.bincount(pairs[part].flatten(), minlength=self.classes**2 + 1)[:-1]
                self.confusion[at] = counts.view(self.classes, self.classes).numpy()
                self.loss[at] = float(losses[part].double().sum())


class RoutedValidation:
    """Held-out scenes and their routers, kept so that the networks are traced once.

    Args:
        cascade: under training; its parameters are read as they are when a score is asked for.
        spec: the route; its budget holds for each scene.
        scenes: held out.
        classes: K.
    """

    def __init__(
        self, cascade: Cascade, spec: RouteSpec, scenes: Sequence[LabelledScene], classes: int
    ) -> None:
        self.cascade, self.spec, self.scenes, self.classes = cascade, spec, scenes, classes
        self._routers: dict[int, SceneRouter] = {}

    def score(self, ranks: Ranks, dtype: torch.dtype = torch.float32) -> Score:
        """Of all scenes, divided among the ranks."""
        self.cascade.eval()
        confusion = torch.zeros(self.classes, self.classes, dtype=torch.float64, device=ranks.device)
        loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for index in range(ranks.rank, len(self.scenes), ranks.size):
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                counts, total = self._routed(index, ranks)
            confusion += torch.from_numpy(counts).to(confusion)
            loss += total
        confusion, loss = ranks.sum_(confusion), ranks.sum_(loss)
        pixels = max(1.0, float(confusion.sum()))
        return Score(confusion.cpu().numpy().astype(np.int64), float(loss) / pixels)

    def _routed(self, index: int, ranks: Ranks) -> tuple[NDArray[np.int64], float]:
        """Confusion [K, K] and summed log-likelihood of one scene, each region by its network."""
        router = self._router(index, ranks)
        router.gate = self.cascade.gate
        tally = Tally(self.scenes[index], self.spec.region, router.grid, self.classes)
        score, data = np.zeros(router.grid, np.float32), np.zeros(router.grid, bool)
        for box in router.blocks():
            block = router.score(box, tally.add)
            part = (slice(box.top, box.bottom), slice(box.left, box.right))
            score[part], data[part] = block.score, block.data
        expert = router.decide(score, data)
        for rectangle in router.rectangles(expert == FULL, FULL):
            router.compute(FULL, rectangle, tally.add)
        return tally.confusion.sum((0, 1)), float(tally.loss.sum())

    def _router(self, index: int, ranks: Ranks) -> SceneRouter:
        if index not in self._routers:
            self._routers[index] = SceneRouter(
                self.scenes[index].image,
                self.cascade.cheap,
                self.cascade.full,
                self.spec,
                gate=self.cascade.gate,
                device=str(ranks.device),
            )
        return self._routers[index]
