"""One training step: gradients of a batch of crops into the model's parameters.

A step is a function of (weights, step number, rank): crops are counted, not drawn, and dropout is seeded by
the step, so that a resumed run repeats what the interrupted one would have done.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigvision.gating import counter_key
from bigvision.jobs.train_raster.options import TrainOptions
from bigvision.jobs.train_raster.parallel import Ranks
from bigvision.streaming.losses import Loss
from datasets.crops import Crop, draw_crop, read_crops, shift_tones
from datasets.pairs import LabelledScene


@dataclass(frozen=True)
class StepResult:
    """What a step gave on this rank: its loss, its weight among the ranks, and what it looked at."""

    loss: float
    weight: float
    places: str


class Steps(Protocol):
    """A way to train: `per_epoch` steps, each leaving gradients in the model.

    only_gradients: a step changes nothing else in it, so that one that is given up has done nothing.
    """

    per_epoch: int
    only_gradients: bool

    def prepare(self, model: nn.Module) -> None:
        """Raise now what would fail at the first step."""

    def __call__(self, model: nn.Module, step: int) -> StepResult:
        """Gradients of step `step` into `model`, in place of the old ones."""

    def close(self) -> None:
        """Stop what reads ahead."""


class CropSteps:
    """Batches of random crops, read one step ahead; batch norm in training mode."""

    only_gradients = False  # running statistics move

    def __init__(
        self, scenes: Sequence[LabelledScene], options: TrainOptions, loss: Loss, ranks: Ranks
    ) -> None:
        self.scenes, self.options, self.loss, self.ranks = scenes, options, loss, ranks
        self.sizes = [scene.shape[1:] for scene in scenes]
        pixels = sum(height * width for height, width in self.sizes)
        once = -(-pixels // (options.crop**2 * options.batch))
        self.per_epoch = options.steps_per_epoch or once
        self._places = range(ranks.rank, options.batch, ranks.size)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="crops")
        self._ahead: dict[int, Future[tuple[NDArray[np.float32], NDArray[np.uint8]]]] = {}

    def prepare(self, model: nn.Module) -> None:
        """Crops take what they take."""

    def __call__(self, model: nn.Module, step: int) -> StepResult:
        """Forward and backward of this rank's share of the batch."""
        options = self.options
        crops = self._crops(step)
        if not crops:
            model.zero_grad(set_to_none=False)
            return StepResult(0.0, 0.0, "no crop")
        pixels, truth = (self._ahead.pop(step, None) or self._read(step)).result()
        self._ahead = {step + 1: self._read(step + 1)}
        device = self.ranks.device
        image = torch.from_numpy(pixels).to(device).to(memory_format=torch.channels_last)
        target = torch.from_numpy(truth.astype(np.int64)).to(device)
        model.train()
        torch.manual_seed(counter_key(options.seed, step, self.ranks.rank))
        value = self.value(model, image, target)
        model.zero_grad(set_to_none=True)
        value.backward()
        return StepResult(float(value.detach()), float(len(crops)), self._where(crops))

    def value(self, model: nn.Module, image: Tensor, target: Tensor) -> Tensor:
        """The loss of crops [N, C, s, s] with classes int64 [N, s, s], a scalar."""
        dtype = getattr(torch, self.options.dtype)
        with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(image).float()
        return self.loss(logits, target)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _crops(self, step: int) -> list[Crop]:
        options = self.options
        return [
            draw_crop(
                self.sizes, options.crop, seed=options.seed, step=step, place=place, augment=options.augment
            )
            for place in self._places
        ]

    def _read(self, step: int) -> Future[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
        return self._reader.submit(self.batch, step)

    def batch(self, step: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Images [N, C, s, s] and classes [N, s, s] of this rank's crops of a step."""
        images, targets = read_crops(self.scenes, self._crops(step), self.options.crop)
        return self.shifted(images, step), targets

    def shifted(self, images: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        """Images with random gains and offsets, if the options ask for them."""
        strength = self.options.jitter
        if not strength:
            return images
        return shift_tones(images, strength, seed=self.options.seed, step=step, places=self._places)

    def _where(self, crops: Sequence[Crop]) -> str:
        return "; ".join(
            f"{self.scenes[crop.scene].pair.scene} row {crop.window.row_off} column {crop.window.col_off}"
            for crop in crops
        )
