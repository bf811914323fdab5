"""ROUTE.toml: how a scene is routed, read and checked before any work.

region = 512            # pixels: a multiple of both networks' strides
gate = "entropy"        # entropy, margin or learned
budget = 0.25           # at most this share of the regions with data in full
threshold = 0.05        # optional: regions of a lower score stay cheap within the budget, too

[cheap]
model = "bigvision.models.small_unet:small_unet?in_channels=4&classes=8"
weights = "cheap.safetensors"   # optional; paths count from the file's own folder

[learned]               # for gate = "learned", once it is trained
weights = "gate.safetensors"
"""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GATES = ("entropy", "margin", "learned")
_KEYS = {"region", "gate", "budget", "threshold", "cheap", "learned"}


@dataclass(frozen=True)
class RouteSpec:
    """What a route is; see the module. `model` is the cheap network's, as `bigvision process --model` has it.

    Raises:
        ValueError: a value outside of its range, a gate that isn't known or lacks its weights.
    """

    model: str
    weights: Path | None = None
    region: int = 512
    gate: str = "entropy"
    budget: float = 0.25
    threshold: float | None = None
    gate_weights: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"[cheap] model must name a network, got {self.model!r}")
        if isinstance(self.region, bool) or not isinstance(self.region, int) or self.region < 1:
            raise ValueError(f"region must be a positive whole number of pixels, got {self.region!r}")
        if self.gate not in GATES:
            raise ValueError(f"gate {self.gate!r} is none of {', '.join(GATES)}")
        for name in ("budget", "threshold"):
            value = getattr(self, name)
            if name == "threshold" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, got {value!r}")
        if self.gate != "learned" and self.gate_weights is not None:
            raise ValueError(
                f"gate {self.gate!r} and [learned] weights {self.gate_weights} don't go together: "
                "only a learned gate has weights"
            )

    def trained_gate(self) -> Path:
        """The file of a learned gate; ValueError where it has none yet."""
        if self.gate_weights is None:
            raise ValueError(
                f"gate {self.gate!r} needs [learned] weights: `bigvision train --route` makes them"
            )
        return self.gate_weights


def load_route(path: Path) -> RouteSpec:
    """Read a ROUTE.toml that is ready to route by.

    Raises:
        ValueError: as :func:`read_route`, and for a learned gate without its weights.
    """
    spec = read_route(path)
    if spec.gate == "learned":
        try:
            spec.trained_gate()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return spec


def read_route(path: Path) -> RouteSpec:
    """Read a ROUTE.toml, whose learned gate may still have to be trained.

    Raises:
        ValueError: naming the file and the value: no such file, not TOML, unknown or missing keys, values out
            of range, weights that aren't there.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    try:
        return _spec(found, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_route(spec: RouteSpec, path: Path, *, folder: Path) -> None:
    """Write a ROUTE.toml that reads as `spec` once it stands in `folder`; files there go by name."""
    lines = [f"region = {spec.region}", f"gate = {_quoted(spec.gate)}", f"budget = {spec.budget!r}"]
    if spec.threshold is not None:
        lines.append(f"threshold = {spec.threshold!r}")
    lines += ["", "[cheap]", f"model = {_quoted(spec.model)}"]
    lines += _weights_line(spec.weights, folder)
    if spec.gate_weights is not None:
        lines += ["", "[learned]", *_weights_line(spec.gate_weights, folder)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _weights_line(file: Path | None, folder: Path) -> list[str]:
    if file is None:
        return []
    named = file.relative_to(folder) if file.is_relative_to(folder) else file.absolute()
    return [f"weights = {_quoted(str(named))}"]


def _quoted(text: str) -> str:
    """A basic string of TOML: JSON's, but DEL must be escaped too, and surrogates must not."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _spec(found: dict[str, Any], folder: Path) -> RouteSpec:
    _known(found, _KEYS, "the file")
    cheap, learned = _table(found, "cheap"), _table(found, "learned")
    _known(cheap, {"model", "weights"}, "[cheap]")
    _known(learned, {"weights"}, "[learned]")
    if "model" not in cheap:
        raise ValueError("[cheap] model is missing: the network of the regions that aren't computed in full")
    plain = {key: value for key, value in found.items() if key not in ("cheap", "learned")}
    return RouteSpec(
        model=cheap["model"],
        weights=_file(cheap, folder, "[cheap]"),
        gate_weights=_file(learned, folder, "[learned]"),
        **plain,
    )


def _known(table: dict[str, Any], keys: set[str], where: str) -> None:
    unknown = sorted(set(table) - keys)
    if unknown:
        raise ValueError(f"{where} has no {', '.join(unknown)}; it knows {', '.join(sorted(keys))}")


def _table(found: dict[str, Any], name: str) -> dict[str, Any]:
    table = found.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"{name} is a table: write [{name}] above its keys, got {table!r}")
    return table


def _file(table: dict[str, Any], folder: Path, where: str) -> Path | None:
    if "weights" not in table:
        return None
    if not isinstance(table["weights"], str) or not (folder / table["weights"]).is_file():
        raise ValueError(f"{where} weights {table['weights']!r} is no file in {folder}")
    return folder / table["weights"]
