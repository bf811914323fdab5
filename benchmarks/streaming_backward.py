"""One exact gradient step over a scene: time against the streamed forward, peak memory, plain autograd.

    python benchmarks/streaming_backward.py --width 1024 --height 1024 --dtype bfloat16 --memory 2GiB

Every line is measured in a process of its own, so that peaks do not mix. Times of one run only compare with
each other: note the load. For the size of the mission: --width 30000 --height 30000 --memory 8GiB
--scratch /some/folder --scratch-limit 40GB; plain autograd is then left out (--no-plain), for it takes about
a terabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import segmentation_models_pytorch as smp
import torch
from torch import nn

from bigvision.graph import cost, trace
from bigvision.streaming import StreamedModel
from bigvision.streaming.losses import CrossEntropy

CLASSES = 6


class SyntheticScene:
    """Bytes that depend on their place, made when they are read."""

    def __init__(self, shape: tuple[int, ...], values: int) -> None:
        self.shape, self.values = shape, values

    def __getitem__(self, key: tuple[slice, slice] | slice) -> torch.Tensor:
        rows = key[-1] if isinstance(key, tuple) else key
        start, stop, _ = rows.indices(self.shape[-2])
        generator = torch.Generator().manual_seed(start)
        shape = (*self.shape[:-2], stop - start, self.shape[-1])
        return torch.randint(0, self.values, shape, generator=generator, dtype=torch.uint8)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=CLASSES)
    return model.eval().to(memory_format=torch.channels_last)


def measure(what: str, args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    shape, dtype = (4, args.height, args.width), getattr(torch, args.dtype)
    scene, labels = SyntheticScene(shape, 256), SyntheticScene(shape[1:], CLASSES)
    model, loss = network(), CrossEntropy(ignore_index=255)
    if what == "plain":
        start = time.perf_counter()
        image = scene[:, 0 : args.height][None].float().to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = model(image)
        loss(y, labels[0 : args.height][None]).backward()
        found = {}
    else:
        scratch = (args.scratch, args.scratch_limit) if args.scratch else None
        memory = args.memory if what == "backward" else None
        streamed = StreamedModel(
            model, shape, memory=memory, rows=args.rows or None, scratch=scratch, dtype=dtype
        )
        start = time.perf_counter()
        if what == "forward":
            for _ in streamed.stream(scene):
                pass
            found = {"rows": streamed.rows}
        else:
            (plan,) = streamed.backward(scene, labels, loss).plans
            found = {
                "rows": plan.rows,
                "steps": plan.steps,
                "recomputed": plan.recomputed,
                "on_disk": plan.on_disk,
                "predicted_gib": plan.peak_bytes / 2**30,
            }
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gib": peak, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=0, help="image rows a step; 0: planned")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--scratch", default="")
    parser.add_argument("--scratch-limit", default="40GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--only", choices=["forward", "backward", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    dense = cost(trace(network(), (4, -(-args.height // 32) * 32, -(-args.width // 32) * 32)))
    print(f"Unet-resnet18, 4 x {args.height} x {args.width}, {args.dtype}, {args.threads} threads")
    print(f"load {os.getloadavg()[0]:.1f}; all results in float32: {dense.dense_bytes / 2**30:.1f} GiB")
    forward = 0.0
    for what in ("forward", "backward") + (() if args.no_plain else ("plain",)):
        run = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", what],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if run.returncode:
            print(f"{what:9s} failed with exit code {run.returncode}")
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        forward = forward or found["seconds"]
        ratio = found["seconds"] / forward
        rest = ", ".join(
            f"{key} {value:.4g}" for key, value in found.items() if key not in ("seconds", "peak_gib")
        )
        print(
            f"{what:9s} {found['seconds']:8.1f} s  {ratio:5.2f} x forward  "
            f"peak {found['peak_gib']:.2f} GiB  {rest}"
        )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
