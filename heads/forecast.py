"""What a head takes, known before any of it exists, and what would take less.

Legend: C classes, W ranks, n = ceil(C / W) classes of a rank, D dimension.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from bigvision.hardware import free_memory
from bigvision.ranks import Ranks
from heads.optimizers import SGD, RowOptimizer, RowwiseAdagrad
from heads.shard import accumulation_dtype
from heads.stores import STORAGE

Changes = dict[str, Any]


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of one rank: on the device where the work is done, in host memory, and in files."""

    device: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class HeadPlan:
    """What the memory of a head depends on; see `ShardedMarginHead` for its arguments."""

    num_classes: int
    dim: int
    storage: str
    optimizer: RowOptimizer | None
    place: str | Path = "device"
    host_cache: int = 1 << 18
    ranks: int = 1

    @property
    def rows(self) -> int:
        """n, classes of a rank."""
        return -(-self.num_classes // self.ranks)

    @property
    def column(self) -> int:
        """Bytes of one column [n, D]."""
        return self.rows * self.dim * STORAGE[self.storage].itemsize

    @property
    def narrow(self) -> int:
        """Bytes of the columns [n]: lengths, the optimiser's, and when each row was last touched."""
        acc = accumulation_dtype(STORAGE[self.storage])
        kinds = [acc, *((kind or acc) for kind in (self.optimizer.narrow.values() if self.optimizer else ()))]
        if self.optimizer is not None and self.optimizer.dense:
            kinds.append(torch.int32)
        return self.rows * sum(kind.itemsize for kind in kinds)

    def memory(self) -> HeadMemory:
        """Centres, moments and narrow columns in their place; of a parameter its gradient too."""
        columns = 2 if self.optimizer is None else 1 + len(self.optimizer.wide)
        wide = columns * self.column
        if self.place == "device":
            return HeadMemory(self.narrow + wide)
        if self.place == "host":
            cached = min(self.host_cache, self.rows)
            return HeadMemory(self.narrow + wide * cached // max(self.rows, 1), wide + 8 * self.rows)
        return HeadMemory(self.narrow, 0, wide)


@dataclass(frozen=True)
class Neighbours:
    """How many ranks work on this rank's device, and how many on its machine."""

    device: int = 1
    machine: int = 1

    @classmethod
    def of(cls, ranks: Ranks, device: torch.device) -> Self:
        """Counted. Called on every rank together."""
        mine = (socket.gethostname(), str(device))
        all_ranks = ranks.gather(mine)
        machine = sum(host == mine[0] for host, _ in all_ranks)
        return cls(machine if device.type == "cpu" else all_ranks.count(mine), machine)


def check_memory(plan: HeadPlan, neighbours: Neighbours, device: torch.device) -> None:
    """Raises ValueError, with what would fit, where the machine or the device lacks the memory for its ranks.

    Linux hands out memory that it doesn't have, and ends a process later that uses it, without a word.
    """
    room = _Room(device, neighbours.device, neighbours.machine, free_memory(device), free_memory())
    if not room.fits(plan):
        raise ValueError(room.refusal(plan))


@dataclass(frozen=True)
class _Room:
    """Free bytes, and how many ranks share them."""

    device: torch.device
    ranks_device: int
    ranks_machine: int
    free_device: int
    free_machine: int

    def needs(self, plan: HeadPlan) -> tuple[int, int]:
        """Bytes of all ranks here: on the device, and in the machine's memory."""
        memory = plan.memory()
        if self.device.type == "cpu":
            return 0, (memory.device + memory.host) * self.ranks_machine
        return memory.device * self.ranks_device, memory.host * self.ranks_machine

    def fits(self, plan: HeadPlan) -> bool:
        device, machine = self.needs(plan)
        return device <= self.free_device and machine <= self.free_machine

    def refusal(self, plan: HeadPlan) -> str:
        device, machine = self.needs(plan)
        short = device > self.free_device
        needed, free = (device, self.free_device) if short else (machine, self.free_machine)
        count = self.ranks_device if short else self.ranks_machine
        where = str(self.device) if short else "memory"
        who = "the head" if count == 1 else f"the heads of {count} ranks here"
        fitting = [*self._lighter(plan), *self._ranks(plan, needed, free, count, short)]
        return (
            f"{who} would take {_gb(needed)} of {where} ({plan.num_classes:,} classes x {plan.dim} in "
            f"{plan.storage}{_state(plan.optimizer)}), and {_gb(free)} are free; what would fit: "
            + ("; ".join(fitting) or "nothing here")
        )

    def _lighter(self, plan: HeadPlan) -> Iterator[str]:
        """Settings that take less and fit here, with what they take."""
        bfloat16: Changes = {"storage": "bfloat16"}
        adagrad: Changes = {"optimizer": RowwiseAdagrad(0.1)}
        heavy = plan.optimizer is None or bool(plan.optimizer.wide)
        choices: dict[str, Changes] = {}
        if plan.storage != "bfloat16":
            choices['storage="bfloat16"'] = bfloat16
        if heavy:
            choices["optimizer=RowwiseAdagrad(lr)"] = adagrad
        if heavy and plan.storage != "bfloat16":
            choices['storage="bfloat16" and optimizer=RowwiseAdagrad(lr)'] = bfloat16 | adagrad
        # A parameter lives on the device: elsewhere the optimiser must be fused.
        fused: Changes = {"optimizer": SGD(0.1)} if plan.optimizer is None else {}
        also = "optimizer=SGD(lr) and " if fused else ""
        if self.device.type != "cpu":
            choices[f'{also}place="host"'] = fused | {"place": "host"}
        choices[f"{also}place=FOLDER"] = fused | {"place": "FOLDER"}
        for text, changes in choices.items():
            other = replace(plan, **changes)
            if not self.fits(other):
                continue
            disk = other.memory().disk * self.ranks_machine
            if disk:
                yield f"{text} on a disk with {_gb(disk)} free"
            else:
                yield f"{text} ({_gb(sum(self.needs(other)))})"

    def _ranks(self, plan: HeadPlan, needed: int, free: int, here: int, device: bool) -> Iterator[str]:
        """How many ranks, with as many on each of more devices or machines, if there can be so many."""
        times = -(-needed // max(free, 1))
        while plan.ranks * times <= plan.num_classes:
            if self.fits(replace(plan, ranks=plan.ranks * times)):
                each = "" if here == 1 else f" with {here} each"
                kind = "devices" if device else "machines"
                yield f"{plan.ranks * times} ranks on {times} times as many such {kind}{each}"
                return
            times += 1  # classes are whole


def _state(optimizer: RowOptimizer | None) -> str:
    if optimizer is None:
        return " and their gradient"
    return (
        " with " + " and ".join(name.replace("_", " ") for name in optimizer.wide) if optimizer.wide else ""
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
