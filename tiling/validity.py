"""Which pixels of a file have data: the one answer for reading, resampling and copying.

It is GDAL's own (RFC 15), band by band: a mask of the file or of the band goes before a nodata value, which
goes before an alpha band. Beyond that, an alpha band that GDAL doesn't count (a fifth band, say) decides
where nothing else does, and NaN is never data.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.io import DatasetReader
from rasterio.windows import Window

from tiling.source import Array, not_missing

# Beyond this a nodata value of 64-bit integers has been rounded on its way.
_EXACT = 2**53


@dataclass(frozen=True)
class Validity:
    """Of some bands of a file.

    nodata: the value that alone tells a band's missing pixels; None where there is none, or it isn't alone.
    masks: the band, from 1, whose mask GDAL is asked for; None where a value or nothing decides.
    alpha: the band that shows pixels where it isn't 0, for bands with neither; None without one.
    shared: whether all bands miss the same pixels, NaN aside.
    """

    nodata: tuple[float | None, ...]
    masks: tuple[int | None, ...]
    alpha: int | None
    shared: bool

    @property
    def masked(self) -> bool:
        """Whether anything but values tells missing pixels."""
        return self.alpha is not None or any(mask is not None for mask in self.masks)

    def read(
        self, dataset: DatasetReader, window: Window, bands: tuple[int, ...], data: Array
    ) -> NDArray[np.bool_]:
        """True [B, H, W] where `data`, the pixels of `bands` (positions from 0), is data."""
        valid = not_missing(data, tuple(self.nodata[band] for band in bands))
        known: dict[int, NDArray[np.bool_]] = {}
        for k, band in enumerate(bands):
            mask = self.masks[band]
            if mask is not None:
                # One mask of all bands is read once.
                key = 0 if self.shared else mask
                if key not in known:
                    known[key] = np.asarray(dataset.read_masks(mask, window=window) > 0)
                valid[k] &= known[key]
            elif self.alpha is not None and self.nodata[band] is None:
                if -1 not in known:
                    known[-1] = np.asarray(dataset.read(self.alpha, window=window) > 0)
                valid[k] &= known[-1]
        return valid


def validity_of(dataset: DatasetReader, indexes: tuple[int, ...]) -> Validity:
    """What tells the missing pixels of bands, by number from 1; an alpha band among them is data itself."""
    alphas = [i for i, color in enumerate(dataset.colorinterp, 1) if color == ColorInterp.alpha]
    alpha = next((i for i in alphas if i not in indexes), None)
    kinds: list[tuple[str, Any]] = []
    for index in indexes:
        flags, value = dataset.mask_flag_enums[index - 1], dataset.nodatavals[index - 1]
        if flags == [MaskFlags.nodata] and value is not None and _exact(dataset.dtypes[index - 1], value):
            kinds.append(("value", value))
        elif MaskFlags.all_valid in flags or (MaskFlags.alpha in flags and alpha is None):
            kinds.append(("alpha", alpha) if alpha else ("none", None))
        else:
            kinds.append(("mask", 0 if MaskFlags.per_dataset in flags else index))
    return Validity(
        nodata=tuple(value if kind == "value" else None for kind, value in kinds),
        masks=tuple(i if kind == "mask" else None for (kind, _), i in zip(kinds, indexes, strict=True)),
        alpha=alpha if ("alpha", alpha) in kinds else None,
        shared=len(set(kinds)) == 1 and (len(kinds) == 1 or kinds[0][0] != "value"),
    )


def _exact(dtype: str, value: float) -> bool:
    return dtype not in ("int64", "uint64") or abs(value) < _EXACT
