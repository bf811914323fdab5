"""The order of training: which rank sees which images at which step, replayable from any step on any rank
count.

Step s of an epoch takes positions [s*G, (s+1)*G) of that epoch's shuffled order, G being the batch of all
ranks together; rank r of W takes its part of them. What is drawn at random for an image depends on (seed,
epoch, position), never on a rank or a worker. The position of a run is therefore one number.

Legend: b images of this rank, G global batch, S image size.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.face_images import DamagedRecordError, FaceSource, fit_square
from datasets.shuffling import Permutation
from datasets.streams import Use, stream

FEWEST = 2  # batch normalisation of one image has no variance
AUGMENTATIONS = ("none", "flip", "light")


@dataclass
class Batch:
    """One rank's part of a step. Labels of -1 fill one that would be too small."""

    images: Tensor  # uint8 [b, 3, S, S]
    labels: Tensor  # int64 [b]
    damaged: tuple[str, ...]  # records left out, with reasons
    kept: tuple[int, ...]  # which of the positions asked for are here

    def pin_memory(self) -> "Batch":
        """Page-locked memory, for copies to a GPU."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.damaged, self.kept)


class TrainingBatches(Dataset[Batch]):
    """Batches of one rank by global step: step s is in epoch s // steps_per_epoch; a last part of an epoch is
    dropped.

    Args:
        source: the images.
        batch_size: G, of all ranks together.
        rank, world: this rank and how many there are.
        seed: of the order and of the augmentation.
        size: S.
        augment: "none", "flip" (mirror half of the images) or "light" (also shift, scale, turn, brighten).
        fewest: images of a rank at least, filled up where too many are damaged: enough for every part of a
            batch that is passed in parts, as ranks with fewer parts than others would leave them waiting.

    Raises ValueError for an empty rank part, a batch larger than the source, or an unknown augmentation.
    """

    def __init__(
        self,
        source: FaceSource,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        size: int = 112,
        augment: str = "flip",
        fewest: int = FEWEST,
    ) -> None:
        if batch_size < fewest * world:
            raise ValueError(
                f"a batch of {batch_size} leaves fewer than {fewest} images for each of {world} ranks"
            )
        if batch_size > len(source):
            raise ValueError(f"a batch of {batch_size} is more than the {len(source)} images there are")
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augmentation {augment!r} is not one of {', '.join(AUGMENTATIONS)}")
        self.source, self.batch_size, self.seed, self.size, self.augment = (
            source,
            batch_size,
            seed,
            size,
            augment,
        )
        self.fewest = fewest
        self.part = slice(batch_size * rank // world, batch_size * (rank + 1) // world)
        self.steps_per_epoch = len(source) // batch_size

    def __getitem__(self, step: int) -> Batch:
        """This rank's part of a global step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        positions = np.arange(place * self.batch_size, (place + 1) * self.batch_size)[self.part]
        order = Permutation(len(self.source), self.seed, epoch)(positions)
        streams = [stream(Use.FACE_AUGMENTATION, self.seed, epoch, int(p)) for p in positions]
        return read_batch(self.source, order, self.size, self.augment, streams, self.fewest)


def read_batch(
    source: FaceSource,
    positions: np.ndarray,
    size: int,
    augment: str = "none",
    streams: list[np.random.Generator] | None = None,
    fewest: int = 0,
) -> Batch:
    """Read positions of a source into a batch of at least `fewest`, damaged records left out and named."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    damaged: list[str] = []
    kept: list[int] = []
    for number, position in enumerate(positions):
        try:
            image, label = source.read(int(position))
        except DamagedRecordError as error:
            damaged.append(str(error))
            continue
        image = fit_square(image, size)
        if streams is not None:
            image = augmented(image, augment, streams[number])
        images.append(image)
        labels.append(label)
        kept.append(number)
    while len(images) < fewest:
        images.append(np.full((size, size, 3), 127, np.uint8))
        labels.append(-1)
    stacked = np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)
    pixels = torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))
    return Batch(pixels, torch.tensor(labels, dtype=torch.int64), tuple(damaged), tuple(kept))


def augmented(image: np.ndarray, kind: str, random: np.random.Generator) -> np.ndarray:
    """Vary an image uint8 [S, S, 3] as `TrainingBatches` describes."""
    if kind == "none":
        return image
    if random.random() < 0.5:
        image = image[:, ::-1]
    return image if kind == "flip" else _jittered(image, random)


def _jittered(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Shift by up to 8 %, scale by up to 12 %, turn by up to 12 degrees, change brightness and contrast by up
    to 25 %.
    """
    size = image.shape[0]
    angle, scale = np.deg2rad(random.uniform(-12, 12)), random.uniform(0.88, 1.12)
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    centre = np.full(2, size / 2)
    shift = centre - linear @ centre + random.uniform(-0.08, 0.08, 2) * size
    # Outside the image lies its edge: a constant there would tell the network how far it was shifted.
    border = size // 4
    padded = Image.fromarray(np.pad(image, ((border, border), (border, border), (0, 0)), mode="edge"))
    shift = shift + border
    coefficients = (*linear[0], shift[0], *linear[1], shift[1])
    moved = padded.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    gain, offset = random.uniform(0.75, 1.25), random.uniform(-32, 32)
    bright = (np.asarray(moved, np.float32) - 127.5) * gain + 127.5 + offset
    pixels: np.ndarray = np.clip(bright, 0, 255).astype(np.uint8)
    return pixels


def training_loader(
    batches: TrainingBatches, start: int, stop: int, *, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Batches of the steps start <= s < stop in order, decoded by `workers` processes."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_serve if workers else None,
    )


def _serve(worker: int) -> None:
    """A process that decodes ends with the one it works for, not by itself when both are told to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _Chunks(Dataset[Batch]):
    def __init__(self, source: FaceSource, positions: np.ndarray, batch_size: int, size: int) -> None:
        self.source, self.size = source, size
        self.chunks = [
            positions[start : start + batch_size] for start in range(0, len(positions), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Batch:
        return read_batch(self.source, self.chunks[index], self.size)


def evaluation_batches(
    source: FaceSource, *, batch_size: int, size: int, workers: int = 0, positions: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The source in order, or the given positions: (positions of the batch, batch). Damaged images are left
    out,

    so a batch with some holds fewer images than positions; its `damaged` names them.
    """
    chosen = np.arange(len(source)) if positions is None else np.asarray(positions)
    chunks = _Chunks(source, chosen, batch_size, size)
    loader: DataLoader[Batch] = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    yield from zip(chunks.chunks, loader, strict=True)


def normalized(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [b, 3, S, S] to [-1, 1]: (x - 127.5) / 127.5, as the public face networks expect."""
    return (images.to(dtype) - 127.5) / 127.5
