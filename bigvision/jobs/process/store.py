"""The unfinished store that a result's pixels are kept in, whatever engine computes them."""

from pathlib import Path

from bigvision.jobs.process.ledger import Ledger
from bigvision.jobs.process.options import Options
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.scene import Scene
from tiling import ZarrWriter, create_zarr


def create_store(
    ledger: Ledger,
    target: Path,
    scene: Scene,
    kind: ResultKind,
    options: Options,
    *,
    chunk: int,
    shard: int | tuple[int, int],
) -> ZarrWriter:
    """A store of the scene's grid and the result's kind, in files of `shard` and chunks of `chunk` pixels."""
    _, height, width = scene.written.shape
    return create_zarr(
        target,
        (kind.bands, height, width),
        kind.dtype,
        crs=scene.raster.crs,
        transform=scene.written.transform,
        metadata=scene.written.profile.metadata.place(),
        nodata=kind.nodata,
        band_names=kind.band_names,
        colormap=kind.colormap,
        chunk=chunk,
        shard=shard,
        staging=ledger.pixels,
        overwrite=options.overwrite,
    )
