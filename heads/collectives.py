"""What the ranks tell each other: ragged batches, sums, and errors that everybody raises.

Shapes: b samples of one rank, B samples of all ranks, D dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_OK, _WIDTH, _LABEL, _NOT_FINITE, _PAIRING, _LABEL_TYPE = range(6)


@dataclass(frozen=True)
class Ranks:
    """This process in the default process group, or a lone one where none is initialised."""

    rank: int
    size: int

    @staticmethod
    def current() -> "Ranks":
        """As torch.distributed says."""
        if dist.is_available() and dist.is_initialized():
            return Ranks(dist.get_rank(), dist.get_world_size())
        return Ranks(0, 1)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.SUM)
        return x

    def max_(self, x: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks (equal shapes), in the order of the ranks."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def agree(self, name: str, x: Tensor) -> None:
        """Raises ValueError on every rank unless all ranks hold the same small int64 tensor."""
        parts = self.gather(x)
        if any(not torch.equal(part, parts[0]) for part in parts):
            values = ", ".join(f"rank {r}: {part.tolist()}" for r, part in enumerate(parts))
            raise ValueError(f"{name} must be the same on every rank, got {values}")

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def together(ranks: Ranks, what: str) -> Iterator[None]:
    """Runs the block on every rank; an error on any of them is a ValueError on all, naming the first."""
    failure = ""
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it
        text = f"{type(error).__name__}: {error}"
        failure = str(error) if isinstance(error, ValueError) else f"rank {ranks.rank}: {text}"
    failures: list[Any] = [failure]
    if ranks.size > 1:
        failures = [None] * ranks.size
        dist.all_gather_object(failures, failure)
    if any(failures):
        raise ValueError(f"{what}: {next(f for f in failures if f)}")


@dataclass(frozen=True)
class GatheredBatch:
    """The samples of all ranks, in rank order: features [B, D], labels int64 [B], and which of them are this
    rank's.
    """

    features: Tensor
    labels: Tensor
    mine: slice


def gather_batch(ranks: Ranks, features: Tensor, labels: Tensor, dim: int, num_classes: int) -> GatheredBatch:
    """Gathers ragged batches. Bad input on any rank raises the same ValueError on every rank, before any
    work.

    features: [b, dim] floating; labels: int64 [b] in [-1, num_classes). b may differ between ranks and may
    be 0.
    """
    header = _inspect(features, labels, dim, num_classes)
    headers = torch.stack(ranks.gather(header)).tolist()
    for rank, (code, value, position, _) in enumerate(headers):
        if code != _OK:
            raise ValueError(_message(rank, code, value, position, dim, num_classes))
    counts = [int(row[3]) for row in headers]
    start = sum(counts[: ranks.rank])
    mine = slice(start, start + counts[ranks.rank])
    if ranks.size == 1:
        return GatheredBatch(features, labels, mine)
    longest = max(counts)
    padded_features = features.new_zeros(longest, dim)
    padded_features[: len(features)] = features
    padded_labels = labels.new_full((longest,), -1)
    padded_labels[: len(labels)] = labels
    parts = zip(ranks.gather(padded_features), ranks.gather(padded_labels), counts, strict=True)
    trimmed = [(f[:n], y[:n]) for f, y, n in parts]
    return GatheredBatch(torch.cat([f for f, _ in trimmed]), torch.cat([y for _, y in trimmed]), mine)


def _inspect(features: Tensor, labels: Tensor, dim: int, num_classes: int) -> Tensor:
    """(code, offending value, its position, batch size) of this rank's input."""

    def header(code: int, value: int = 0, position: int = 0) -> Tensor:
        return torch.tensor([code, value, position, len(features)], dtype=torch.int64, device=features.device)

    if features.ndim != 2 or features.shape[1] != dim or not features.is_floating_point():
        return header(_WIDTH, features.shape[-1] if features.ndim else 0, features.ndim)
    if labels.dtype != torch.int64:
        return header(_LABEL_TYPE)
    if labels.shape != (len(features),):
        return header(_PAIRING, labels.numel())
    wrong = (labels < -1) | (labels >= num_classes)
    if wrong.any():
        position = int(wrong.nonzero()[0])
        return header(_LABEL, int(labels[position]), position)
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        return header(_NOT_FINITE, 0, int((~finite).nonzero()[0]))
    return header(_OK)


def _message(rank: int, code: int, value: int, position: int, dim: int, num_classes: int) -> str:
    return (
        f"rank {rank}: "
        + {
            _WIDTH: f"features must be floating [b, {dim}], got {position} dimension(s), the last of {value}",
            _LABEL_TYPE: "labels must be int64",
            _PAIRING: f"labels must be one a sample, got {value}",
            _LABEL: f"label {value} (sample {position}) is outside [-1, {num_classes})",
            _NOT_FINITE: f"the features of sample {position} are not finite",
        }[code]
    )
