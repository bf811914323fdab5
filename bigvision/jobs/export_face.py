"""Export a face backbone to ONNX or `torch.export`, checked against the network it came from.

Shapes: images [batch, 3, S, S] float32 in [-1, 1] -> embeddings [batch, D] float32; the batch is free.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bigvision.models.embedding import BackboneSpec, load_backbone
from tiling.publish import complete

TOLERANCE = 1e-3  # of the largest embedding value: other kernels add in another order


@dataclass(frozen=True)
class Exported:
    """A written file and how far its output is from torch's."""

    path: Path
    difference: float  # largest, relative to the largest value
    bytes: int


def export_face(weights: Path, out: Path, spec: BackboneSpec | None = None) -> Exported:
    """Write `.onnx` or `.pt2`; the file appears only when its output on random images equals torch's.

    Raises ValueError for another suffix, weights that don't load, and a file that computes something else.
    """
    if out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{out} is neither .onnx nor .pt2")
    model, found = load_backbone(weights, spec)
    example = torch.rand(2, 3, found.image_size, found.image_size) * 2 - 1
    with complete(out) as place:
        write = _write_onnx if out.suffix == ".onnx" else _write_program
        write(model, example, place)
        difference = _difference(model, place, found.image_size)
        if difference > TOLERANCE:
            raise ValueError(
                f"the exported network differs from torch by {difference:.2g} of its largest value"
            )
    return Exported(out, difference, out.stat().st_size)


def _write_onnx(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    try:
        torch.onnx.export(
            model,
            (example,),
            path,
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    except ImportError as error:
        raise ValueError(
            f"exporting to ONNX needs the onnx extra: pip install 'bigvision[onnx]' ({error})"
        ) from error


def _write_program(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


def _difference(model: nn.Module, path: Path, size: int) -> float:
    """Largest difference on batches of one and three images, relative to the largest value."""
    worst = 0.0
    for count in (1, 3):
        images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count)) * 2 - 1
        with torch.no_grad():
            expected = model(images).numpy()
        found = _run_onnx(path, images) if path.suffix == ".onnx" else _run_program(path, images)
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def _run_onnx(path: Path, images: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["embeddings"], {"images": images.numpy()})[0]
    return found


def _run_program(path: Path, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = torch.export.load(path).module()(images).numpy()
    return found
