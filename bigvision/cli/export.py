"""`bigvision export`: a zarr store into a Cloud Optimized GeoTIFF."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    store: Annotated[str, typer.Argument(metavar="OUT.zarr", help="A zarr store (any raster works).")],
    out: Annotated[Path, typer.Argument(metavar="OUT.tif", help="The GeoTIFF to write.")],
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.tif where it exists.")] = False,
) -> None:
    """Write a zarr store as a Cloud Optimized GeoTIFF with overviews."""
    from bigvision.jobs.export import export as job

    typer.echo(job(store, out, overwrite=overwrite))
