"""`state_dict` holds the whole head, so that `torch.save(model.state_dict())` loses nothing."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heads import SGD, AdaFace, Adam, Margin, RowwiseAdagrad, ShardedMarginHead, clustered, hashed, sampled

C, D = 50, 5
KINDS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": SGD(0.1, 0.9)},
    "dense": {"optimizer": SGD(0.1, 0.9, 1e-2, inactive="dense"), "active": sampled(0.2)},
    "adagrad": {"optimizer": RowwiseAdagrad(0.1), "margin": AdaFace(momentum=0.5)},
    "adam": {"optimizer": Adam(0.01), "storage": "bfloat16", "active": hashed(2, 4)},
    "clustered": {"optimizer": SGD(0.1), "active": clustered(7, 1, refresh=3)},
    "host": {"optimizer": SGD(0.1, 0.9), "place": "host", "host_cache": 20, "active": sampled(0.2)},
    "parameter": {"optimizer": None, "active": sampled(0.2)},
}


def make(**settings: Any) -> ShardedMarginHead:
    defaults = {"margin": Margin(1.0, 0.3, 0.0), "scale": 16.0, "storage": "float64", "tile": 16}
    return ShardedMarginHead(C, D, **deepcopy(defaults | settings))


class Model(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(4, D, dtype=torch.float64)
        self.head = make(**settings)


def train(model: Model, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 4, dtype=torch.float64, generator=generator)
        labels = torch.randint(-1, C, (6,), generator=generator)
        loss = model.head(model.backbone(images), labels)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_what_torch_saves_goes_on_as_if_uninterrupted(kind: str, assign: bool, tmp_path: Path) -> None:
    model = Model(**KINDS[kind])
    train(model, range(4))
    if model.head.optimizer is not None:
        model.head.lr = 0.07
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = Model(**KINDS[kind])
    found = other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), assign=assign)
    assert not found.missing_keys and not found.unexpected_keys
    assert other.head.step == 4
    assert train(other, range(4, 8)) == train(model, range(4, 8))
    assert torch.equal(other.head.full_centers(), model.head.full_centers())


def test_a_place_in_files_too(tmp_path: Path) -> None:
    model = Model(optimizer=SGD(0.1, 0.9), place=tmp_path / "one")
    train(model, range(2))
    other = Model(optimizer=SGD(0.1, 0.9))
    other.load_state_dict(model.state_dict())
    assert train(other, range(2, 4)) == train(model, range(2, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_or_foreign_entry_is_named(kind: str) -> None:
    head = make(**KINDS[kind])
    state = head.state_dict()
    assert state["weight"].shape == (C, D)
    for name in state:
        less = {k: v for k, v in state.items() if k != name}
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
            head.load_state_dict(less)
        assert head.load_state_dict(less, strict=False).missing_keys == [name]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"other", "gate.other"'):
        head.load_state_dict(state | {"other": torch.zeros(1), "gate.other": torch.zeros(1)})


def test_a_state_of_other_sizes_or_kinds_is_refused() -> None:
    adagrad, sgd = make(**KINDS["adagrad"]), make(**KINDS["momentum"])
    with pytest.raises(RuntimeError, match=r'Missing key.*"momentum"'):
        sgd.load_state_dict(adagrad.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\[50, 5\].*\[49, 5\]"):
        ShardedMarginHead(49, D, storage="float64", optimizer=SGD(0.1, 0.9)).load_state_dict(sgd.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        sgd.load_state_dict({})


def test_a_state_is_live_as_every_module_s_is() -> None:
    head = make(**KINDS["momentum"])
    state = head.state_dict()
    kept = deepcopy(state)
    x = torch.randn(3, D, dtype=torch.float64).requires_grad_()
    head(x, torch.arange(3)).backward()
    assert torch.equal(state["weight"], head.full_centers()) and not torch.equal(
        kept["weight"], state["weight"]
    )
    head.load_state_dict(kept)
    assert torch.equal(head.full_centers(), kept["weight"]) and head.step == 0


def test_a_loaded_head_knows_its_norms_and_gate(reference: Any) -> None:
    state = make(optimizer=SGD(0.1), active=clustered(7, 1)).state_dict()
    state["weight"] = torch.randn(C, D, dtype=torch.float64)
    head = make(optimizer=SGD(0.1), active=clustered(7, 1))
    head.load_state_dict(state)
    x, y = torch.randn(3, D, dtype=torch.float64), torch.arange(3)
    found: Tensor = head.eval()(x, y)
    torch.testing.assert_close(found, reference(x, y, state["weight"], (1.0, 0.3, 0.0), 16.0))
    w = nn.functional.normalize(state["weight"])
    angle = torch.arccos((w * head.gate.centroids[head.gate.assignment.long()]).sum(1))
    assert (head.gate.radius[head.gate.assignment.long()] >= angle).all()
