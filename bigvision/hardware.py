"""What the machine at hand has: instructions, and memory that is free."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether products of bfloat16 run on instructions of their own.

    Elsewhere they are emulated: on a processor with AVX2 alone a bfloat16 GEMM was measured at 4 to 30 times
    the float32 one's time, a bfloat16 convolution at 10 times.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that are free on a GPU; or on the machine, or in this process's container where that is less.

    Pages of files that the kernel keeps only for later count as free.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_container_room(Path("/sys/fs/cgroup"))])


def _container_room(root: Path) -> Iterator[int]:
    """What is left under each memory limit of this process: of its control groups, version 2 or 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, place = line.split(":", 2)
        if kinds == "":
            yield from _room(root, place, "memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _room(root / "memory", place, *names)


def _room(root: Path, place: str, limit: str, used: str, cached: str) -> Iterator[int]:
    """Limits hold for all below them; in a container's own view its group is the root."""
    parts = [part for part in place.split("/") if part and part != ".."]
    for depth in range(len(parts) + 1):
        folder = root.joinpath(*parts[:depth])
        try:
            text = (folder / limit).read_text().strip()
            if text == "max":
                continue
            statistics = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            held = int((folder / used).read_text()) - int(statistics.get(cached, 0))
        except (OSError, ValueError):
            continue
        yield max(int(text) - held, 0)
