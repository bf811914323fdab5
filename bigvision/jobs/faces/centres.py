"""Class centres in a file, as `bigvision face convert` writes them.

Legend: C classes, D dimension.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def open_centres(path: Path) -> Any:
    """The `weight` [C, D] of a safetensors file, read where `ShardedMarginHead.set_centers` slices it.

    Raises ValueError where there is none that can be read.
    """
    try:
        return safe_open(path, "pt").get_slice("weight")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"centres {path} cannot be read: {error}") from error
