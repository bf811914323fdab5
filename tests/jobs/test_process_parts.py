"""The pieces that `bigvision process` is made of, each against something obvious."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from process_networks import random_net
from process_scenes import random_pixels, read, write_scene
from rasterio.windows import Window
from torch import nn

from bigvision.jobs.process import Options, run_scene
from bigvision.jobs.process.allocation import peak_bytes
from bigvision.jobs.process.engine import Piece
from bigvision.jobs.process.finishing import finish
from bigvision.jobs.process.folding import fold_batch_norms
from bigvision.jobs.process.ledger import open_ledger
from bigvision.jobs.process.network import Network
from bigvision.jobs.process.options import parse_bytes
from bigvision.jobs.process.precision import agreement_of
from bigvision.jobs.process.results import ResultKind
from bigvision.jobs.process.strips import strips
from tiling import create_zarr, open_raster

NETWORKS = Path(__file__).with_name("process_networks.py")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 2**32),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("1e9", 10**9),
        ("1.5kiB", 1536),
        ("8", 8),
    ],
)
def test_sizes_in_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 9),
    rows=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 15), max_size=8),
    skip=st.integers(0, 10),
)
def test_strips_hold_what_the_pieces_hold(
    height: int, width: int, rows: int, cuts: list[int], skip: int
) -> None:
    """Pieces of any height, from some row on; what none covers, and what has no data, is nodata."""
    draw = np.random.default_rng(height * 41 + width)
    logits = draw.normal(size=(3, height, width)).astype(np.float32)
    valid = draw.random((height, width)) > 0.3
    kind, core = ResultKind("classes", 3, 0.5), Window(5, 20, width, height)
    edges = np.unique(np.clip(np.cumsum([skip, *cuts]), 0, height))
    pieces = (
        Piece(Window(5, 20 + a, width, b - a), torch.from_numpy(logits[:, a:b]), valid[a:b])
        for a, b in pairwise(edges)
    )
    found = list(strips(pieces, core, rows, kind))
    assert [window.row_off for _, window, _ in found] == list(range(20, 20 + height, rows))
    expected = np.where(valid, logits.argmax(0), 255)
    expected[: edges[0]] = expected[edges[-1] :] = 255
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _, _ in found], axis=1)[0], expected)


class TestFolding:
    def test_folded_gives_what_it_gave(self) -> None:
        model, image = random_net(6).eval(), torch.randn(1, 3, 32, 32)
        before = model(image)
        assert fold_batch_norms(model, image) == 1
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        torch.testing.assert_close(model(image), before, rtol=1e-4, atol=1e-4)

    def test_a_convolution_that_others_read_is_left_alone(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
                self.norm.running_mean += 1  # type: ignore[operator]

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.conv(x)
                return y + self.norm(y)

        model, image = Shared().eval(), torch.randn(1, 3, 16, 16)
        before = model(image)
        assert fold_batch_norms(model, image) == 0
        assert torch.equal(model(image), before)


def test_the_peak_counts_what_is_alive_at_once() -> None:
    """16 x 16 float32 is 1 KiB a channel: 8 in and 4 out of the second, while the first's input is gone."""
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 1, 1))
    assert peak_bytes(model, torch.zeros(1, 1, 16, 16)) == 12 * 1024


class TestResults:
    def test_one_channel_is_a_sigmoid(self) -> None:
        logits = torch.tensor([[[-2.0, 0.0, 2.0]]])
        kind = ResultKind("classes", 1, 0.6)
        assert kind.convert(logits).tolist() == [[[0, 0, 1]]]
        assert ResultKind("probabilities", 1, 0.6).convert(logits)[0, 0, 1] == 0.5

    def test_many_channels_are_a_softmax(self) -> None:
        logits = torch.randn(5, 3, 4)
        sums = ResultKind("probabilities", 5, 0.5).convert(logits).sum(0)
        torch.testing.assert_close(sums, torch.ones(3, 4))
        assert torch.equal(ResultKind("classes", 5, 0.5).convert(logits)[0].long(), logits.argmax(0))

    def test_many_classes_need_two_bytes(self) -> None:
        assert (ResultKind("classes", 255, 0.5).dtype, ResultKind("classes", 256, 0.5).dtype) == (
            "uint8",
            "uint16",
        )
        colors = ResultKind("classes", 8, 0.5).colormap
        assert colors is not None and len(set(colors.values())) == 8


@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_overviews_of_classes_hold_classes_beyond_a_colour_table_too(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"scene{suffix}"
    pixels = np.random.default_rng(0).choice(np.array([3, 900], np.uint16), (1, 700, 600))
    with open_ledger(target) as ledger:
        writer = create_zarr(target, pixels.shape, "uint16", nodata=65535.0, staging=ledger.pixels)
        for tile in writer.grid():
            writer.write(pixels[:, *tile.core.toslices()], tile.core)
        finish(ledger, writer, target, {}, lambda done: None, overwrite=False)
    if suffix == ".tif":
        with rasterio.open(target, overview_level=0) as file:
            coarse = file.read()
    else:
        coarse = open_raster(target / "1").read()
    assert coarse.shape[1] <= 350 and set(np.unique(coarse)) == {3, 900}


def test_agreement_counts_valid_pixels_of_one_class() -> None:
    class Constant(nn.Module):
        def __init__(self, classes: torch.Tensor) -> None:
            super().__init__()
            self.logits = nn.functional.one_hot(classes, 2).permute(2, 0, 1)[None].float()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits

    one, other = torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long)
    other[0], other[1, 0] = 1, 1
    valid = np.ones((4, 4), bool)
    valid[0] = False
    nets = [Network(Constant(c), 2, torch.float32, "cpu", "", "") for c in (one, other)]
    region = (np.zeros((3, 4, 4), np.float32), valid)
    assert agreement_of(nets[0], nets[1], ResultKind("classes", 2, 0.5), [region], 1) == 11 / 12


def test_streamed_bands_equal_tiles_with_nodata(tmp_path: Path) -> None:
    pixels = random_pixels((3, 300, 70))
    pixels[:, 100:180, 10:60] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    common = {"model": f"{NETWORKS}:random_net?seed=6", "dtype": "float32", "output": "logits"}
    for engine in ("tiles", "stream"):
        options = Options(engine=engine, tile=64, **common)  # type: ignore[arg-type]
        outcome = run_scene((str(scene),), tmp_path / f"{engine}.tif", options)
        assert outcome.plan is not None and outcome.plan.engine == engine
    one, other = read(tmp_path / "tiles.tif"), read(tmp_path / "stream.tif")
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.nanmax(np.abs(one)))
