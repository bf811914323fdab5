"""Which input, model and options a result comes from: its fingerprint, and the tags that tell a reader."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rasterio
import torch
from rasterio.errors import RasterioError

import bigvision
from bigvision.jobs.process.network import Network
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.routed import route_identity
from bigvision.models.spec import source_of

TAG = "BIGVISION_FINGERPRINT"
# What changes neither the pixels nor where they are cut into tiles for good.
_INDIFFERENT = (
    *("workers", "scheduler", "overwrite", "trust_model", "weights", "model", "aoi"),
    *("route", "previous", "tolerance", "resample_previous"),
)
_EDGE = 2**20  # bytes at either end of a file that are hashed besides its size and time


@dataclass(frozen=True)
class Provenance:
    """Hashes of everything that a result follows from; `record` is what they stand for."""

    record: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """One hash of all."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    @property
    def reused(self) -> str:
        """By which rule parts are those of an earlier result; empty where every pixel is as computed."""
        return str(self.record.get("reused", [""])[0])

    def reusing(self, rule: str, source: str) -> "Provenance":
        """Of a result that takes parts by this rule from the result whose fingerprint is `source`."""
        return Provenance(self.record | {"reused": [rule, source]})

    def tags(self, **more: str) -> dict[str, str]:
        """For the result's metadata; `more` as BIGVISION_<NAME>."""
        about = {
            TAG: self.fingerprint,
            "BIGVISION_VERSION": self.record["bigvision"],
            "BIGVISION_MODEL": self.record["model"],
            "BIGVISION_MODEL_SHA256": self.record["state"],
            "BIGVISION_OPTIONS": json.dumps(self.record["options"]),
            "BIGVISION_INPUT": json.dumps([name for name, *_ in self.record["input"]]),
        }
        if self.reused:
            about["BIGVISION_REUSED"] = self.reused
        return about | {f"BIGVISION_{name.upper()}": value for name, value in more.items()}


def provenance(paths: Sequence[str], options: Options, network: Network) -> Provenance:
    """Of a result made from `paths` by `network` with `options`."""
    chosen = {key: value for key, value in asdict(options).items() if key not in _INDIFFERENT}
    source = source_of(options.model)
    return Provenance(
        {
            "bigvision": bigvision.__version__,
            "torch": torch.__version__,
            "model": options.model,
            "architecture": network.architecture,
            "source": _file_hash(source) if source else "",
            "state": network.state,
            "options": chosen | {"aoi": _file_hash(options.aoi) if options.aoi else None},
            "route": route_identity(options.route),
            "input": [entry for path in paths for entry in _identity(path)],
        }
    )


def _identity(path: str) -> list[tuple[str, int, int, str]]:
    """Name, bytes, time in ns and a hash of both ends of every file behind a raster (a VRT's sources too)."""
    place = Path(path)
    if place.is_dir():
        files: Iterable[Path] = sorted(file for file in place.rglob("*") if file.is_file())
        stats = [(str(file.relative_to(place)), file.stat()) for file in files]
        digest = hashlib.sha256(repr([(n, s.st_size, s.st_mtime_ns) for n, s in stats]).encode())
        return [(str(place.absolute()), sum(s.st_size for _, s in stats), len(stats), digest.hexdigest())]
    if not place.exists():
        return [(path, 0, 0, "")]  # a URL: its name is all that is known without fetching it
    try:
        with rasterio.open(path) as dataset:
            behind = sorted({place, *(Path(name) for name in dataset.files)})
    except RasterioError:
        behind = [place]
    return [_file_identity(file) for file in behind if file.is_file()]


def _file_identity(file: Path) -> tuple[str, int, int, str]:
    about = file.stat()
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(_EDGE))
        if about.st_size > _EDGE:
            stream.seek(max(_EDGE, about.st_size - _EDGE))
            digest.update(stream.read(_EDGE))
    return str(file.absolute()), about.st_size, about.st_mtime_ns, digest.hexdigest()


def _file_hash(file: Path | os.PathLike[str]) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
