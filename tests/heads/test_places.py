"""Centres on the device, behind a host cache, in files: the same numbers; and what each place promises."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from heads import SGD, Adam, Margin, RowwiseAdagrad, ShardedMarginHead, sampled
from heads.host_rows import HostRows
from heads.mapped_rows import _runs

C, D = 500, 12


def trained(**settings: Any) -> tuple[list[float], torch.Tensor, ShardedMarginHead]:
    defaults = {
        "storage": "bfloat16",
        "tile": 50,
        "optimizer": SGD(0.5, 0.9, 5e-4),
        "active": sampled(0.2, run=4),
    }
    head = ShardedMarginHead(C, D, Margin(1.0, 0.5, 0.0), 32.0, **(defaults | settings))
    losses = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(10, D, generator=generator).requires_grad_()
        loss = head(x, torch.randint(-1, C, (10,), generator=generator))
        loss.backward()
        losses.append(loss.item())
    return losses, head.full_centers(), head


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"active": None},
        {"optimizer": Adam(0.01), "storage": "float32"},
        {"optimizer": RowwiseAdagrad(0.1)},
        {"optimizer": SGD(0.5, 0.9, 5e-2, inactive="dense"), "storage": "float32"},
    ],
)
def test_every_place_gives_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    losses, centres, _ = trained(**settings)
    for place in ({"place": "host", "host_cache": 80}, {"place": tmp_path / "rows"}):
        found, there, _ = trained(**settings, **place)
        assert found == losses and torch.equal(there, centres)


def test_hot_rows_stay_in_the_cache_and_changed_ones_reach_the_host() -> None:
    store = HostRows(("weight",), (100, 2), torch.float32, torch.device("cpu"), cache_rows=10)
    hot = torch.arange(5)
    store.store(hot, {"weight": torch.ones(5, 2)})
    for cold in range(10, 90, 5):
        store.load(hot, ("weight",))
        store.load(torch.arange(cold, cold + 5), ("weight",))
    assert store.hits == 5 * 16 and store.misses == 5 + 16 * 5
    store.load(torch.arange(90, 100), ("weight",))  # drives the hot rows out
    assert store.whole("weight")[:5].eq(1).all() and store.load(hot, ("weight",))["weight"].eq(1).all()


def test_files_are_laid_out_row_by_row(tmp_path: Path) -> None:
    _, centres, head = trained(place=tmp_path, storage="float32", optimizer=SGD(0.5))
    raw = torch.frombuffer(bytearray((tmp_path / "weight-0-of-1.rows").read_bytes()), dtype=torch.float32)
    assert torch.equal(raw.view(C, D), centres) and len(list(tmp_path.iterdir())) == 1
    assert head.gate.expected(4).diff().eq(1).float().mean() > 0.6  # runs of four


def test_rows_to_prefetch_become_runs() -> None:
    rows = torch.tensor([0, 1, 2, 9, 10, 30])
    assert _runs(rows, 1) == [(0, 3), (9, 11), (30, 31)]
    assert _runs(rows, 7) == [(0, 11), (30, 31)]
    assert _runs(slice(3, 9), 1) == [(3, 9)] and _runs(rows[:0], 1) == []


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank 0: the memory-mapped centres need [\d,]+ bytes in .* free"):
        ShardedMarginHead(2**40, 512, Margin(), place=tmp_path, optimizer=SGD(0.1))
    assert not any(tmp_path.iterdir())


def resident(path: Path) -> int:
    """Bytes of a mapped file in this process's resident set."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = line.endswith(str(path))
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the resident set is Linux's to tell")
@pytest.mark.parametrize("active", [None, sampled(0.3, run=64)])
def test_pages_of_finished_tiles_leave_the_resident_set(active: Any, tmp_path: Path) -> None:
    """A walk over 16 MiB of a column holds a few tiles of 256 KiB, whether it reads or writes them."""
    head = ShardedMarginHead(
        1 << 14,
        256,
        Margin(),
        16.0,
        storage="float32",
        place=tmp_path,
        optimizer=SGD(0.1, 0.9),
        tile=256,
        active=active,
    )
    files = sorted(tmp_path.iterdir())
    assert [path.stat().st_size for path in files] == [1 << 24] * 2

    def held() -> int:
        return sum(resident(path) for path in files)

    assert held() <= 2 << 20, "initialised"
    x, y = torch.randn(4, 256), torch.arange(4)
    loss = head(x.requires_grad_(), y)
    assert held() <= 2 << 20, "read forward"
    loss.backward()
    assert held() <= 2 << 20, "updated backward"
    assert head.full_centers().shape == (1 << 14, 256) and held() <= 2 << 20, "exported"
    head.shard.store.whole("weight").sum()
    assert held() >= 1 << 24  # what is read past the walk is seen here: the measure measures
