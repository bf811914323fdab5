"""What a run will take, worked out before anything large exists; a run that can't fit is refused here.

Legend: C classes, W ranks, D dimension, B global batch, b images that pass the backbone at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigvision.hardware import free_memory
from bigvision.jobs.faces.options import TrainOptions
from bigvision.jobs.process.options import parse_bytes
from bigvision.models.embedding import build_backbone
from heads.forecast import HeadPlan

RUNTIME = 350 << 20  # private bytes of the interpreter with torch, measured on Linux; libraries are shared
WORKER = 280 << 20  # of a process that decodes images


@dataclass(frozen=True)
class Plan:
    """Memory of one rank in bytes, by what it is for, and the machine's for all of them."""

    classes: int
    head: int  # centres, where the work is done
    head_optimizer: int  # its moments and the norms of the rows
    head_work: int  # gathered features and tiles
    backbone: int  # parameters, gradients, momentum
    activations: int
    host: int  # centres and moments that live in host memory
    workers: int  # processes that decode
    listing: int  # the list of images, once for all processes of a machine
    on_disk: int  # centres that live in a file
    gpu: bool  # whether the work is done on one, with memory of its own
    available: int  # where the work is done
    available_host: int
    ranks_here: int
    steps: int
    steps_per_epoch: int

    @property
    def on_device(self) -> int:
        """Bytes of one rank where the work is done."""
        return self.head + self.head_optimizer + self.head_work + self.backbone + self.activations

    @property
    def on_host(self) -> int:
        """Bytes of one rank that are host memory whatever the device is."""
        return self.host + self.workers + RUNTIME

    @property
    def total(self) -> int:
        """Bytes of one rank."""
        return self.on_device + self.on_host

    def check(self) -> None:
        """Raise ValueError, with what would help, where the ranks of this machine need more than there is."""
        if not self.gpu:
            self._check("", self.total, self.available, "--place PATH", self.listing)
            return
        place = "--place PATH" if self.host else "--place host, --place PATH"
        self._check(" of the GPU's memory", self.on_device, self.available, place)
        self._check(
            " of host memory",
            self.on_host,
            self.available_host,
            "--workers below that, --place PATH",
            self.listing,
        )

    def _check(self, what: str, each: int, available: int, place: str, shared: int = 0) -> None:
        needed = each * self.ranks_here + shared
        if needed > available:
            raise ValueError(
                f"{self.ranks_here} ranks here need about {size_text(needed)}{what} and "
                f"{size_text(available)} are available: lower --batch-size, raise --accumulate, use "
                f"--storage bfloat16, --head-optimizer adagrad or {place}, or more machines"
            )

    def lines(self) -> Iterator[str]:
        """The plan as text."""
        yield f"{self.classes:,} classes, {self.steps:,} steps, {self.steps_per_epoch:,} an epoch"
        device = {
            "head: class centres": self.head,
            "head: optimiser, norms": self.head_optimizer,
            "head: gathered batch, tiles": self.head_work,
            "backbone, gradient, momentum": self.backbone,
            "activations": self.activations,
        }
        host = {"head: centres on the host": self.host} if self.host else {}
        host |= {"processes that decode": self.workers, "Python and torch": RUNTIME}
        if self.gpu:
            yield from self._table("GPU memory", device, self.on_device, self.available)
            yield from self._table("host memory", host, self.on_host, self.available_host)
        else:
            yield from self._table("memory", device | host, self.total, self.available)
        yield f"  {'list of images, shared':30} {size_text(self.listing):>10}"
        if self.on_disk:
            yield f"  {'centres in a file':30} {size_text(self.on_disk):>10}"

    def _table(self, title: str, rows: dict[str, int], together: int, available: int) -> Iterator[str]:
        yield f"{title} of each of {self.ranks_here} ranks here, of {size_text(available)} for all:"
        for name, count in (rows | {"together": together}).items():
            yield f"  {name:30} {size_text(count):>10}"


def make_plan(
    options: TrainOptions,
    classes: int,
    images: int,
    world_size: int,
    ranks_here: int,
    listing: tuple[int, int] = (0, 0),
) -> Plan:
    """Plan a run over a set whose list of images takes `listing` bytes: shared, and of each process.

    Raises ValueError for fewer than two classes, or fewer classes than ranks.
    """
    if classes < 2:
        raise ValueError(f"a margin softmax needs at least two identities; the data has {classes}")
    if classes < world_size:
        raise ValueError(f"{classes} classes cannot be shared by {world_size} ranks")
    head = HeadPlan(
        classes,
        options.dim,
        options.storage,
        options.head_optimizer_settings(),
        options.place,
        ranks=world_size,
    )
    memory = head.memory()
    centres = head.column if options.place == "device" else 0
    per_epoch = max(1, images // options.batch_size)
    part = -(-options.batch_size // world_size)
    backbone, activations = backbone_memory(options, -(-part // options.accumulate))
    tile = min(head.rows, 8192)
    return Plan(
        classes=classes,
        head=centres,
        head_optimizer=memory.device - centres,
        head_work=4 * (6 * options.batch_size * options.dim + 3 * tile * (options.batch_size + options.dim)),
        backbone=backbone,
        activations=activations,
        host=memory.host,
        workers=options.workers * WORKER,
        listing=listing[0] + ranks_here * (1 + options.workers) * listing[1],
        on_disk=memory.disk,
        gpu=on_gpu(options),
        available=available_memory(options),
        available_host=free_memory(),
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


def on_gpu(options: TrainOptions) -> bool:
    """Whether `--device` means a GPU here."""
    return options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())


def available_memory(options: TrainOptions) -> int:
    """Bytes for all ranks of this machine where the work is done: `--memory`, or what is free (of the GPUs,
    of the container, of the machine).
    """
    if options.memory != "auto":
        return parse_bytes(options.memory)
    if on_gpu(options):
        return sum(free_memory(f"cuda:{number}") for number in range(torch.cuda.device_count()))
    return free_memory()


def size_text(count: int) -> str:
    """Bytes as text."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count = -(-count // 1024) if unit != "MiB" else count
        if unit == "MiB":
            return f"{count / 1024:.2f} GiB"
    return f"{count} B"
