"""What routing saves: the curve from 5 % to 100 % of the regions in full, compact and scattered, and more.

    python benchmarks/routing.py                  # minutes: the curve on a scene of 4096 x 4096
    python benchmarks/routing.py --full-size      # and 25 % of a scene of 8192 x 8192

Every ratio is of times taken in turn in one run; medians where a thing runs more than once. `--clock cpu`
counts this process's work on the processor, which a busy machine changes little.
"""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigvision.gating import Gate
from bigvision.hardware import has_fast_bfloat16
from bigvision.jobs.process.folding import fold_batch_norms
from bigvision.models.small_unet import small_unet
from bigvision.routing import RegionRouter, Skip, seconds
from bigvision.routing.route_file import RouteSpec
from bigvision.routing.scene import CHEAP, FULL, SceneRouter
from bigvision.routing.temporal import TemporalRouter
from tiling import open_raster

CHANNELS, CELLS = 256, 256  # of the routed block
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Timer = Callable[[], float]
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


class Noise:
    """A scene of random pixels, all with data."""

    def __init__(self, side: int) -> None:
        self.pixels = np.random.default_rng(0).normal(size=(4, side, side)).astype(np.float32)
        self.shape = self.pixels.shape

    def read(self, window):  # type: ignore[no-untyped-def]
        rows, cols = window.toslices()
        return self.pixels[:, rows, cols], np.ones((window.height, window.width), bool)


class Told(nn.Module):
    """A scorer of the logits that it holds."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def compact(rows: int, cols: int, share: float) -> NDArray[np.bool_]:
    """So many regions in near-squares, the last row of each as long as it gets: one, or from 16 on four."""
    mask = np.zeros((rows, cols), bool)
    want = round(share * rows * cols)
    parts = 2 if want >= 16 and rows % 2 == cols % 2 == 0 else 1
    high, wide = rows // parts, cols // parts
    for number, (r, c) in enumerate(itertools.product(range(parts), repeat=2)):
        own = want // parts**2 + (number < want % parts**2)
        side = min(max(math.ceil(own**0.5), -(-own // high)), wide)
        for row in range(-(-own // side)):
            left = c * wide
            mask[r * high + row, left : left + min(side, own - row * side)] = True
    return mask


def scattered(rows: int, cols: int, share: float) -> NDArray[np.bool_]:
    """As many regions anywhere."""
    order = np.random.default_rng(1).permutation(rows * cols)
    return (order < round(share * rows * cols)).reshape(rows, cols)


def networks(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Unet-resnet18 and a small U-Net, folded."""
    torch.manual_seed(0)
    full = smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=8).eval()
    cheap = small_unet(4, 8, width=8).eval()
    for network in (full, cheap):
        fold_batch_norms(network, torch.randn(1, 4, 128, 128))
        network.to(dtype=dtype, memory_format=torch.channels_last)
    return cheap, full


Layout = Callable[[int, int, float], NDArray[np.bool_]]


def nothing(*_: object) -> None:
    """Results go nowhere: only computing is timed."""


def all_full(router: SceneRouter, clock: Timer) -> float:
    """Seconds of the full network everywhere, nothing else."""
    return compute(router, np.ones(router.grid, bool), clock)


def routed(router: SceneRouter, mask: NDArray[np.bool_], clock: Timer) -> float:
    """Seconds of the cheap network and its scores everywhere, and the full one on the mask."""
    begun = clock()
    for box in router.blocks():
        router.score(box, nothing)
    return clock() - begun + compute(router, mask, clock)


def compute(router: SceneRouter, mask: NDArray[np.bool_], clock: Timer) -> float:
    begun = clock()
    for rectangle in router.rectangles(mask, FULL):
        router.compute(FULL, rectangle, nothing)
    return clock() - begun


def scene_curve(
    side: int,
    region: int,
    dtype: torch.dtype,
    max_side: int,
    clock: Timer,
    shares: Sequence[float],
    layouts: Sequence[Layout],
) -> None:
    """All-full against routed scenes, end to end from pixels in memory."""
    cheap, full = networks(dtype)
    spec = RouteSpec("benchmark", region=region)
    router = SceneRouter(Noise(side), cheap, full, spec, max_pixels=max_side**2, dtype=dtype)
    router.trace()
    rows, cols = router.grid
    print(f"\nScene of {side} x {side}, regions of {region}, {dtype}, rectangles of at most {max_side} px")
    router.compute(FULL, router.rectangles(np.ones((rows, cols), bool), FULL)[0], nothing)  # warms up
    dense = all_full(router, clock)
    print(f"all full: {dense:.1f} s, {side * side / dense / 1e6:.2f} Mpx/s", flush=True)
    print(" in full     layout  regions rectangles  seconds  faster  FLOPs")
    for layout, share in itertools.product(layouts, shares):
        mask = layout(rows, cols, share)
        took = routed(router, mask, clock)
        plan = router.plan(np.where(mask, FULL, CHEAP).astype(np.int16))
        print(
            f"{mask.mean():8.0%} {layout.__name__:>10} {mask.sum():8d} "
            f"{plan.experts[FULL].rectangles:10d} {took:8.1f} {dense / took:6.2f}x {plan.share:6.0%}",
            flush=True,
        )


def routed_block(dtype: torch.dtype, clock: Timer) -> None:
    """A block inside a network: regions of 32 x 32 cells, the halo of one convolution, against dense."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()).eval()
    block.to(dtype=dtype, memory_format=torch.channels_last)
    x = torch.randn(1, CHANNELS, CELLS, CELLS).to(dtype=dtype, memory_format=torch.channels_last)
    side = CELLS // 32
    print(f"\nRouted block: {CHANNELS} channels, {side} x {side} regions of 32 x 32 cells, {dtype}")
    print(" in full     layout       ms  dense ms  faster")
    for layout in (compact, scattered):
        for share in SHARES:
            mask = torch.from_numpy(layout(side, side, share)).flatten()
            gate = Gate(Told(torch.stack([~mask, mask], 1).float() * 4), straight=True)
            skip = Skip(CHANNELS).to(dtype)
            router = RegionRouter(gate, {"skip": skip, "full": block}, 32, features=nothing_seen)
            with torch.no_grad():
                decision = router.decide(x)
                router.compute(x, decision)
                took = seconds(lambda r=router, d=decision: r.compute(x, d), repeats=5, clock=clock)
                dense = seconds(lambda: block(x), repeats=5, clock=clock)
            times = f"{took * 1e3:8.1f} {dense * 1e3:9.1f} {dense / took:6.2f}x"
            print(f"{mask.float().mean():8.0%} {layout.__name__:>10} {times}", flush=True)
    with torch.no_grad():
        moved(x, block, clock)


def nothing_seen(x: Tensor, region: int) -> Tensor:
    """Features of a gate that is told."""
    return x.new_zeros(len(x) * -(-x.shape[-2] // region) * -(-x.shape[-1] // region), 1)


def moved(x: Tensor, block: nn.Module, clock: Timer) -> None:
    """Deciding, cutting and pasting 25 % of the regions, against experts of one and of four convolutions."""
    side = x.shape[-1] // 32
    mask = torch.from_numpy(compact(side, side, 0.25)).flatten()
    gate = Gate(Told(torch.stack([~mask, mask], 1).float() * 4), straight=True)
    experts = {"skip": Skip(CHANNELS).to(x.dtype), "full": nn.Identity()}  # computes nothing: all is moving
    router = RegionRouter(gate, experts, 32, channels=CHANNELS, features=nothing_seen)
    took = seconds(lambda: router(x), repeats=15, clock=clock)
    print(f"dispatch and combine of 25 %: {took * 1e3:.1f} ms")
    for name, expert in (("one convolution", block), ("four convolutions", nn.Sequential(*[block] * 4))):
        dense = seconds(lambda e=expert: e(x), repeats=3, clock=clock)
        print(f"  {took / dense:.1%} of a dense expert of {name} ({dense * 1e3:.1f} ms)")


def revisits(folder: Path, timer: Timer) -> None:
    """A NAIP scene: an identical revisit, and one changed patch; `revisits.py` has real ones."""
    torch.manual_seed(0)
    network = small_unet(4, 5, width=32).eval()
    router = TemporalRouter(network, 4, 64, made_by="benchmark")
    print("\nRevisits of a NAIP scene: regions of 64 px, a small U-Net of width 32")

    def image(year: int) -> Tensor:
        (path,) = folder.glob(f"*_{year}*.tif")
        return torch.from_numpy(open_raster(path).read().astype(np.float32) / 255)

    first = image(2012)
    router(first)

    def clock(function: Callable[[], object]) -> float:
        return seconds(function, repeats=3, clock=timer)

    everything = clock(lambda: router(first))
    visit = router(first).visit
    again = router(first.clone(), visit)
    took = clock(lambda: router(first, visit))
    times = f"{everything / took:.0f}x faster ({everything:.2f} s, {took:.3f} s)"
    print(f"identical: {again.reused:.0%} reused, {times}")
    patch = first.clone()
    patch[:, 300:364, 400:464] = 1 - patch[:, 300:364, 400:464]
    found, expected = router(patch, visit), router(patch).visit.output
    same = torch.equal(found.visit.output, expected)
    print(
        f"one 64 x 64 patch changed: {int(found.recomputed.sum())} of {found.recomputed.size} regions "
        f"recomputed, bit-identical: {same}"
    )


def main() -> None:
    """Print it all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full-size", action="store_true", help="25 %% of a scene of 8192 x 8192, too")
    parser.add_argument("--side", type=int, default=4096, help="of the curve's scene")
    parser.add_argument("--region", type=int, default=512, help="side of a region")
    parser.add_argument("--max-side", type=int, default=2048, help="of a rectangle computed at once")
    quick = "bfloat16" if has_fast_bfloat16("cpu") else "float32"
    parser.add_argument("--dtype", default=quick, choices=("bfloat16", "float32"))
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the scene in full")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("scene", "block", "revisits"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    clock = CLOCKS[args.clock]
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"{torch.get_num_threads()} threads, {args.clock} clock, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}"
    )
    naip = Path(__file__).parents[2] / "shared" / "data" / "rasters" / "naip"
    if args.only in (None, "block"):
        routed_block(dtype, clock)
    if args.only in (None, "scene"):
        scene_curve(args.side, args.region, dtype, args.max_side, clock, args.shares, (compact, scattered))
    if args.full_size:
        scene_curve(8192, 512, dtype, args.max_side, clock, (0.25,), (compact,))
    if args.only in (None, "revisits") and naip.is_dir():
        revisits(naip, clock)


if __name__ == "__main__":
    main()
