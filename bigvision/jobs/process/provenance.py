"""Which input, model and options a result comes from: its fingerprint, and the tags that tell a reader.

What decides the pixels is in the fingerprint; how they are cut (memory, workers, tiles, scratch) is not.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bigvision
from bigvision.jobs.process.geometry import analyse, graph_of
from bigvision.jobs.process.network import Network
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.routed import route_identity
from bigvision.models.identity import network_identity
from tiling.addresses import without_secrets
from tiling.identity import Identity, file_hash, identity

TAG = "BIGVISION_FINGERPRINT"
_ELSEWHERE = ("model", "weights", "aoi", "route", "previous", "tolerance", "resample_previous")
_WITHOUT_EFFECT = ("trust_model", "overwrite")
_CUT = ("memory", "scratch_limit", "min_agreement", "workers", "scheduler", "engine", "tile")


@dataclass(frozen=True)
class Provenance:
    """Hashes of everything that a result follows from; `record` is what they stand for."""

    record: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """One hash of all."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    @property
    def unknown(self) -> tuple[str, ...]:
        """Why the input may change unseen: such a result is never taken for another's, nor gone on with."""
        return tuple(self.record["unknown"])

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
            "BIGVISION_MODEL": self.record["network"]["model"],
            "BIGVISION_MODEL_SHA256": self.record["network"]["state"],
            "BIGVISION_OPTIONS": json.dumps(self.record["options"]),
            "BIGVISION_INPUT": json.dumps(self.record["scene"]),
        }
        if self.reused:
            about["BIGVISION_REUSED"] = self.reused
        return about | {f"BIGVISION_{name.upper()}": value for name, value in more.items()}

    def changed(self, paths: Sequence[str]) -> str:
        """The first file of the input that is no longer what it was; empty where all are."""
        was, now = self.record["input"], json.loads(json.dumps(input_identity(paths).files))
        return next((str(old[0]) for old in [*was, *now] if (old in was) != (old in now)), "")


def provenance(
    paths: Sequence[str], options: Options, network: Network, shape: tuple[int, int, int]
) -> Provenance:
    """Of a result made from `paths`, a scene of `shape` [C, H, W], by `network` with `options`.

    Raises:
        ValueError: what `analyse` raises of the network.
    """
    cut = _CUT if options.halo is None else tuple(name for name in _CUT if name != "tile")
    chosen = {
        key: _plain(value)
        for key, value in asdict(options).items()
        if key not in (*_ELSEWHERE, *_WITHOUT_EFFECT, *cut)
    }
    seen = input_identity(paths)
    record = {
        "bigvision": bigvision.__version__,
        "network": network_identity(options.model, network.module, network.state, network.architecture),
        "graph": _graph(network, options, shape),
        "options": chosen | {"aoi": file_hash(options.aoi) if options.aoi else None},
        "route": route_identity(options.route, options, shape[0]),
        "scene": [shown_address(path) for path in paths],
        "input": seen.files,
        "unknown": seen.unknown,
    }
    if seen.unknown:
        record["once"] = uuid.uuid4().hex
    return Provenance(json.loads(json.dumps(record)))


def _graph(network: Network, options: Options, shape: tuple[int, int, int]) -> str:
    """Of a scene that is cut, the graph is at hand that the cut is planned with."""
    if options.route is not None:
        return graph_of(network.module, shape[0])
    return analyse(network.module, shape).graph


def input_identity(paths: Sequence[str]) -> Identity:
    """Of all files of a scene."""
    found = [identity(path) for path in paths]
    return Identity(
        tuple(entry for one in found for entry in one.files),
        tuple(why for one in found for why in one.unknown),
    )


def shown_address(path: str) -> str:
    """A scene's address for whoever reads or opens it later."""
    return str(Path(path).absolute()) if os.path.lexists(path) else without_secrets(path)


def _plain(value: Any) -> Any:
    return without_secrets(str(value)) if isinstance(value, str | Path) else value
