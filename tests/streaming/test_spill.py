"""Passes that start from spilled values: the same output for less work, within the bytes, nothing left."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bigvision.streaming import StreamedModel

SHAPE = (3, 40, 24)


class Excited(nn.Module):
    """Convolutions, then channels scaled by their means over the image: a pass each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(16)]
        self.body, self.gate = nn.Sequential(*convs), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), *(Excited(16) for _ in range(3)), nn.Conv2d(16, 2, 1)).double()


def test_less_work_and_the_same_output(network: nn.Module, tmp_path: Path) -> None:
    image = torch.randn(SHAPE, dtype=torch.float64)
    plain = StreamedModel(network, SHAPE, rows=7, dtype=torch.float64)
    spilling = StreamedModel(network, SHAPE, rows=7, dtype=torch.float64, scratch=(tmp_path / "rows", 10**9))
    assert plain.plan.recomputation == pytest.approx(
        2, rel=0.01
    )  # of three blocks: 1/3, 2/3 and 1 before the last
    assert spilling.plan.recomputation < 0.4
    with torch.no_grad():
        torch.testing.assert_close(spilling(image), network(image[None]), rtol=1e-12, atol=1e-12)
    assert not list((tmp_path / "rows").iterdir())


@pytest.mark.parametrize("limit", [0, 300_000, 10**6])
def test_the_limit_is_kept(network: nn.Module, tmp_path: Path, limit: int) -> None:
    held: list[int] = []

    class Watched:
        shape = SHAPE

        def __getitem__(self, key: tuple[slice, slice]) -> Tensor:
            held.append(sum(file.stat().st_size for file in tmp_path.rglob("*.rows")))
            return torch.ones(3, key[1].stop - key[1].start, SHAPE[2], dtype=torch.float64)

    streamed = StreamedModel(network, SHAPE, rows=7, dtype=torch.float64, scratch=(tmp_path, limit))
    streamed(Watched())
    assert max(held) <= streamed.plan.scratch_bytes <= limit
    assert streamed.plan.scratch_bytes or not limit


def test_rows_are_removed_when_the_reader_stops(network: nn.Module, tmp_path: Path) -> None:
    streamed = StreamedModel(network, SHAPE, rows=7, dtype=torch.float64, scratch=(tmp_path, 10**9))
    stream = streamed.stream(torch.zeros(SHAPE, dtype=torch.float64))
    next(stream)  # of the last pass
    assert list(tmp_path.iterdir())
    stream.close()
    assert not list(tmp_path.iterdir())
