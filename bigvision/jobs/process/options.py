"""What the user asked of `bigvision process`, checked before any work starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import dask.utils
import numpy as np

_CHOICES = {
    "output": ("classes", "probabilities", "logits"),
    "activation": ("auto", "none", "sigmoid", "softmax"),
    "format": ("cog", "zarr"),
    "engine": ("auto", "tiles", "stream"),
    "dtype": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
}


@dataclass(frozen=True)
class Options:
    """One command's wishes. Pixels x enter the network as (x / scale - mean) / std; missing ones as 0."""

    model: str
    weights: Path | None = None
    trust_model: bool = False
    bands: tuple[int, ...] | None = None
    stack: bool = False
    resolution: float | None = None
    aoi: Path | None = None
    unscale: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float = 1.0
    output: str = "classes"
    activation: str = "auto"
    threshold: float = 0.5
    format: str = "cog"
    engine: str = "auto"
    tile: int | None = None
    halo: int | None = None
    memory: str = "4GiB"
    scratch_limit: str = "40GiB"
    compile: bool = False
    dtype: str = "auto"
    min_agreement: float = 0.999
    device: str = "auto"
    workers: int | None = None
    scheduler: str | None = None
    overwrite: bool = False
    route: Path | None = None
    previous: Path | None = None
    tolerance: float = 0.0
    resample_previous: bool = False

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        for name, least in (("tile", 1), ("halo", 0), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        for name in ("scale", "mean", "std", "resolution", "tolerance"):
            given = getattr(self, name)
            if given is not None and not np.isfinite(given).all():
                raise ValueError(f"--{name} takes finite numbers, got {given}")
        if self.scale == 0 or (self.std is not None and 0 in self.std):
            raise ValueError(f"--scale and --std divide and can't be 0, got {self.scale} and {self.std}")
        for name in ("threshold", "min_agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is between 0 and 1, got {getattr(self, name)}")
        if self.resolution is not None and not self.resolution > 0:
            raise ValueError(f"--resolution must be positive, got {self.resolution}")
        if self.tolerance < 0:
            raise ValueError(f"--tolerance is a difference of at least 0, got {self.tolerance}")
        if self.previous is None and (self.tolerance or self.resample_previous):
            flag = "--tolerance" if self.tolerance else "--resample-previous"
            raise ValueError(f"{flag} is about an earlier result: give --previous RUN, too")
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("--workers starts a cluster here and --scheduler uses another: give one of them")
        parse_bytes(self.memory)
        parse_bytes(self.scratch_limit, "scratch-limit", least=0)

    @property
    def suffix(self) -> Literal[".tif", ".zarr"]:
        """Of the results' names."""
        return ".zarr" if self.format == "zarr" else ".tif"

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return parse_bytes(self.memory)

    @property
    def scratch_bytes(self) -> int:
        """`scratch_limit` in bytes."""
        return parse_bytes(self.scratch_limit, "scratch-limit", least=0)


def parse_bytes(text: str, flag: str = "memory", least: int = 1) -> int:
    """`4GiB`, `500 MB` or `1e9` in bytes; ValueError, naming the flag, where it is none or too small."""
    try:
        size = dask.utils.parse_bytes(text)
    except (ValueError, OverflowError):
        raise ValueError(f"--{flag} {text!r} is not a size such as 4GiB or 500MB") from None
    if size < least:
        raise ValueError(f"--{flag} must be {'positive' if least else 'at least 0'}, got {text!r}")
    return size
