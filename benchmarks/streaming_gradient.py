"""One exact gradient step over a scene in zarr, beside the streamed forward and plain autograd.

    python benchmarks/streaming_gradient.py                             1024 x 1024, with plain autograd
    python benchmarks/streaming_gradient.py --width 30000 --height 30000 --memory 8GiB \\
        --scratch FOLDER --scratch-limit 40GB --no-plain                the size the project is for

The scene and its labels are synthetic, made by blocks into zarr (kept in --scenes FOLDER, if given). Every
line is measured in a process of its own, so that peaks do not mix. Times of one run only compare with each
other: note the load. Plain autograd of the largest size would take about a terabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from streaming_forward import quick_types
from torch import nn

from bigvision.graph import cost, trace
from bigvision.streaming import StreamedModel
from bigvision.streaming.forecast import FIRST_USE
from bigvision.streaming.losses import CrossEntropy
from datasets.scene_files import write_scene
from datasets.scenes import CLASSES, Scene
from tiling import Raster, open_raster

GIB = 2**30


class Normalised:
    """A scene's rows as the network takes them."""

    def __init__(self, raster: Raster) -> None:
        self.raster, self.shape = raster, raster.shape

    def __getitem__(self, key: Any) -> NDArray[Any]:
        return (self.raster[key].astype("float32") - 110) / 55


class Labels:
    """The one band of a raster, [H, W]."""

    def __init__(self, raster: Raster) -> None:
        self.raster, self.shape = raster, raster.shape[1:]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        rows, *columns = key if isinstance(key, tuple) else (key,)
        return self.raster[(slice(0, 1), rows, *columns)][0]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=len(CLASSES))
    return model.eval().to(memory_format=torch.channels_last)


def written(folder: Path, height: int, width: int) -> tuple[Path, Path]:
    """The scene and its labels, made where they are not there yet."""
    paths = folder / f"scene_{height}x{width}.zarr", folder / f"labels_{height}x{width}.zarr"
    for path, labels in zip(paths, (False, True), strict=True):
        if not path.exists():
            write_scene(Scene(height, width), path, labels=labels, workers=2, pyramid=None)
    return paths


def measure(what: str, args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    image, classes = (open_raster(path) for path in written(Path(args.scenes), args.height, args.width))
    scene, labels = Normalised(image), Labels(classes)
    model, loss = network(), CrossEntropy(ignore_index=255)
    streamed, process = None, psutil.Process().memory_info().rss
    if what != "plain":
        scratch = (args.scratch, args.scratch_limit) if args.scratch and what == "backward" else None
        streamed = StreamedModel(
            model, scene.shape, memory=args.memory, rows=args.rows, scratch=scratch, dtype=dtype
        )
    started, worked = time.perf_counter(), time.process_time()
    if streamed is None:
        found = plain(model, scene, labels, loss, dtype)
    elif what == "forward":
        found = forward(streamed, scene)
    else:
        found = backward(streamed, scene, labels, loss, process)
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "cpu": cpu, "peak": peak, **found}


def plain(
    model: nn.Module, scene: Normalised, labels: Labels, loss: CrossEntropy, dtype: torch.dtype
) -> dict[str, float]:
    height, width = scene.shape[1:]
    whole = slice(0, height), slice(0, width)
    image = torch.from_numpy(scene[slice(0, 4), *whole])[None].to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = model(image)
    value = loss(y, torch.from_numpy(labels[whole])[None])
    value.backward()
    return {"loss": float(value.detach())}


def forward(streamed: StreamedModel, scene: Normalised) -> dict[str, float]:
    for _ in streamed.stream(scene):
        pass
    return {"rows": streamed.rows, "predicted": streamed.plan.peak_bytes / GIB}


def backward(
    streamed: StreamedModel, scene: Normalised, labels: Labels, loss: CrossEntropy, process: int
) -> dict[str, float]:
    result = streamed.backward(scene, labels, loss)
    (plan,) = result.plans
    return {
        "loss": result.loss,
        "rows": plan.rows,
        "steps": plan.steps,
        "recomputed": plan.recomputed,
        "on disk": plan.on_disk,
        "disk GB": plan.disk_bytes / 1e9,
        "predicted": (process + FIRST_USE + plan.peak_bytes) / GIB,
    }


def report(args: argparse.Namespace) -> None:
    padded = (4, -(-args.height // 32) * 32, -(-args.width // 32) * 32)
    dense = cost(trace(network(), padded)).dense_bytes / GIB
    print(
        f"Unet-resnet18, 4 x {args.height} x {args.width}, {args.dtype}, {args.threads} threads, "
        f"load {os.getloadavg()[0]:.1f}; all results in float32: {dense:.1f} GiB\n"
    )
    print("| | s | x forward | cpu s | x forward | peak GiB | |\n|---|---|---|---|---|---|---|", flush=True)
    written(Path(args.scenes), args.height, args.width)
    base: dict[str, float] = {}
    for what in ("forward", "backward") + (() if args.no_plain else ("plain",)):
        command = [sys.executable, __file__, "--one", what, "--given", json.dumps(vars(args))]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            print(f"| {what} | fails with exit status {run.returncode} | | | | | |", flush=True)
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        base = base or found
        cells = [f"{found[key]:.1f} | {found[key] / base[key]:.2f}" for key in ("seconds", "cpu")]
        rest = {key: value for key, value in found.items() if key not in ("seconds", "cpu", "peak")}
        told = ", ".join(f"{key} {value:.5g}" for key, value in rest.items())
        print(f"| {what} | {' | '.join(cells)} | {found['peak']:.2f} | {told} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--rows", type=int, help="image rows a step; planned if left out")
    parser.add_argument("--dtype", default=quick_types()[0], choices=["float32", "bfloat16"])
    parser.add_argument("--memory", default="2GiB", help="of forward and backward (2GiB)")
    parser.add_argument("--scratch", help="folder for what backward spills; nothing is if left out")
    parser.add_argument("--scratch-limit", default="40GB")
    parser.add_argument("--scenes", help="folder that keeps the scenes; a temporary one if left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--one", choices=["forward", "backward", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--given", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(measure(args.one, argparse.Namespace(**json.loads(args.given)))))
    elif args.scenes:
        report(args)
    else:
        with tempfile.TemporaryDirectory() as args.scenes:
            report(args)


if __name__ == "__main__":
    main()
