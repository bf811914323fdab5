"""`bigvision demo`: the main job on a scene made on the spot."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("demo"),
    size: Annotated[int, typer.Option(help="Rows and columns of the scene.")] = 3072,
) -> None:
    """Make a scene with known classes, train on a third of it, process all of it, and score the rest."""
    from bigvision.jobs.demo import demo as job

    result = job(out, size, say=typer.echo)
    typer.echo(
        f"\naccuracy     {result.accuracy:.4f} on the two thirds that it did not train on\n"
        f"speed        {result.megapixels_per_second:.2f} megapixels/s, from file to file\n"
        f"peak memory  {result.peak_bytes / 2**30:.2f} GiB\n"
        f"took         {result.seconds:.0f} s\n"
        f"prediction   {result.cog}\n"
        f"picture      {result.picture}"
    )
