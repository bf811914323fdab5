"""Several sources as one, band by band on one grid."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from tiling.addresses import address_name
from tiling.metadata import BandAbout
from tiling.source import Array, Handle, Profile, Source, common_nodata


@dataclass(frozen=True)
class StackSource:
    """All bands of `parts`, whose grids are the same."""

    parts: tuple[Source, ...]

    @property
    def name(self) -> str:
        """The files, by name."""
        return ", ".join(part.name for part in self.parts)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(address for part in self.parts for address in part.addresses)

    @cached_property
    def profile(self) -> Profile:
        """The first part's grid and texts; every part's bands, in their common dtype."""
        profiles = [part.profile for part in self.parts]
        first = profiles[0]
        dtype = np.result_type(*[profile.dtype for profile in profiles])
        nodata = tuple(value for profile in profiles for value in profile.nodata_by_band)
        return replace(
            first,
            shape=(len(nodata), *first.shape[1:]),
            dtype=dtype,
            nodata=common_nodata(nodata, dtype),
            band_nodata=nodata,
            band_names=tuple(name for part in self.parts for name in _band_names(part)),
            colormap=None,
            metadata=replace(first.metadata, bands=tuple(b for profile in profiles for b in _bands(profile))),
        )

    @cached_property
    def masked(self) -> bool:
        """Whether any part is."""
        return any(part.masked for part in self.parts)

    @cached_property
    def shared(self) -> bool:
        """Parts have masks of their own."""
        return not self.masked

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each band of the stack, its part and its band there."""
        return tuple((p, band) for p, part in enumerate(self.parts) for band in range(part.profile.shape[0]))

    def open(self) -> Handle:
        """Open every part."""
        return StackHandle(self)


class StackHandle:
    """Every part of a stack, open in one thread."""

    def __init__(self, source: StackSource) -> None:
        self.source = source
        self.handles: list[Handle] = []
        try:
            for part in source.parts:
                self.handles.append(part.open())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every part."""
        for handle in self.handles:
            handle.close()
        self.handles = []

    def read(self, window: Window, bands: tuple[int, ...]) -> Array:
        """Pixels [B, H, W] in the stack's common dtype."""
        out = np.empty((len(bands), window.height, window.width), self.source.profile.dtype)
        for part, rows, inner in self._by_part(bands):
            out[rows] = self.handles[part].read(window, inner)
        return out

    def valid(self, window: Window, bands: tuple[int, ...], data: Array | None) -> NDArray[np.bool_]:
        """Which pixels [B, H, W] have data, as each part tells it."""
        out = np.empty((len(bands), window.height, window.width), bool)
        for part, rows, inner in self._by_part(bands):
            own = self.source.parts[part].profile.dtype
            # A part judges its pixels in its own type; a wider one holds the same values.
            pixels = None if data is None else data[rows].astype(own, copy=False)
            out[rows] = self.handles[part].valid(window, inner, pixels)
        return out

    def _by_part(self, bands: tuple[int, ...]) -> list[tuple[int, list[int], tuple[int, ...]]]:
        """For each part that has any: where its bands go, and which they are there."""
        chosen = [self.source.places[band] for band in bands]
        found = []
        for part in dict.fromkeys(p for p, _ in chosen):
            rows = [k for k, (p, _) in enumerate(chosen) if p == part]
            found.append((part, rows, tuple(chosen[k][1] for k in rows)))
        return found


def _bands(profile: Profile) -> tuple[BandAbout, ...]:
    return profile.metadata.bands or (BandAbout(),) * profile.shape[0]


def _band_names(part: Source) -> tuple[str, ...]:
    """A file of one band without a name gives it the file's."""
    names = part.profile.band_names
    return (address_name(part.addresses[0]),) if names == ("band_1",) else names
