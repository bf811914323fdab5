"""One training step: backbone in parts, head once, backbone backwards, update.

The head is given all features of a step at once, however many parts the backbone needed: its cost does not
depend on the parts, and its update is that of the whole batch. With more than one part the features are
first computed without a graph, and each part runs again for its gradient (Gao et al. 2021, "Scaling deep
contrastive learning batch size under memory limited setup"). The head works on float32 features outside of
mixed precision, and its update never sees the loss scale: only the gradient that enters the backbone is
scaled.

Legend: b images of this rank, D dimension.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bigvision.gating import counter_key
from bigvision.jobs.faces.agreement import World
from datasets.face_batches import Batch, normalized


class DivergedError(Exception):
    """The loss or the features are no longer finite."""


@dataclass(frozen=True)
class Stepped:
    """What a step reports."""

    loss: float
    gradient_norm: float  # of the backbone, before clipping, of all ranks' mean
    skipped: bool  # float16: the gradient overflowed, the backbone stood still
    damaged: tuple[str, ...]  # records this rank left out
    read: int  # images this rank was to have, damaged ones included
    stop: bool  # a rank was told to stop after this step


@dataclass
class Stepper:
    """The pieces of a step."""

    backbone: nn.Module  # maybe wrapped in DistributedDataParallel
    head: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    accumulate: int
    clip: float
    scaler: torch.amp.GradScaler
    world: World
    stopping: Callable[[], bool]

    def __call__(self, batches: Iterator[Batch], seed: int) -> Stepped:
        """Train on the next batch. `seed` fixes what is drawn in the backbone (dropout).

        Raises, on all ranks together: `FaceJobError` where a rank has no batch or its features are not
        finite, `DivergedError` where the loss is not, both before anything moves; ValueError from the head
        for labels.
        """
        failure: Exception | None = None
        try:
            batch = next(batches)
            parts = min(self.accumulate, max(1, len(batch.labels) // 2))
            images = [part.to(self.device, non_blocking=True) for part in batch.images.tensor_split(parts)]
            outputs = self._features(images, seed)
            features = torch.cat(outputs).detach().float().requires_grad_()
            if not features.isfinite().all():
                raise DivergedError("the features of the backbone are not finite")
        except Exception as error:
            failure = error
        stop = self.world.agree(failure, "reading and embedding a batch", stop=self.stopping())
        labels = batch.labels
        loss = self.head(features, labels.to(self.device))
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise DivergedError(f"the loss is {value}")
        loss.backward()
        assert features.grad is not None
        self._backward(images, outputs, features.grad, seed)
        return self._update(value, batch, stop)

    def _features(self, images: list[Tensor], seed: int) -> list[Tensor]:
        if len(images) == 1:
            return [self._forward(images[0], counter_key(seed, 0))]
        with torch.no_grad(), still_statistics(self.backbone):
            return [self._forward(part, counter_key(seed, number)) for number, part in enumerate(images)]

    def _forward(self, pixels: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        x = normalized(pixels).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            y: Tensor = self.backbone(x)
        return y

    def _backward(self, images: list[Tensor], outputs: list[Tensor], gradient: Tensor, seed: int) -> None:
        gradients = gradient.split([len(part) for part in outputs])
        for number, (part, wanted) in enumerate(zip(images, gradients, strict=True)):
            last = number == len(images) - 1
            with nullcontext() if last else self._no_sync():
                y = outputs[0] if len(images) == 1 else self._forward(part, counter_key(seed, number))
                y.backward(self.scaler.scale(wanted).to(y.dtype))

    def _no_sync(self) -> AbstractContextManager[None]:
        return (
            self.backbone.no_sync() if isinstance(self.backbone, DistributedDataParallel) else nullcontext()
        )

    def _update(self, loss: float, batch: Batch, stop: bool) -> Stepped:
        self.scaler.unscale_(self.optimizer)
        limit = self.clip or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.backbone.parameters(), limit))
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        finite = norm - norm == 0.0
        if not finite and not self.scaler.is_enabled():
            raise DivergedError(f"the backbone's gradient has the norm {norm}")
        skipped, read = self.scaler.get_scale() < before, len(batch.kept) + len(batch.damaged)
        return Stepped(loss, norm, skipped, batch.damaged, read, stop)


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms that normalise by their batch but leave their running statistics alone."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [module.momentum for module in norms]
    counts = [
        None if module.num_batches_tracked is None else module.num_batches_tracked.clone() for module in norms
    ]
    for module in norms:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum, count in zip(norms, momenta, counts, strict=True):
            module.momentum = momentum
            if count is not None and module.num_batches_tracked is not None:
                module.num_batches_tracked.copy_(count)
