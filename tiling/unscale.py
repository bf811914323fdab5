"""A source in physical units: each band's scale and offset applied to its pixels."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from tiling.source import Array, Handle, Profile, Source, SourceOfOne


@dataclass(frozen=True)
class UnscaledSource(SourceOfOne):
    """`scale * x + offset` of the pixels x of `inner`, band by band; NaN where they have no data.

    float32, or float64 where pixels are wider than 16 bits: computed in float64 and rounded once.
    """

    inner: Source

    @cached_property
    def profile(self) -> Profile:
        """The inner source's, in units and without nodata."""
        inner = self.inner.profile
        wide = inner.dtype.itemsize > 2 and inner.dtype != np.float32
        bands = tuple(
            replace(
                band,
                scale=1.0,
                offset=0.0,
                tags={k: v for k, v in band.tags.items() if k[:11] != "STATISTICS_"},
            )
            for band in inner.metadata.bands
        )
        return replace(
            inner,
            dtype=np.dtype("float64" if wide else "float32"),
            nodata=float("nan"),
            band_nodata=(),
            colormap=None,
            metadata=replace(inner.metadata, bands=bands),
        )

    @property
    def masked(self) -> bool:
        """NaN tells all that is missing."""
        return False

    def open(self) -> Handle:
        """Open the inner source."""
        return UnscaledHandle(self)


class UnscaledHandle:
    """An open inner source."""

    def __init__(self, source: UnscaledSource) -> None:
        self.source = source
        self.inner = source.inner.open()

    def close(self) -> None:
        """Close the inner source."""
        self.inner.close()

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """Pixels [B, H, W] in units, NaN where there is no data."""
        data = self.inner.read(window, bands)
        valid = self.inner.valid(window, bands, data)
        about = [self.source.inner.profile.metadata.bands[band] for band in bands]
        out = np.full(data.shape, np.nan, self.source.profile.dtype)
        for k, band in enumerate(about):
            physical = data[k].astype(np.float64) * band.scale + band.offset
            out[k][valid[k]] = physical[valid[k]]
        return out

    def valid(self, window: Window, bands: tuple[int, ...], data: Array | None) -> NDArray[np.bool_]:
        """Which pixels [B, H, W] have data."""
        data = self.read(window, bands) if data is None else data
        return ~np.isnan(data)
