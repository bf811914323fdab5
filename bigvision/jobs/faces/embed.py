"""Images to unit embeddings, as evaluation, galleries and identification want them.

Legend: N images, D dimension of the embedding.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from bigvision.jobs.faces.agreement import World
from datasets.face_batches import evaluation_batches, normalized
from datasets.face_images import FaceSource


@dataclass(frozen=True)
class Embedded:
    """Embeddings of the images that could be read, in the source's order."""

    positions: np.ndarray  # int64 [N], places in the source
    embeddings: np.ndarray  # float32 [N, D], unit length
    labels: np.ndarray  # int64 [N]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Embedder:
    """A backbone with the way to use it.

    `flip` adds the embedding of the mirrored image before normalising, as the public face benchmarks do.
    """

    model: nn.Module
    image_size: int = 112
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    flip: bool = True
    batch_size: int = 64
    workers: int = 0

    @torch.no_grad()
    def images(self, pixels: torch.Tensor) -> np.ndarray:
        """Unit embeddings float32 [b, D] of uint8 [b, 3, S, S]."""
        x = normalized(pixels.to(self.device))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            y = self.model(x).float()
            if self.flip:
                y = y + self.model(x.flip(3)).float()
        found: np.ndarray = normalize(y).cpu().numpy()
        return found

    def source(self, source: FaceSource, positions: np.ndarray | None = None) -> Embedded:
        """Embed a source, or some of its positions; the model is in eval mode meanwhile."""
        training = self.model.training
        self.model.eval()
        try:
            return self._embed(source, np.arange(len(source)) if positions is None else positions)
        finally:
            self.model.train(training)

    def _embed(self, source: FaceSource, positions: np.ndarray) -> Embedded:
        kept: list[np.ndarray] = []
        embeddings: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        damaged: list[str] = []
        for places, batch in evaluation_batches(
            source,
            batch_size=self.batch_size,
            size=self.image_size,
            workers=self.workers,
            positions=positions,
        ):
            damaged += batch.damaged
            if len(batch.labels):
                kept.append(places[list(batch.kept)])
                embeddings.append(self.images(batch.images))
                labels.append(batch.labels.numpy())
        if not embeddings:
            return Embedded(np.empty(0, int), np.empty((0, 0), np.float32), np.empty(0, int), tuple(damaged))
        parts = np.concatenate(kept), np.concatenate(embeddings), np.concatenate(labels)
        return Embedded(*parts, tuple(damaged))


def embed_together(embedder: Embedder, source: FaceSource, world: World) -> Embedded:
    """Embed a source with every rank taking an even part; all ranks get the whole."""
    positions = np.array_split(np.arange(len(source)), world.size)[world.rank]
    with world.together("embedding images"):
        mine = embedder.source(source, positions)
    parts = world.gather(mine)
    filled = [part for part in parts if len(part.positions)]
    damaged = tuple(name for part in parts for name in part.damaged)
    if not filled:
        return Embedded(np.empty(0, int), np.empty((0, 0), np.float32), np.empty(0, int), damaged)
    return Embedded(
        np.concatenate([part.positions for part in filled]),
        np.concatenate([part.embeddings for part in filled]),
        np.concatenate([part.labels for part in filled]),
        damaged,
    )
