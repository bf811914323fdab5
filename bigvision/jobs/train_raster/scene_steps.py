"""One training step on a whole scene: its exact gradient, streamed by rows in bounded memory.

Batch norm uses its running statistics, which stay as they are. Shapes: C bands, H rows, W columns.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch import nn

from bigvision.jobs.train_raster.data import check_unchanged, pixel_type
from bigvision.jobs.train_raster.memory import Memory, divided_memory, most_demanding
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.jobs.train_raster.parallel import Ranks
from bigvision.jobs.train_raster.steps import StepResult
from bigvision.streaming.losses import Loss
from bigvision.streaming.model import StreamedModel
from datasets.pairs import LabelledScene
from datasets.streams import Use, stream


class ImageRows:
    """A scene as the gradient reads it, down and up: [:, a:b] is float32 [C, b - a, W]."""

    def __init__(self, scene: LabelledScene) -> None:
        self.scene, self.shape = scene, scene.shape

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[np.float32]:
        """Normalised rows."""
        return self.scene.image.read(_rows(key[1], self.shape))[0]


class ClassRows:
    """The classes of a scene: [a:b] is uint8 [b - a, W], 255 where there is none."""

    def __init__(self, scene: LabelledScene) -> None:
        self.scene, self.shape = scene, scene.shape[1:]

    def __getitem__(self, key: slice) -> NDArray[np.uint8]:
        """Classes of rows."""
        return self.scene.read(_rows(key, self.scene.shape))[1]


def _rows(rows: slice, shape: tuple[int, int, int]) -> Window:
    start, stop, _ = rows.indices(shape[1])
    return Window(0, start, shape[2], stop - start)


class SceneSteps:
    """A scene a rank and step, in an order shuffled anew each epoch."""

    only_gradients = True

    def __init__(
        self, scenes: Sequence[LabelledScene], options: TrainOptions, loss: Loss, ranks: Ranks
    ) -> None:
        self.scenes, self.options, self.loss, self.ranks = scenes, options, loss, ranks
        self.per_epoch = options.steps_per_epoch or -(-len(scenes) // ranks.size)
        self._memory: Memory | None = None
        self._streamed: dict[tuple[int, int, int], StreamedModel] = {}

    def prepare(self, model: nn.Module) -> None:
        """Trace the model at every scene's size and plan its gradient; errors as `StreamedModel` has them.

        Raises:
            TooLittleMemoryError: the memory and scratch space can't hold a step; it says what could.
        """
        self._memory = divided_memory(self.options, model)
        alike = {(scene.shape, pixel_type(scene)): scene.pair.scene for scene in reversed(self.scenes)}
        with most_demanding() as attempt:
            for (shape, pixels), name in alike.items():
                streamed, what = self._model(model, shape), f"one differentiated step over {name}"
                with attempt():
                    self._memory.plan_step(
                        streamed.program, streamed.dtype, self.options.rows, shape, pixels, what
                    )

    def __call__(self, model: nn.Module, step: int) -> StepResult:
        """Forward and backward of this rank's scene."""
        scene = self._scene(step)
        model.zero_grad(set_to_none=True)
        if scene is None:
            return StepResult(0.0, 0.0, "no scene")
        check_unchanged(scene, self.options)
        assert self._memory is not None
        budget = self._memory.budget(self.options.rows, scene.shape, pixel_type(scene))
        result = self._model(model, scene.shape).backward(
            ImageRows(scene), ClassRows(scene), self.loss, budget=budget
        )
        return StepResult(result.loss, 1.0, scene.pair.scene)

    def close(self) -> None:
        """Nothing is read ahead."""

    def _scene(self, step: int) -> LabelledScene | None:
        """The scene of this rank; None where an epoch's last step has fewer scenes than ranks."""
        epoch, place = divmod(step, self.per_epoch)
        order = stream(Use.SCENE_ORDER, self.options.seed, epoch).permutation(len(self.scenes))
        index = place * self.ranks.size + self.ranks.rank
        if self.options.steps_per_epoch is not None:
            index %= len(order)
        return self.scenes[order[index]] if index < len(order) else None

    def _model(self, model: nn.Module, shape: tuple[int, int, int]) -> StreamedModel:
        if shape not in self._streamed:
            dtype = getattr(torch, self.options.dtype)
            self._streamed[shape] = StreamedModel(model, shape, dtype=dtype, device=self.ranks.device)
        return self._streamed[shape]
