"""What was decided for each region, kept: a georeferenced file, a picture, and what a change makes stale.

Legend: R, S rows and columns of regions, H, W rows and columns of the scene.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS

from tiling.publish import complete

NOWHERE = 255  # as stored: no expert, because there is no data
_COLORS = ((40, 44, 52), (86, 156, 214), (152, 195, 121), (229, 130, 70), (198, 120, 221), (224, 203, 90))
_TAG = "BIGVISION_ROUTE"


@dataclass(frozen=True, eq=False)
class RouteRecord:
    """Decisions over a scene.

    Attributes:
        expert: int16 [R, S], an index into `names`, -1 where there is no data.
        score: float32 [R, S], what the gate saw.
        names: of the experts.
        region: side in pixels of the scene.
        size: (H, W).
        transform, crs: of the scene.
        made_by: identifies scene, models and route, so that another's decisions aren't taken for these.
    """

    expert: NDArray[np.int16]
    score: NDArray[np.float32]
    names: tuple[str, ...]
    region: int
    size: tuple[int, int]
    transform: Affine = field(default_factory=Affine.identity)
    crs: CRS | None = None
    made_by: str = ""

    def __post_init__(self) -> None:
        grid = tuple(-(-side // self.region) for side in self.size)
        if self.expert.shape != grid or self.score.shape != grid:
            raise ValueError(
                f"{self.size[0]} x {self.size[1]} px in regions of {self.region} px are "
                f"{grid[0]} x {grid[1]}, got experts {self.expert.shape} and scores {self.score.shape}"
            )
        if self.expert.size and not (
            self.expert.min() >= -1 and self.expert.max() < min(len(self.names), NOWHERE)
        ):
            raise ValueError(
                f"experts must be in -1..{len(self.names) - 1}, "
                f"got {self.expert.min()} to {self.expert.max()}"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the decisions and of whose they are."""
        experts = np.ascontiguousarray(self.expert, "<i2").tobytes()
        return hashlib.sha256(f"{self.made_by} {self.region} {self.size} ".encode() + experts).hexdigest()

    def counts(self) -> dict[str, int]:
        """Regions of each expert, and "nodata"."""
        found = {name: int((self.expert == e).sum()) for e, name in enumerate(self.names)}
        return found | {"nodata": int((self.expert < 0).sum())}

    def stale(self, later: "RouteRecord") -> NDArray[np.bool_]:
        """bool [R, S]: regions that must be computed anew when the route becomes `later`.

        Decisions can be revoked: only regions whose expert is another one count, not those whose score moved.

        Raises:
            ValueError: routes over another grid or with other experts.
        """
        if (self.region, self.size, self.names) != (later.region, later.size, later.names):
            raise ValueError(
                f"routes differ: regions of {self.region} px over {self.size} with {self.names}, and of "
                f"{later.region} px over {later.size} with {later.names}"
            )
        changed: NDArray[np.bool_] = self.expert != later.expert
        return changed

    def save(self, path: Path) -> None:
        """A GeoTIFF of one pixel a region: band 1 the expert (255: no data), band 2 the score."""
        transform = self.transform @ Affine.scale(self.region)
        experts = np.where(self.expert < 0, NOWHERE, self.expert).astype(np.float32)
        about = {"names": self.names, "region": self.region, "size": self.size, "made_by": self.made_by}
        height, width = self.expert.shape
        with (
            complete(path) as place,
            rasterio.open(
                place,
                "w",
                driver="GTiff",
                height=height,
                width=width,
                count=2,
                dtype="float32",
                crs=self.crs,
                transform=transform,
                compress="deflate",
            ) as file,
        ):
            file.write(experts, 1)
            file.write(self.score, 2)
            file.descriptions = ("expert", "score")
            file.update_tags(**{_TAG: json.dumps(about)})
            file.update_tags(1, nodata=str(NOWHERE), **{str(e): name for e, name in enumerate(self.names)})

    def picture(self, path: Path, *, scale: int = 8) -> None:
        """A PNG: a colour for each expert (black: no data), `scale` pixels a region."""
        from PIL import Image

        colors = np.array([_COLORS[e % len(_COLORS)] for e in range(len(self.names))] + [(0, 0, 0)], np.uint8)
        picture = colors[self.expert].repeat(scale, 0).repeat(scale, 1)
        with complete(path) as place:
            Image.fromarray(picture).save(place, format="PNG")


def load_record(path: Path) -> RouteRecord:
    """What :meth:`RouteRecord.save` wrote.

    Raises:
        ValueError: a file that is no route.
    """
    try:
        with rasterio.open(path) as file:
            about: dict[str, Any] = json.loads(file.tags()[_TAG])
            expert, score = file.read()
            crs, transform = file.crs, file.transform
    except (rasterio.errors.RasterioError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no route: {error}") from error
    region = int(about["region"])
    return RouteRecord(
        np.where(expert == NOWHERE, -1, expert).astype(np.int16),
        score.astype(np.float32),
        tuple(about["names"]),
        region,
        (int(about["size"][0]), int(about["size"][1])),
        transform @ Affine.scale(1 / region),
        crs,
        str(about["made_by"]),
    )


def route_summary(record: RouteRecord) -> str:
    """One line: how the regions were routed."""
    total = record.expert.size
    parts = [f"{name} {count} ({count / total:.0%})" for name, count in record.counts().items() if count]
    return f"{total} regions of {record.region} px: {', '.join(parts)}"
