"""This job against the peers, on one scene with one network: speed, memory, and what tiling changes.

    python benchmarks/raster.py [--size 2048] [--tile 1024] [--dtypes float32] [--peers tiles dask ...]

Every method runs in a process of its own and reads the same GeoTIFF; all run the same prepared network
(folded, channels last). Timed: from opening the scene to its classes (ours, `tiles` and `stream`: to a
finished COG). Errors are those of logits and classes against the whole-image forward in float32; memory is
the peak of the process. `Mpx/cpu s` counts processor time, which a busy machine does not stretch.

`floor` is the dense forward over tiles without any halo: wrong at every seam, and the arithmetic's own speed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.network import Network, NetworkSpec, load_network
from datasets.scenes import Scene
from tiling import open_raster

MODEL = "segmentation_models_pytorch:Unet?encoder_name=resnet18&in_channels=4&classes=8&encoder_weights="
SCALE = 255.0
HALO = 288  # exact for this network
Logits = NDArray[np.float32]


def read(path: Path) -> torch.Tensor:
    """The scene, float32 [C, H, W], normalised."""
    with rasterio.open(path) as file:
        return torch.from_numpy(file.read().astype(np.float32) / SCALE)


def whole(network: Network, path: Path, tile: int) -> Logits:
    return network(read(path)).float().numpy()


def floor(network: Network, path: Path, tile: int) -> Logits:
    image = read(path)
    result = np.empty((network.classes, *image.shape[1:]), np.float32)
    for top in range(0, image.shape[1], tile):
        for left in range(0, image.shape[2], tile):
            part = slice(top, top + tile), slice(left, left + tile)
            result[:, *part] = network(image[:, *part]).float().numpy()
    return result


def dask(network: Network, path: Path, tile: int) -> Logits:
    """map_overlap with the exact halo; chunks as large as ours."""
    import dask as library
    import dask.array as da

    image = read(path).numpy()
    chunks = da.from_array(image, chunks=(image.shape[0], tile, tile))

    def run(block: NDArray[np.float32]) -> Logits:
        return network(torch.from_numpy(np.ascontiguousarray(block))).float().numpy()

    mapped = da.map_overlap(
        run,
        chunks,
        depth={0: 0, 1: HALO, 2: HALO},
        boundary="none",
        trim=True,
        allow_rechunk=False,
        chunks=((network.classes,), *chunks.chunks[1:]),
        dtype=np.float32,
        meta=np.empty((0, 0, 0), np.float32),
    )
    with library.config.set(scheduler="single-threaded"):  # the kernels use all cores
        return mapped.compute()


def monai(network: Network, path: Path, tile: int) -> Logits:
    """sliding_window_inference as its documentation has it: overlap 0.25, constant weights."""
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(
        read(path)[None], (tile, tile), 1, lambda x: network(x[0])[None].float(), overlap=0.25
    )[0].numpy()


def toolbelt(network: Network, path: Path, tile: int) -> Logits:
    """ImageSlicer and TileMerger, half overlapping tiles with pyramid weights."""
    from pytorch_toolbelt.inference.tiles import ImageSlicer, TileMerger

    image = read(path).permute(1, 2, 0).contiguous().numpy()
    slicer = ImageSlicer(image.shape, tile_size=tile, tile_step=tile // 2, weight="pyramid")
    merger = TileMerger(slicer.target_shape, network.classes, slicer.weight)
    for piece, place in zip(slicer.split(image), slicer.crops, strict=True):
        logits = network(torch.from_numpy(piece).permute(2, 0, 1).contiguous()).float()
        merger.integrate_batch(logits[None], [place])
    merged = merger.merge().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(slicer.crop_to_orignal_size(merged).transpose(2, 0, 1))


PEERS: dict[str, Callable[[Network, Path, int], Logits]] = {
    "whole": whole,
    "floor": floor,
    "dask": dask,
    "monai": monai,
    "toolbelt": toolbelt,
}
OURS = ("tiles", "stream")


def measure_ours(engine: str, scene: Path, dtype: str, tile: int, keep: Path) -> dict[str, float]:
    """The job itself, from the file to a finished COG; a second, untimed run keeps the logits."""
    options = Options(model=MODEL, scale=SCALE, dtype=dtype, engine=engine, device="cpu")
    load_network(NetworkSpec(MODEL, None, False, 4))
    begun, worked = time.perf_counter(), time.process_time()
    run_scene((str(scene),), keep.with_suffix(".tif"), options)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logits = Options(**{**vars(options), "output": "logits", "format": "zarr"})
    run_scene((str(scene),), keep.with_suffix(".zarr"), logits)
    np.save(keep, open_raster(keep.with_suffix(".zarr")).read())
    return {"seconds": seconds, "cpu": cpu, "peak": peak}


def measure_peer(name: str, scene: Path, dtype: str, tile: int, keep: Path) -> dict[str, float]:
    network = load_network(NetworkSpec(MODEL, None, False, 4, dtype))
    network(torch.zeros(4, 256, 256))
    begun, worked = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        logits = PEERS[name](network, scene, tile)
    logits.argmax(0)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.save(keep, logits)
    return {"seconds": seconds, "cpu": cpu, "peak": peak}


def compare(logits: Logits, exact: Logits) -> tuple[float, float]:
    """Largest error relative to the largest logit, and the part of classes that differ."""
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    return float(error), float((logits.argmax(0) != exact.argmax(0)).mean())


def make_scene(path: Path, size: int) -> None:
    """`datasets.scenes`, as a tiled GeoTIFF."""
    scene = Scene(size, size)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=size,
        height=size,
        count=4,
        dtype="uint8",
        photometric="MINISBLACK",
        tiled=True,
        compress="deflate",
        crs="EPSG:32633",
        transform=scene.transform,
    ) as file:
        file.write(scene[:, :, :])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tile", type=int, default=1024, help="of the peers; ours plans its own")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--one", nargs=4, metavar=("NAME", "DTYPE", "SCENE", "KEEP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, dtype, scene, keep = options.one
        measure = measure_ours if name in OURS else measure_peer
        print(json.dumps(measure(name, Path(scene), dtype, options.tile, Path(keep))))
        return
    table = Table(
        title=f"{options.size} x {options.size} x 4, Unet resnet18, {torch.get_num_threads()} threads"
    )
    for column in ("method", "dtype", "Mpx/s", "Mpx/cpu s", "peak GiB", "largest error", "classes changed"):
        table.add_column(column, justify="left" if column in ("method", "dtype") else "right")
    with tempfile.TemporaryDirectory() as folder:
        scene = Path(folder) / "scene.tif"
        make_scene(scene, options.size)
        exact = run(scene, "whole", "float32", options.tile)[1]
        for dtype in options.dtypes:
            for name in options.peers:
                measured, logits = run(scene, name, dtype, options.tile)
                error, flipped = compare(logits, exact)
                print(
                    name, dtype, f"{measured['seconds']:.1f} s", f"{flipped:.3%}", file=sys.stderr, flush=True
                )
                table.add_row(
                    name,
                    dtype,
                    f"{options.size**2 / 1e6 / measured['seconds']:.2f}",
                    f"{options.size**2 / 1e6 / measured['cpu']:.2f}",
                    f"{measured['peak'] / 2**30:.2f}",
                    f"{error:.1e}",
                    f"{flipped:.3%}",
                )
    Console(width=110).print(table)


def run(scene: Path, name: str, dtype: str, tile: int) -> tuple[dict[str, float], Logits]:
    """One method in a process of its own."""
    keep = scene.with_name(f"{name}-{dtype}.npy")
    command = [sys.executable, __file__, "--tile", str(tile), "--one", name, dtype, str(scene), str(keep)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    logits: Logits = np.load(keep)
    keep.unlink()
    return json.loads(done.stdout.splitlines()[-1]), logits


if __name__ == "__main__":
    main()
