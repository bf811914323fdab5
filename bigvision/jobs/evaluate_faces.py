"""Evaluate a face backbone: verification pairs, identification, ROC picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch

from bigvision.jobs.faces.agreement import World
from bigvision.jobs.faces.embed import Embedder
from bigvision.jobs.faces.evaluation import Evaluated, draw_roc, evaluate_source, open_evaluation
from bigvision.jobs.faces.options import DTYPES
from bigvision.models.embedding import BackboneSpec, load_backbone
from tiling.publish import complete


@dataclass(frozen=True)
class EmbedOptions:
    """Which backbone embeds images, and how."""

    weights: Path
    backbone: str | None = None  # needed where the file doesn't say what it is
    dim: int = 512
    image_size: int = 112
    flip: bool = True
    dtype: str = "float32"
    device: str = "auto"
    batch_size: int = 64
    workers: int = 0


def load_embedder(options: EmbedOptions) -> Embedder:
    """The backbone of the options, ready to embed. Raises ValueError where it can't be loaded."""
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype {options.dtype!r} is not one of {', '.join(DTYPES)}")
    named = options.backbone
    spec = None if named is None else BackboneSpec(named, options.dim, options.image_size)
    model, found = load_backbone(options.weights, spec)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options.device == "auto" else options.device)
    return Embedder(
        model.to(device),
        found.image_size,
        device,
        getattr(torch, options.dtype),
        options.flip,
        options.batch_size,
        options.workers,
    )


def evaluate(
    options: EmbedOptions, data: Sequence[str], *, roc: Path | None = None, report: Path | None = None
) -> list[Evaluated]:
    """Evaluate on every source; write a ROC picture and a JSON report where asked.

    Raises ValueError for a source that can't be evaluated, before the first one is where it can't be opened.
    """
    if not data:
        raise ValueError("nothing to evaluate on: name a source such as bin:lfw.bin or folder:PATH")
    embedder = load_embedder(options)
    sources = {spec: open_evaluation(spec, embedder.image_size) for spec in data}
    results = [evaluate_source(embedder, source, spec, World()) for spec, source in sources.items()]
    if roc is not None:
        draw_roc(results, roc)
    if report is not None:
        write_json(report, [described(result) for result in results])
    return results


def described(result: Evaluated) -> dict[str, Any]:
    """A result as plain values; a rate that could not be measured is None."""
    found = result.verification
    table: dict[str, Any] = {
        "data": result.data,
        "images": result.images,
        "damaged": list(result.damaged),
        "pairs": found.pairs,
        "accuracy": found.accuracy,
        "spread": found.spread,
        "threshold": found.threshold,
        "tar_at_far": _measured(found.tar_at_far),
        "tar_at_far_all_pairs": _measured(result.all_pairs),
    }
    if result.identification is not None:
        known = result.identification
        table["identification"] = {
            "gallery": known.gallery,
            "probes": known.probes,
            "rank": {str(k): rate for k, rate in known.ranks.items()},
            "open_set": _measured(known.open_set),
        }
    return table


def lines(result: Evaluated) -> list[str]:
    """A result as text for people."""
    found = result.verification
    text = [
        f"{result.data}: {result.images} images, {len(result.damaged)} damaged",
        f"  verification   {found.accuracy:.4f} +- {found.spread:.4f} of {found.pairs} pairs, "
        f"threshold {found.threshold:.3f}",
        "  TAR at FAR     " + _rates(result.all_pairs or found.tar_at_far),
    ]
    if result.identification is not None:
        known = result.identification
        ranks = ", ".join(f"rank-{k} {rate:.4f}" for k, rate in known.ranks.items())
        text += [
            f"  identification {ranks} ({known.probes} probes, {known.gallery} identities)",
            "  open set       " + _rates(known.open_set, "found at FPIR"),
        ]
    return text + [f"  damaged: {name}" for name in result.damaged[:10]]


def _rates(rates: dict[float, float], name: str = "at") -> str:
    return ", ".join(
        f"{name} {far:g}: " + ("too few to measure" if isnan(rate) else f"{rate:.4f}")
        for far, rate in rates.items()
    )


def _measured(rates: dict[float, float]) -> dict[str, float | None]:
    return {f"{far:g}": None if isnan(rate) else rate for far, rate in rates.items()}


def write_json(path: Path, value: Any) -> None:
    """Write JSON that appears under its name when it is complete."""
    with complete(path) as place:
        place.write_text(json.dumps(value, indent=1))
