"""The whole CUDA path of a head, walked on an imitated GPU: every tensor is where torch needs it to be."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heads import (
    SGD,
    AdaFace,
    Adam,
    MagFace,
    Margin,
    RowwiseAdagrad,
    ShardedMarginHead,
    add_identities,
    clustered,
    hashed,
    load_head,
    sampled,
    save_head,
)

sys.path.insert(0, str(Path(__file__).parent))
from imitated_gpu import GPU, OnGpu, imitated_gpu, run_backward

C, D = 60, 6
KINDS: dict[str, dict[str, Any]] = {
    "exact": {"optimizer": SGD(0.1, 0.9, 1e-3)},
    "adaface": {"optimizer": SGD(0.1), "margin": AdaFace(momentum=0.5)},
    "magface": {"optimizer": RowwiseAdagrad(0.1), "margin": MagFace(1.0, 12.0)},
    "bfloat16": {"optimizer": Adam(0.01), "storage": "bfloat16"},
    "dense": {
        "optimizer": SGD(0.1, 0.9, 1e-2, "dense"),
        "active": sampled(0.3, unbiased=True),
        "storage": "bfloat16",
    },
    "clustered": {"optimizer": SGD(0.1), "active": clustered(7, 1, epsilon=0.2, refresh=2, iterations=2)},
    "hashed": {"optimizer": Adam(0.01), "active": hashed(2, 4)},
    "host": {"optimizer": SGD(0.1, 0.9), "place": "host", "host_cache": 20, "active": sampled(0.3)},
    "folder": {"optimizer": SGD(0.1, 0.9), "place": "folder", "active": sampled(0.3, run=4)},
    "plain": {"optimizer": SGD(0.1), "normalized": False, "scale": 1.0, "margin": Margin()},
    "parameter": {"optimizer": None, "active": clustered(7, 1)},
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("heads.shard.has_fast_bfloat16", lambda device: False)
    monkeypatch.setattr("heads.forecast.free_memory", lambda device="cpu": 1 << 40)
    with imitated_gpu():
        yield


def make(kind: str, folder: Path, device: str, **changes: Any) -> ShardedMarginHead:
    settings = {"margin": Margin(1.0, 0.3, 0.1), "scale": 16.0, "tile": 16} | KINDS[kind] | changes
    if settings.get("place") == "folder":
        settings["place"] = folder / device
    if isinstance(settings["margin"], AdaFace):
        settings["margin"] = AdaFace(momentum=0.5)
    return ShardedMarginHead(C, D, device=device, **settings)


def train(head: ShardedMarginHead, device: str, steps: range) -> list[float]:
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = (4 * torch.randn(7, D, generator=generator)).to(device).requires_grad_()
        y = torch.randint(-1, C, (7,), generator=generator).to(device)
        loss = head(x, y)
        run_backward(loss)
        seen += [loss.item(), float(head.dropped_share(x.detach(), y).sum())]
        if head.weight is not None:
            with torch.no_grad():
                head.weight -= 0.1 * head.weight.grad.to(device)
                head.weight.grad = None
    return seen


def everywhere(head: ShardedMarginHead) -> list[Tensor]:
    shard = head.shard
    return [shard.inverse_norm, *shard.narrow.values(), *head.buffers()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_on_a_gpu_learns_what_one_on_the_cpu_does(kind: str, tmp_path: Path) -> None:
    there, here = make(kind, tmp_path, "cuda"), make(kind, tmp_path, "cpu")
    assert all(isinstance(tensor, OnGpu) for tensor in everywhere(there))
    assert train(there, "cuda", range(4)) == train(here, "cpu", range(4))
    save_head(there, tmp_path / "head")
    again = make(kind, tmp_path / "again", "cuda")
    load_head(again, tmp_path / "head")
    assert again.step == there.step and torch.equal(again.full_centers(), there.full_centers())
    assert all(isinstance(tensor, OnGpu) for tensor in everywhere(again))
    assert train(again, "cuda", range(4, 6)) == train(here, "cpu", range(4, 6))
    assert torch.equal(again.full_centers().cpu(), here.full_centers())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "parameter"])
def test_a_head_that_is_moved_to_the_gpu_goes_on_there(kind: str, tmp_path: Path) -> None:
    moved, here = make(kind, tmp_path / "moved", "cpu"), make(kind, tmp_path, "cpu")
    assert train(moved, "cpu", range(2)) == train(here, "cpu", range(2))
    model = nn.ModuleList([moved]).to("cuda")
    assert model[0] is moved and all(isinstance(tensor, OnGpu) for tensor in everywhere(moved))
    assert train(moved, "cuda", range(2, 5)) == train(here, "cpu", range(2, 5))


@pytest.mark.parametrize("kind", ["exact", "adaface", "clustered", "hashed", "dense"])
def test_identities_join_on_the_gpu(kind: str, tmp_path: Path) -> None:
    head = make(kind, tmp_path, "cuda")
    train(head, "cuda", range(2))
    more = add_identities(head, 3)
    assert isinstance(more.full_centers(), OnGpu)
    assert torch.equal(more.full_centers()[:C], head.full_centers())
    more.load_state_dict(more.state_dict())
    more.set_centers(torch.randn(C + 3, D))
    assert len(train(more, "cuda", range(2))) == 4


def test_the_imitation_refuses_what_torch_refuses() -> None:
    on_gpu, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    assert on_gpu.device == GPU and on_cpu.device.type == "cpu"
    assert isinstance(on_gpu.new_zeros(2), OnGpu) and not isinstance(on_gpu.cpu(), OnGpu)
    assert isinstance(on_gpu + torch.tensor(2.0), OnGpu) and isinstance(on_gpu[torch.tensor([0])], OnGpu)
    for act in (
        lambda: on_gpu + on_cpu,
        lambda: on_cpu[on_gpu.long()],
        lambda: on_gpu.index_copy_(0, torch.tensor([1]), on_gpu[:1]),
        lambda: torch.where(on_gpu > 0, on_cpu, 0.0),
    ):
        with pytest.raises(RuntimeError, match="device"):
            act()


def test_features_on_another_device_are_refused_by_name(tmp_path: Path) -> None:
    head = make("exact", tmp_path, "cuda")
    with pytest.raises(
        ValueError, match="rank 0: features and labels must be on cuda, where the head works, got cpu and cpu"
    ):
        head(torch.randn(3, D), torch.arange(3))
