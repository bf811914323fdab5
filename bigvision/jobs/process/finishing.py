"""From the finished pixels to the result under its final name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bigvision.jobs.process.ledger import Ledger
from tiling import ZarrWriter, to_cog
from tiling.publish import discard, publish
from tiling.replaceable import drop_sidecars

Fraction = Callable[[float], object]


def finish(
    ledger: Ledger,
    writer: ZarrWriter,
    target: Path,
    tags: dict[str, str],
    progress: Fraction,
    *,
    overwrite: bool,
) -> None:
    """Complete the result and give it its name at once; what was begun by an interrupted run is made anew.

    Raises:
        ValueError: something appeared under the name meanwhile that may not be replaced; the pixels stay.
    """
    for begun in ledger.folder.glob(f"*{ledger.draft.name}*"):
        discard(begun)
    kept = writer.profile
    # Results of whole numbers are classes, of which there is no mean; beyond 255 they have no colour table.
    coarser = "mode" if np.issubdtype(kept.dtype, np.integer) else "average"
    if target.suffix == ".zarr":
        writer.publish(pyramid=coarser, tags=tags, progress=lambda done, total: progress(done / total))
        return
    to_cog(
        writer.raster(),
        ledger.draft,
        colormap=kept.colormap,
        tags=tags,
        overviews=coarser,
        threads=2,
        progress=progress,
    )
    replaced = target.exists()
    publish(ledger.draft, target, replace=overwrite)
    if replaced:
        drop_sidecars(target)
