"""What a head takes is known before it exists; what the machine lacks is refused with what would fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bigvision import hardware
from heads import SGD, Adam, RowwiseAdagrad, ShardedMarginHead, forecast, sampled
from heads.forecast import HeadPlan

C, D = 1000, 64
RULES = [SGD(0.1), SGD(0.1, 0.9), SGD(0.1, 0.9, inactive="dense"), RowwiseAdagrad(0.1), Adam(0.1), None]


def held(head: ShardedMarginHead) -> int:
    """Bytes of the columns that a head has made."""
    shard = head.shard
    columns = [shard.store.whole(name) for name in shard.store.names]
    columns += [shard.inverse_norm, *shard.narrow.values()]
    columns += [] if shard.last_step is None else [shard.last_step]
    return sum(column.numel() * column.element_size() for column in columns)


@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_the_forecast_is_what_is_then_made(rule: Any, storage: str) -> None:
    active = sampled(0.5) if rule is not None and rule.dense else None
    head = ShardedMarginHead(C, D, optimizer=rule, storage=storage, active=active)
    gradient = head.weight.numel() * head.weight.element_size() if head.weight is not None else 0
    assert HeadPlan(C, D, storage, rule).memory().device == held(head) + gradient


def test_other_places_take_other_memory(tmp_path: Path) -> None:
    rule = SGD(0.1, 0.9)
    device = HeadPlan(C, D, "float32", rule).memory()
    host = HeadPlan(C, D, "float32", rule, "host", host_cache=100).memory()
    files = HeadPlan(C, D, "float32", rule, tmp_path).memory()
    wide, narrow = 2 * C * D * 4, C * 4
    assert (device.device, device.host, device.disk) == (wide + narrow, 0, 0)
    assert (host.device, host.host, host.disk) == (2 * 100 * D * 4 + narrow, wide + 8 * C, 0)
    assert (files.device, files.host, files.disk) == (narrow, 0, wide)
    ShardedMarginHead(C, D, optimizer=rule, place=tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == wide
    assert HeadPlan(C, D, "float32", rule, ranks=3).memory().device == 334 * (2 * D * 4 + 4)


def test_the_head_of_the_front_page_is_refused_where_it_would_be_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forecast, "free_memory", lambda device="cpu": 14 * 10**9)
    with pytest.raises(ValueError, match="placing the centres") as told:
        ShardedMarginHead(10_000_000, 512, storage="bfloat16", optimizer=SGD(0.1, 0.9))
    assert str(told.value) == (
        "placing the centres: the head would take 20.5 GB of memory (10,000,000 classes x 512 in bfloat16 "
        "with momentum), and 14.0 GB are free; what would fit: optimizer=RowwiseAdagrad(lr) (10.3 GB); "
        "place=FOLDER on a disk with 20.5 GB free; 2 ranks on 2 times as many such machines"
    )


@pytest.mark.parametrize("free", [500_000, 300_000, 200_000, 100_000, 5_000])
@pytest.mark.parametrize("rule", [SGD(0.1, 0.9), Adam(0.1), None])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_every_advice_works_when_it_is_followed(
    free: int, rule: Any, storage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forecast, "free_memory", lambda device="cpu": free)
    made: dict[str, Any] = {"storage": storage, "optimizer": rule}
    try:
        head = ShardedMarginHead(C, D, **made)
    except ValueError as error:
        text = str(error)
    else:
        assert held(head) <= free
        return
    advice = re.search(r"what would fit: (.*)", text)
    assert advice is not None
    *settings, ranks = advice[1].split("; ")
    for number, one in enumerate(settings):
        changes: dict[str, Any] = {}
        if "bfloat16" in one:
            changes["storage"] = "bfloat16"
        if "Adagrad" in one:
            changes["optimizer"] = RowwiseAdagrad(0.1)
        if "SGD" in one:
            changes["optimizer"] = SGD(0.1)
        if "FOLDER" in one:
            changes["place"] = tmp_path / str(number)
        assert changes
        ShardedMarginHead(C, D, **(made | changes))
    count = int(ranks.split()[0])
    assert HeadPlan(C, D, storage, rule, ranks=count).memory().device <= free
    assert HeadPlan(C, D, storage, rule, ranks=count - 1).memory().device > free


def test_a_gpu_s_memory_and_the_host_s_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = HeadPlan(10_000_000, 512, "bfloat16", SGD(0.1, 0.9))
    gpu = torch.device("cuda", 0)
    room = forecast._Room(gpu, 1, 4, 16 * 10**9, 100 * 10**9)
    assert not room.fits(plan)
    assert "of cuda:0 (10,000,000" in room.refusal(plan)
    assert 'place="host" (' in room.refusal(
        plan
    ) and "2 ranks on 2 times as many such devices" in room.refusal(plan)
    hosted = HeadPlan(10_000_000, 512, "bfloat16", SGD(0.1, 0.9), "host")
    assert room.fits(hosted)
    crowded = forecast._Room(gpu, 1, 8, 16 * 10**9, 100 * 10**9)  # each of eight has its own in one memory
    assert not crowded.fits(hosted) and "the heads of 8 ranks here would take 164" in crowded.refusal(hosted)


def test_a_container_s_limit_is_the_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are only cached don't count as used; the narrowest limit on the way down does."""
    for place, limit, used in (("", "max", 9), ("pod", "5000", 3000), ("pod/job", "4000", 3900)):
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    names = ("memory.max", "memory.current", "inactive_file")
    assert list(hardware._room(tmp_path, "/pod/job", *names)) == [3000, 1100]
    assert list(hardware._room(tmp_path, "/../elsewhere", *names)) == []
    assert 0 < hardware.free_memory() < 1 << 50
