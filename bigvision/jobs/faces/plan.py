"""What a run will take, worked out before anything large exists; a run that can't fit is refused here.

Legend: C classes, W ranks, D dimension, B global batch, b images that pass the backbone at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigvision.jobs.faces.options import TrainOptions
from bigvision.jobs.process.options import parse_bytes
from bigvision.models.embedding import build_backbone

RUNTIME = 350 << 20  # private bytes of the interpreter with torch, measured on Linux; libraries are shared
WORKER = 280 << 20  # of a process that decodes images


@dataclass(frozen=True)
class Plan:
    """Memory of one rank in bytes, and the machine's share for it."""

    classes: int
    head: int  # centres
    head_optimizer: int  # its moments and the norms of the rows
    head_work: int  # gathered features and tiles
    backbone: int  # parameters, gradients, momentum
    activations: int
    workers: int  # processes that decode
    on_disk: int  # centres that live in a file
    available: int
    ranks_here: int
    steps: int
    steps_per_epoch: int

    @property
    def total(self) -> int:
        """Bytes of one rank."""
        parts = (
            self.head,
            self.head_optimizer,
            self.head_work,
            self.backbone,
            self.activations,
            self.workers,
        )
        return sum(parts) + RUNTIME

    def check(self) -> None:
        """Raise ValueError, with what would help, where the ranks of this machine need more than there is."""
        needed = self.total * self.ranks_here
        if needed > self.available:
            raise ValueError(
                f"{self.ranks_here} ranks here need about {size_text(needed)} and "
                f"{size_text(self.available)} are "
                "available: lower --batch-size, raise --accumulate, use --storage bfloat16, "
                "--head-optimizer "
                f"adagrad or --place PATH, or more machines"
            )

    def lines(self) -> Iterator[str]:
        """The plan as text."""
        yield f"{self.classes:,} classes, {self.steps:,} steps, {self.steps_per_epoch:,} an epoch"
        yield f"memory of each of {self.ranks_here} ranks here, of {size_text(self.available)} for all:"
        rows = {
            "head: class centres": self.head,
            "head: optimiser, norms": self.head_optimizer,
            "head: gathered batch, tiles": self.head_work,
            "backbone, gradient, momentum": self.backbone,
            "activations": self.activations,
            "processes that decode": self.workers,
            "Python and torch": RUNTIME,
            "together": self.total,
        }
        for name, count in rows.items():
            yield f"  {name:30} {size_text(count):>10}"
        if self.on_disk:
            yield f"  {'centres in a file':30} {size_text(self.on_disk):>10}"


def make_plan(options: TrainOptions, classes: int, images: int, world_size: int, ranks_here: int) -> Plan:
    """Plan a run. Raises ValueError for fewer than two classes, or fewer classes than ranks."""
    if classes < 2:
        raise ValueError(f"a margin softmax needs at least two identities; the data has {classes}")
    if classes < world_size:
        raise ValueError(f"{classes} classes cannot be shared by {world_size} ranks")
    rows = -(-classes // world_size)
    row_bytes = rows * options.dim * {"float64": 8, "float32": 4, "bfloat16": 2}[options.storage]
    settings = options.head_optimizer_settings()
    moments = row_bytes * len(settings.wide)
    narrow = rows * 4 * (1 + len(settings.narrow))
    mapped = options.place not in ("device", "host")
    per_epoch = max(1, images // options.batch_size)
    part = -(-options.batch_size // world_size)
    backbone, activations = backbone_memory(options, -(-part // options.accumulate))
    tile = min(rows, 8192)
    return Plan(
        classes=classes,
        head=0 if mapped else row_bytes,
        head_optimizer=narrow if mapped else moments + narrow,
        head_work=4 * (6 * options.batch_size * options.dim + 3 * tile * (options.batch_size + options.dim)),
        backbone=backbone,
        activations=activations,
        workers=options.workers * WORKER,
        on_disk=row_bytes + moments if mapped else 0,
        available=available_memory(options),
        ranks_here=ranks_here,
        steps=max(1, round(options.epochs * per_epoch)),
        steps_per_epoch=per_epoch,
    )


def backbone_memory(options: TrainOptions, images: int) -> tuple[int, int]:
    """Bytes of parameters with gradient and momentum, and of what a forward pass keeps for the backward one.

    The network runs on fake tensors: their shapes are true, their memory is none.
    """
    dtype = getattr(torch, options.dtype)
    with FakeTensorMode(), kept_bytes() as kept:
        model = build_backbone(options.network())
        x = torch.empty(images, 3, options.image_size, options.image_size)
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        for parameter in model.parameters():
            kept[parameter.untyped_storage()._cdata] = 0  # counted already, and kept as views too
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = run_twice(model, x) if images == 1 else model(x)
        del y
    return 3 * parameters, sum(kept.values())


def run_twice(model: nn.Module, x: Tensor) -> Tensor:
    """Forward of one image as if it were two: batch norm refuses a single one."""
    y: Tensor = model(torch.cat([x, x]))
    return y


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Bytes of each tensor storage that autograd keeps while the block runs, by identity."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # an identity is only unique while its object lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage.nbytes())
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def available_memory(options: TrainOptions) -> int:
    """Bytes for all ranks of this machine: `--memory`, or what is free (of the GPU, of the container, of the
    machine).
    """
    if options.memory != "auto":
        return parse_bytes(options.memory)
    if options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available()):
        return sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return int(free)


def size_text(count: int) -> str:
    """Bytes as text."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count = -(-count // 1024) if unit != "MiB" else count
        if unit == "MiB":
            return f"{count / 1024:.2f} GiB"
    return f"{count} B"
