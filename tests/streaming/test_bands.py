"""Bands of a scene, in any cut and any order, give what one walk over the whole scene gives."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forward_oracle import error
from gradient_oracle import RandomNetwork
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.streaming import StreamedModel, spill
from bigvision.streaming.bands import BandedStream, PhaseSums


def by_bands(stream: BandedStream, edges: Sequence[int]) -> Tensor:
    """The padded image's output, every phase's bands computed from the last to the first."""
    before: list[PhaseSums] = []
    bands = list(pairwise(edges))
    for phase in range(stream.phases):
        parts = [stream.sums(phase, band, before) for band in reversed(bands)]
        before.append(stream.merged(parts[::-1]))
        stream.forget(phase)
    pieces: list[Tensor] = []
    for band in bands:
        following = band[0]
        for row, y in stream.rows(band, before):
            assert row == following
            following += y.shape[-2]
            pieces.append(y)
        assert following == band[1]
    stream.forget(stream.phases)
    return torch.cat(pieces, -2)


def whole(model: nn.Module, image: Tensor, stride: int) -> Tensor:
    height, width = image.shape[1:]
    with torch.no_grad():
        y = model(F.pad(image, (0, -width % stride, 0, -height % stride))[None])
    return y["out"] if isinstance(y, dict) else y


CUTS = {
    "seed": st.integers(0, 10**6),
    "height": st.integers(9, 60),
    "rows": st.integers(1, 40),
    "cuts": st.lists(st.integers(1, 59), max_size=4),
}


def cut_error(seed: int, height: int, rows: int, cuts: list[int], scratch: tuple[str, int] | None) -> float:
    model = RandomNetwork(seed).double().eval()
    image = torch.randn(3, height, 19, dtype=torch.float64)
    streamed = StreamedModel(model, tuple(image.shape), rows=rows, dtype=torch.float64, scratch=scratch)
    end = streamed.program.traced.shape[1]
    edges = sorted({0, end, *(cut for cut in cuts if cut < end)})
    found = by_bands(BandedStream(streamed, image), edges)
    return error(found, whole(model, image, streamed.stride))


@settings(max_examples=8, deadline=None)
@given(**CUTS)
def test_any_cut_of_any_network(seed: int, height: int, rows: int, cuts: list[int]) -> None:
    assert cut_error(seed, height, rows, cuts, None) < 1e-10


@settings(max_examples=8, deadline=None)
@given(**CUTS)
@example(seed=198, height=9, rows=1, cuts=[1])  # a band without a row of what its pass starts from
@pytest.mark.slow
def test_any_cut_that_starts_from_kept_values(seed: int, height: int, rows: int, cuts: list[int]) -> None:
    """Behind every pass, whatever that costs."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(spill, "FLOPS_A_BYTE", 0)
        assert cut_error(seed, height, rows, cuts, (folder, 10**9)) < 1e-10
        assert not list(Path(folder).iterdir())


class TwoMeans(nn.Module):
    """In one pass the means of a map and of its convolution, for which bands make rows beyond their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y * self.second(y).mean((2, 3), keepdim=True) + y.mean((2, 3), keepdim=True)


def test_rows_that_only_serve_an_operator_are_not_summed() -> None:
    torch.manual_seed(0)
    model, image = TwoMeans().double(), torch.randn(3, 40, 12, dtype=torch.float64)
    stream = BandedStream(StreamedModel(model, (3, 40, 12), rows=8, dtype=torch.float64), image)
    assert error(by_bands(stream, (0, 11, 20, 40)), whole(model, image, 1)) < 1e-12


@pytest.mark.parametrize("scratch", [0, 10**8])
@pytest.mark.parametrize(
    "name", ["DeepLabV3Plus-resnet18", pytest.param("PSPNet-efficientnet-b0", marks=pytest.mark.slow)]
)
def test_networks_with_phases(name: str, scratch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, image = NETWORKS[name]().double().eval(), torch.randn(3, 101, 75, dtype=torch.float64)
    streamed = StreamedModel(
        model, (3, 101, 75), rows=24, dtype=torch.float64, scratch=(tmp_path / "rows", scratch)
    )
    stream = BandedStream(streamed, image)
    assert stream.phases >= 1
    assert bool(stream.program.boundaries) == bool(scratch)
    edges = (0, 30, 90, streamed.program.traced.shape[1])
    assert error(by_bands(stream, edges), whole(model, image, streamed.stride)) < 1e-12


def test_a_band_reads_its_own_rows_and_their_surroundings_alone() -> None:
    seen: list[tuple[int, int]] = []

    class Watched:
        shape = (3, 400, 8)

        def __getitem__(self, key: tuple[slice, slice]) -> Tensor:
            seen.append((key[1].start, key[1].stop))
            return torch.zeros(3, key[1].stop - key[1].start, 8)

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 5, padding=2))
    stream = BandedStream(StreamedModel(model, (3, 400, 8), rows=16), Watched())
    assert sum(y.shape[-2] for _, y in stream.rows((200, 240), [])) == 40
    assert (min(a for a, _ in seen), max(b for _, b in seen)) == (197, 243)
    assert all(b == c for (_, b), (c, _) in pairwise(seen))


def test_one_cut_gives_the_same_bytes_each_time() -> None:
    torch.manual_seed(random.Random(0).randint(0, 99))
    model = RandomNetwork(7).eval()
    image = torch.randn(3, 50, 21)
    streamed = StreamedModel(model, (3, 50, 21), rows=8)
    end = streamed.program.traced.shape[1]
    one, two = (by_bands(BandedStream(streamed, image), (0, 13, 40, end)) for _ in range(2))
    assert torch.equal(one, two)
