"""The streamed forward against the dense one: time a pixel, and peak memory whatever the height.

    python benchmarks/streaming_forward.py                  width 8192, 1024 rows, float32 and bf16 if fast
    python benchmarks/streaming_forward.py --width 30000    the size of a Sentinel-2 mosaic

The floor is the same network with its norms folded, run eagerly on 1024 x 1024 tiles without halo,
channels last: no seam-free method computes less. Floor, compiled floor, stream and compiled stream take
turns, each in a process of its own, so that none gains by another's heap; ratios are the medians of those of
neighbouring turns. Peak memory is of a process of its own at heights 1 x and 4 x: it must not grow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bigvision.hardware import has_fast_bfloat16
from bigvision.streaming import StreamedModel

CHANNELS, CLASSES, TILE = 4, 6, 1024
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def quick_types() -> list[str]:
    """float32, and bfloat16 where the processor does not just emulate it."""
    return [*(["bfloat16"] if has_fast_bfloat16("cpu") else []), "float32"]


class Scene:
    """A scene made when it is read, so that only the engine takes memory."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __getitem__(self, key: Any) -> Tensor:
        start, stop, _ = key[1].indices(self.shape[1])
        row = torch.arange(start, stop).view(1, -1, 1) % 251 + torch.arange(self.shape[2]) % 241
        return (row.expand(self.shape[0], -1, -1).float() - 240) / 120


def network() -> nn.Module:
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, in_channels=CHANNELS, classes=CLASSES).eval()


def folded(model: nn.Module) -> nn.Module:
    """Every convolution that a batch norm follows, merged with it."""
    for module in list(model.modules()):
        names = list(module._modules)
        for name, following in itertools.pairwise(names):
            conv, norm = module._modules[name], module._modules[following]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module._modules[name] = fuse_conv_bn_eval(conv, norm)
                module._modules[following] = nn.Identity()
    return model


def floor(dtype: torch.dtype, tiles: int, *, compiled: bool = False) -> Callable[[], int]:
    """Pixels of `tiles` dense tiles without halo."""
    model = folded(network()).to(dtype).to(memory_format=torch.channels_last)
    tile = torch.randn(1, CHANNELS, TILE, TILE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    run_tile = torch.compile(model, dynamic=False) if compiled else model

    def run() -> int:
        with torch.inference_mode():
            for _ in range(tiles):
                run_tile(tile)
        return tiles * TILE * TILE

    return run


def stream(shape: tuple[int, int, int], options: dict[str, Any]) -> Callable[[], int]:
    """Pixels of a streamed scene."""
    model = StreamedModel(network(), shape, **options)
    scene = Scene(shape)

    def run() -> int:
        for _ in model.stream(scene):
            pass
        return shape[1] * shape[2]

    return run


def timed(run: Callable[[], int]) -> tuple[float, float]:
    """Processor and wall microseconds a pixel."""
    cpu, wall = time.process_time(), time.perf_counter()
    pixels = run()
    return (time.process_time() - cpu) * 1e6 / pixels, (time.perf_counter() - wall) * 1e6 / pixels


RUNNERS: dict[str, Callable[[argparse.Namespace], Callable[[], int]]] = {
    "floor": lambda args: floor(DTYPES[args.dtype], args.tiles),
    "compiled floor": lambda args: floor(DTYPES[args.dtype], args.tiles, compiled=True),
    "stream": lambda args: stream((CHANNELS, args.height, args.width), engine_options(args)),
    "compiled stream": lambda args: stream(
        (CHANNELS, args.height, args.width), engine_options(args) | {"compile": True}
    ),
}


def take_turns(args: argparse.Namespace) -> None:
    """Run once for nothing, then once for every line that comes; print what each took."""
    torch.set_num_threads(args.threads)
    run = RUNNERS[args.runner](args)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(run)), flush=True)


class Turns:
    """One runner in a process of its own."""

    def __init__(self, runner: str, args: argparse.Namespace, **changes: Any) -> None:
        given = json.dumps(vars(args) | changes | {"runner": runner})
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--one", "turns", "--given", given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._line() == "ready"

    def take(self) -> tuple[float, float]:
        """Processor and wall microseconds a pixel of one more run."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        cpu, wall = json.loads(self._line())
        return cpu, wall

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self.process.args} failed")
        return line


def compare(args: argparse.Namespace, dtype: str) -> dict[str, tuple[float, float, float]]:
    """Of every runner: median processor and wall microseconds a pixel, and the floor's wall over its own."""
    turns = {name: Turns(name, args, dtype=dtype) for name in args.runners}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for _ in range(args.repeats):
        for name, turn in turns.items():
            times[name].append(turn.take())
    for turn in turns.values():
        turn.end()
    return {
        name: (
            *(statistics.median(one[clock] for one in taken) for clock in (0, 1)),
            statistics.median(dense[1] / own[1] for dense, own in zip(times["floor"], taken, strict=True)),
        )
        for name, taken in times.items()
    }


def peak(args: argparse.Namespace) -> dict[str, float]:
    """The process's peak, how much of it the scene added, and what was predicted."""
    torch.set_num_threads(args.threads)
    stream((CHANNELS, 64, 64), {"rows": 32, "dtype": DTYPES[args.dtype]})()  # libraries are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = StreamedModel(network(), (CHANNELS, args.height, args.width), **engine_options(args))
    for _ in model.stream(Scene(model.shape)):
        pass
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = model.plan
    return {
        "peak": after / 2**20,
        "grown": (after - before) / 2**20,
        "predicted_peak": plan.peak_bytes / 2**30,
        "predicted_engine": plan.engine_bytes / 2**30,
        "rows": plan.rows,
    }


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": DTYPES[args.dtype], "rows": args.rows}


def measured(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Peaks, in a process of their own."""
    given = json.dumps(vars(args) | changes)
    done = subprocess.run(
        [sys.executable, __file__, "--one", "peak", "--given", given],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"peak failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    print(
        f"Unet-resnet18, {args.width} px wide, {args.height} rows, {args.threads} threads, load {load:.1f}\n"
    )
    print("| dtype | | µs cpu/px | µs wall/px | Mpx/s | x the floor |\n|---|---|---|---|---|---|", flush=True)
    for dtype in args.dtypes:
        for name, (cpu, wall, ratio) in compare(args, dtype).items():
            print(f"| {dtype} | {name} | {cpu:.2f} | {wall:.2f} | {1 / wall:.2f} | {ratio:.2f} |", flush=True)
    print("\n| dtype | rows a step | peak GiB | at 4 x the height | predicted | grown | engine predicted |")
    print("|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        low = measured(args, dtype=dtype)
        high = measured(args, dtype=dtype, height=4 * args.height)
        cells = [dtype, f"{low['rows']}", f"{low['peak']:.2f}"]
        cells += [f"{high[key]:.2f}" for key in ("peak", "predicted_peak", "grown", "predicted_engine")]
        print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--rows", type=int, help="image rows a step; planned if left out")
    parser.add_argument("--tiles", type=int, default=4, help="dense tiles of a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=quick_types())
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS), help="floor first")
    parser.add_argument("--one", choices=["turns", "peak"], help=argparse.SUPPRESS)
    parser.add_argument("--given", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one is None:
        report(args)
        return
    given = argparse.Namespace(**json.loads(args.given))
    if args.one == "turns":
        take_turns(given)
    else:
        print(json.dumps(peak(given)))


if __name__ == "__main__":
    main()
