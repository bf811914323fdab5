"""Checkpoints in one process; those of several ranks are in test_exchange.py."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bigvision.gating import BiasBalancer, Gate, LinearScorer, TopK, load_experts, save_experts


def make(num_experts: int, seed: int) -> tuple[Gate, list[nn.Module]]:
    torch.manual_seed(seed)
    gate = Gate(LinearScorer(3, num_experts), TopK(1), balancer=BiasBalancer(num_experts))
    # Batch norm has an integer buffer besides its parameters.
    return gate, [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(num_experts)]


def test_a_round_trip_restores_every_tensor(tmp_path: Path) -> None:
    gate, experts = make(3, 0)
    gate.observe(gate(torch.randn(8, 3)))
    gate.advance()
    save_experts(tmp_path / "a", experts, 3, shared=gate)
    other_gate, others = make(3, 1)
    load_experts(tmp_path / "a", others, 3, shared=other_gate)
    assert other_gate.step == 1
    for mine, theirs in zip((gate, *experts), (other_gate, *others), strict=True):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # nothing half-written stays


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    _, experts = make(2, 0)
    save_experts(tmp_path / "a", experts, 2)
    with pytest.raises(FileExistsError, match="exists already"):
        save_experts(tmp_path / "a", experts, 2)


def test_an_attempt_that_did_not_finish_leaves_no_trace(tmp_path: Path) -> None:
    _, experts = make(2, 0)
    stale = tmp_path / "a.partial"
    stale.mkdir()
    (stale / "rank-00003-of-00004.safetensors").write_bytes(b"half")
    assert not (tmp_path / "a").exists()
    save_experts(tmp_path / "a", experts, 2)
    load_experts(tmp_path / "a", experts, 2)


def test_what_does_not_fit_is_refused_with_names(tmp_path: Path) -> None:
    gate, experts = make(3, 0)
    save_experts(tmp_path / "a", experts, 3, shared=gate)
    with pytest.raises(ValueError, match="holds 3 experts, asked for 2"):
        load_experts(tmp_path / "a", experts[:2], 2)
    with pytest.raises(ValueError, match="holds 3 experts, asked for 4"):
        load_experts(tmp_path / "a", [*experts, experts[0]], 4)
    with pytest.raises(ValueError, match=r"experts range\(0, 3\), got 2 modules"):
        load_experts(tmp_path / "a", experts[:2], 3)
    with pytest.raises(ValueError, match=r"experts\.0\.\*: missing \['weight'\], unexpected \['0\.bias'"):
        load_experts(tmp_path / "a", [nn.PReLU() for _ in range(3)], 3)
    wide = [nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)) for _ in range(3)]
    with pytest.raises(ValueError, match=r"experts\.0\.0\.weight is \[2, 3\], expected \[2, 4\]"):
        load_experts(tmp_path / "a", wide, 3)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_experts(tmp_path / "b", experts, 3)
