"""Of a revisit with a changed patch, exactly the tiles that depend on it are computed anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from process_scenes import random_pixels, write_scene

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.run import Outcome
from bigvision.models.spec import load_model
from tiling import Tile, TileGrid, open_raster

NET = "bigvision.models.small_unet:small_unet?in_channels=2&classes=3&width=4&depth=1"
SIZE, TILE = (194, 214), 32


def run(scene: Path, target: Path, previous: Path | None = None) -> tuple[Outcome, NDArray[Any]]:
    about = {"scale": 255.0, "dtype": "float32", "tile": TILE, "output": "logits", "format": "zarr"}
    outcome = run_scene((str(scene),), target, Options(model=NET, previous=previous, **about))
    return outcome, open_raster(target).read()


def seen_by_tiles(tiles: Sequence[Tile]) -> list[NDArray[np.bool_]]:
    """Of each tile the pixels, bool [H, W], that its result depends on: where its gradient isn't 0.

    Of the network with all weights made positive, so that nothing cancels and every ReLU is open.
    """
    network = load_model(NET).eval()
    for tensor in network.parameters():
        tensor.detach().abs_().add_(1e-3)
    image = torch.ones(1, 2, *SIZE, requires_grad=True)
    logits = network(image)
    seen = []
    for tile in tiles:
        total = logits[0][:, *tile.core.toslices()].sum()
        (gradient,) = torch.autograd.grad(total, image, retain_graph=True)
        seen.append((gradient[0] != 0).any(0).numpy())
    return seen


@pytest.mark.parametrize("corner", [(64, 64), (70, 102), (130, 150)])
def test_of_a_changed_patch_just_what_depends_on_it_is_recomputed(
    tmp_path: Path, corner: tuple[int, int]
) -> None:
    """The second patch begins where the tiles above and left of it stop looking; the third is a corner."""
    pixels = random_pixels((2, *SIZE))
    first, earlier = write_scene(tmp_path / "first.tif", pixels), tmp_path / "first.zarr"
    _, before = run(first, earlier)
    patch = np.zeros(SIZE, bool)
    patch[corner[0] : corner[0] + 64, corner[1] : corner[1] + 64] = True
    later = write_scene(tmp_path / "later.tif", np.where(patch, pixels ^ 1, pixels))
    _, alone = run(later, tmp_path / "alone.zarr")
    outcome, found = run(later, tmp_path / "found.zarr", earlier)
    assert found.tobytes() == alone.tobytes()
    # Once more from a result that was tampered with: what is copied now shows it.
    zarr.open_array(earlier / "0", mode="r+")[:] = before + 1000
    _, marked = run(later, tmp_path / "marked.zarr", earlier)
    tiles, recomputed = list(TileGrid(*SIZE, TILE)), 0
    for tile, seen in zip(tiles, seen_by_tiles(tiles), strict=True):
        core = tile.core.toslices()
        if (seen & patch).any():
            assert marked[:, *core].tobytes() == alone[:, *core].tobytes()
            recomputed += tile.core.height * tile.core.width
        else:
            assert marked[:, *core].tobytes() == (before + 1000)[:, *core].tobytes()
    assert outcome.computed == recomputed < SIZE[0] * SIZE[1] / 2
