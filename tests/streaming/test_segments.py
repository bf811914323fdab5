"""Recomputed submodules: the same gradients and running statistics, fewer bytes, no more work than needed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bigvision.models.small_unet import SmallUnet
from bigvision.streaming import BudgetError, checkpoint_segments

SHAPE = (3, 32, 32)


def network() -> nn.Module:
    torch.manual_seed(0)
    block = [[nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()] for _ in range(4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(nn.Sequential(*one) for one in block))


def saved_bytes(model: nn.Module, image: Tensor) -> int:
    """What autograd keeps of one forward pass, each tensor once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(image)
    del y
    return sum(kept.values())


def test_gradients_and_running_statistics_are_those_without() -> None:
    plain = network().double().train()
    less = copy.deepcopy(plain)
    image = torch.randn(2, *SHAPE, dtype=torch.float64)
    dense = checkpoint_segments(less, 10**9, shape=SHAPE, batch=2)
    assert dense.modules == ()
    assert dense.recomputation == 0
    plan = checkpoint_segments(less, dense.dense_bytes * 2 // 3, shape=SHAPE, batch=2)
    assert plan.modules
    assert plan.peak_bytes <= dense.dense_bytes * 2 // 3
    assert 0 < plan.recomputation < 1
    for model in (plain, less):
        model(image).square().mean().backward()
    for one, two in zip(plain.parameters(), less.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    for one, two in zip(plain.buffers(), less.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_fewer_bytes_are_kept_and_remove_undoes_it() -> None:
    model, image = network().train(), torch.randn(1, *SHAPE)
    before = saved_bytes(model, image)
    plan = checkpoint_segments(
        model, checkpoint_segments(model, 10**9, shape=SHAPE).dense_bytes * 3 // 4, shape=SHAPE
    )
    assert saved_bytes(model, image) < before
    plan.remove()
    assert saved_bytes(model, image) == before


def test_a_tighter_budget_recomputes_no_less() -> None:
    dense = checkpoint_segments(SmallUnet(3, 2), 10**12, shape=SHAPE).dense_bytes
    shares = []
    for part in (1.0, 0.9, 0.8):
        shares.append(checkpoint_segments(SmallUnet(3, 2), int(dense * part), shape=SHAPE).recomputation)
    assert shares == sorted(shares)
    assert shares[0] == 0


def test_a_module_that_runs_twice_is_no_segment() -> None:
    shared = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    model = nn.Sequential(shared, nn.Sigmoid(), shared)
    with pytest.raises(BudgetError):
        checkpoint_segments(model, 4 * SHAPE[0] * 32 * 32 * 4, shape=SHAPE)


def test_what_cannot_be_met_says_the_least() -> None:
    with pytest.raises(BudgetError, match="the least that can is"):
        checkpoint_segments(network(), 1000, shape=SHAPE)
