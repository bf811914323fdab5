"""`bigvision ingest`: a raster into sharded, multiscale zarr."""

from pathlib import Path
from typing import Annotated

import typer


def ingest(
    scene: Annotated[str, typer.Argument(help="A GeoTIFF, COG, VRT or zarr store.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.zarr", help="The store to write.")],
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.zarr where it exists.")] = False,
) -> None:
    """Copy a raster into a sharded zarr v3 store with a pyramid (GeoZarr conventions)."""
    from bigvision.jobs.ingest import ingest as job

    typer.echo(job(scene, out, overwrite=overwrite))
