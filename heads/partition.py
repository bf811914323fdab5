"""Which rank holds which classes: consecutive ranges, laid out as `torch.chunk` and DTensor's Shard(0) do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassRange:
    """Classes [start, stop) of `num_classes`, held by one rank of `size`. The last may hold none."""

    start: int
    stop: int
    num_classes: int
    rank: int
    size: int

    def __len__(self) -> int:
        return self.stop - self.start


def class_range(num_classes: int, rank: int, size: int) -> ClassRange:
    """The classes of `rank`. Raises ValueError where there are more ranks than classes."""
    if num_classes < 1:
        raise ValueError(f"a head needs at least one class, got {num_classes}")
    if size > num_classes:
        raise ValueError(f"{size} ranks can't share {num_classes} classes: use at most one rank a class")
    chunk = -(-num_classes // size)
    start = min(rank * chunk, num_classes)
    return ClassRange(start, min(start + chunk, num_classes), num_classes, rank, size)
