"""Networks, depth and width by image, against slow loops over images."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from routing_networks import told
from torch import Tensor, nn
from torch.nn import functional

from bigvision.gating import CosineScorer, Gate, LinearScorer, Noise, TopK
from bigvision.routing.instance import EarlyExit, InstanceRouter, SlimBlock, WidthRouter, image_statistics


def test_each_image_is_the_weighted_sum_of_its_experts() -> None:
    torch.manual_seed(0)
    experts = [nn.Conv2d(2, 3, 3, padding=1) for _ in range(4)]
    router = InstanceRouter(Gate(LinearScorer(4, 4), TopK(2)), experts).eval()
    x = torch.randn(5, 2, 8, 8)
    y, gated = router.run(x)
    for b in range(5):
        expected = sum(
            gated.probs[b, e] * experts[e](x[b : b + 1]) for e in gated.mask[b].nonzero().flatten()
        )
        assert torch.allclose(y[b : b + 1], expected, atol=1e-6)


def test_balance_has_importance_and_load_and_a_gradient() -> None:
    torch.manual_seed(0)
    gate = Gate(LinearScorer(4, 3), TopK(1), noise=Noise("gaussian", 1.0))
    router = InstanceRouter(gate, [nn.Conv2d(2, 1, 1) for _ in range(3)])
    _, gated = router.run(torch.randn(6, 2, 4, 4))
    (slope,) = torch.autograd.grad(router.balance_loss(gated), gate.scorer.weight)
    assert slope.abs().sum() > 0


class Counted(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.seen = factor, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x * self.factor


def test_images_leave_where_a_head_is_sure_and_later_stages_see_the_rest_only() -> None:
    stages = [Counted(1.0), Counted(2.0), Counted(2.0)]
    network = EarlyExit(stages, [nn.Identity()] * 3, 0.9).eval()
    x = torch.tensor([[9.0, 0.0], [2.0, 0.0], [0.0, 0.1]])
    logits, depth = network.exits(x)
    assert depth.tolist() == [0, 1, 2] and [stage.seen for stage in stages] == [3, 2, 1]
    every = network(x)
    assert torch.equal(logits, torch.stack([every[d][b] for b, d in enumerate(depth.tolist())]))
    assert network.exits(x[:0])[0].shape == (0, 2)


def easy_and_hard(images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 2, 4, 4], classes, and whether one channel tells them (else two signs must agree)."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(images, 2, generator=generator)
    easy = torch.rand(images, generator=generator) < 0.6
    centre[easy, 0] = 4 * centre[easy, 0].sign()
    label = torch.where(easy, centre[:, 0] > 0, centre.prod(1) > 0)
    noise = torch.randn(images, 2, 4, 4, generator=generator)
    return centre[..., None, None] + 0.1 * noise, label.long(), easy


def rows_entering(modules: Sequence[nn.Module]) -> list[int]:
    """Rows that enter each module from now on, counted as they come."""
    rows = [0] * len(modules)

    def count(number: int, inputs: tuple[Tensor, ...]) -> None:
        rows[number] += len(inputs[0])

    for number, module in enumerate(modules):
        module.register_forward_pre_hook(lambda _, inputs, number=number: count(number, inputs))
    return rows


def test_early_exits_learn_end_to_end_and_then_skip_what_is_easy() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Conv2d(2, 24, 1), nn.Tanh(), nn.Conv2d(24, 24, 1), nn.Tanh())
    stages: list[nn.Module] = [nn.Conv2d(2, 2, 1), deep]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 2)) for c in (2, 24)]
    network = EarlyExit(stages, heads, 0.9)
    optimizer = torch.optim.Adam(network.parameters(), 0.03)
    x, label, _ = easy_and_hard(256, seed=1)
    losses = []
    for _ in range(150):
        loss = sum(functional.cross_entropy(logits, label) for logits in network(x))
        optimizer.zero_grad()
        loss.backward()
        # The heads decide who leaves: each learns, and so does all before it.
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    x, label, easy = easy_and_hard(400, seed=2)
    network.eval()
    rows = rows_entering(stages)
    logits, depth = network.exits(x)
    # The second stage sees the images that stayed and no other: nearly all hard ones, few easy ones.
    assert rows == [400, int((depth == 1).sum())]
    assert (depth[easy] == 0).float().mean() > 0.9 and (depth[~easy] == 1).float().mean() > 0.7
    right = (logits.argmax(1) == label).float()
    alone = (network(x)[0].argmax(1) == label).float()
    assert right.mean() > 0.9 > alone.mean()


def test_only_the_images_of_an_expert_enter_it() -> None:
    experts = [nn.Conv2d(2, 3, 3, padding=1) for _ in range(4)]
    rows = rows_entering(experts)
    router = InstanceRouter(told(torch.tensor([3, 0, 3, 3, 0]), 4), experts)
    x = torch.randn(5, 2, 8, 8)
    with torch.no_grad():
        router(x)
    assert rows == [2, 0, 0, 3]
    router(x).sum().backward()
    assert rows == [4, 0, 0, 6]
    assert experts[1].weight.grad is None and experts[3].weight.grad is not None


def test_only_the_selected_channels_of_an_image_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[tuple[int, ...]] = []
    original = functional.conv2d

    def counted(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        worked.append((len(x), *weight.shape[:2]))
        return original(x, weight, *args, **kwargs)

    router = WidthRouter(told(torch.tensor([2, 0, 0, 2, 0]), 3), SlimBlock(2, 8), (1, 3, 8))
    x = torch.randn(5, 2, 6, 6)
    monkeypatch.setattr(functional, "conv2d", counted)
    router(x)
    # (images, channels out, channels in): three images through 1 channel, none through 3, two through 8.
    assert worked == [(3, 1, 2), (3, 2, 1), (2, 8, 2), (2, 2, 8)]


def test_widths_share_one_block() -> None:
    torch.manual_seed(0)
    block = SlimBlock(2, 6)
    x = torch.randn(4, 2, 5, 5)
    widths = torch.tensor([0, 2, 1, 0])
    y = WidthRouter(told(widths, 3), block, (1, 3, 6))(x)
    for b, width in enumerate(widths.tolist()):
        assert torch.allclose(y[b : b + 1], block(x[b : b + 1], (1, 3, 6)[width]), atol=1e-6)
    assert torch.equal(block(x), block(x, 6))
    y.sum().backward()
    assert block.into.weight.grad is not None
    assert image_statistics(x).shape == (4, 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 experts, the images have .* 2 experts"):
        InstanceRouter(Gate(LinearScorer(4, 4)), [nn.Identity()] * 2)
    with pytest.raises(ValueError, match=r"2 stages and 1 heads"):
        EarlyExit([nn.Identity()] * 2, [nn.Identity()], 0.5)
    with pytest.raises(ValueError, match=r"1\.5"):
        EarlyExit([nn.Identity()], [nn.Identity()], 1.5)
    with pytest.raises(ValueError, match=r"1\.\.6.*\(1, 7\)"):
        WidthRouter(Gate(LinearScorer(4, 2)), SlimBlock(2, 6), (1, 7))
    with pytest.raises(ValueError, match=r"for 6 features and 2 experts.*have 4 features"):
        WidthRouter(Gate(LinearScorer(6, 2)), SlimBlock(2, 6), (1, 6))
    with pytest.raises(ValueError, match=r"4 features and 3 experts.*2 experts \(1, 6\)"):
        WidthRouter(Gate(CosineScorer(4, 3)), SlimBlock(2, 6), (1, 6))
    with pytest.raises(ValueError, match=r"\[B, 2, H, W\], got \[1, 3, 4, 4\]"):
        WidthRouter(Gate(LinearScorer(4, 2)), SlimBlock(2, 6), (1, 6))(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="none"):
        InstanceRouter(Gate(LinearScorer(4, 2)), [])
    with pytest.raises(ValueError, match="0"):
        SlimBlock(2, 6)(torch.zeros(1, 2, 3, 3), 0)


class Noted(nn.Module):
    """A convolution that notes what it saw, normalises with a memory and caches a tensor of its own."""

    def __init__(self, channels: int, classes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, 3, stride, padding=1)
        self.norm = nn.BatchNorm2d(classes)
        self.seen: list[int] = []
        self.ramp: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        ramp = self.ramp.setdefault(x.shape[-1], torch.arange(float(x.shape[-1])))
        return self.norm(self.conv(x * ramp))


class ByValue(nn.Module):
    """What it returns depends on the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.mean()) > 0 else -x


@pytest.mark.parametrize(
    ("gate", "experts", "words"),
    [
        (Gate(LinearScorer(4, 2)), [Noted(2, 3), Noted(2, 5)], ["expert 0", "[3, 6, 6]", "1", "[5, 6, 6]"]),
        (Gate(LinearScorer(4, 2)), [Noted(2, 3), Noted(2, 3, 2)], ["[3, 6, 6]", "[3, 3, 3]"]),
        (Gate(LinearScorer(4, 2)), [Noted(2, 3), Noted(2, 3).double()], ["expert 1", "[2, 6, 6]", "type"]),
        (Gate(LinearScorer(4, 2)), [Noted(2, 3), Noted(4, 3)], ["expert 1", "[2, 6, 6]", "4 channels"]),
        (Gate(LinearScorer(6, 2)), [Noted(2, 3), Noted(2, 3)], ["6 features", "[2, 6, 6] have 4"]),
        (Gate(CosineScorer(10, 2)), [Noted(2, 3), Noted(2, 3)], ["10 features", "[2, 6, 6] have 4"]),
    ],
)
def test_experts_and_gates_that_do_not_fit_are_refused_before_any_expert_runs(
    gate: Gate, experts: list[Noted], words: list[str]
) -> None:
    router = InstanceRouter(gate, experts)
    with pytest.raises(ValueError) as refusal:
        router(torch.randn(5, 2, 6, 6))
    assert all(word in str(refusal.value) for word in words), refusal.value
    for expert in experts:
        assert not expert.seen and not expert.ramp and not expert.norm.num_batches_tracked


def test_the_check_leaves_nothing_behind() -> None:
    experts = [Noted(2, 3), Noted(2, 3)]
    router = InstanceRouter(told(torch.tensor([0, 0, 1]), 2), experts)
    rows = rows_entering(experts)
    state = torch.get_rng_state()
    for side in (6, 6, 8, 6):
        assert router(torch.zeros(3, 2, side, side)).shape == (3, 3, side, side)
    assert torch.equal(torch.get_rng_state(), state)
    assert [expert.seen for expert in experts] == [[2] * 4, [1] * 4]
    assert experts[0].norm.num_batches_tracked == 4
    assert all(type(ramp) is Tensor for ramp in experts[0].ramp.values())
    assert rows == [8, 4]  # hooks see true work only


def test_experts_that_only_values_decide_are_compared_when_they_run() -> None:
    router = InstanceRouter(told(torch.tensor([0, 1]), 2), [ByValue(), nn.Conv2d(2, 3, 1)])
    with pytest.raises(ValueError, match=r"expert 1 rows of \[3, 6, 6\], an earlier one \[2, 6, 6\]"):
        router(torch.randn(2, 2, 6, 6))


def test_heads_that_differ_are_refused_before_any_stage_runs() -> None:
    stages: list[nn.Module] = [nn.Linear(2, 4), nn.Linear(4, 4)]
    rows = rows_entering(stages)
    network = EarlyExit(stages, [nn.Linear(4, 2), nn.Linear(4, 3)], 0.5)
    with pytest.raises(ValueError, match=r"head 0 float32 \[2\], head 1 float32 \[3\]"):
        network.exits(torch.randn(3, 2))
    assert rows == [0, 0]


def test_a_compiled_router_is_checked_all_the_same() -> None:
    torch.manual_seed(0)
    gate, x = Gate(LinearScorer(4, 2)), torch.randn(4, 2, 6, 6)
    router = InstanceRouter(gate, [nn.Conv2d(2, 3, 3, padding=1) for _ in range(2)])
    assert torch.allclose(torch.compile(router, backend="eager")(x), router(x), atol=1e-6)
    other = InstanceRouter(gate, [nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)])
    with pytest.raises(ValueError, match=r"\[3, 6, 6\].*\[4, 6, 6\]"):
        torch.compile(other, backend="eager")(x)


class Locked(nn.Module):
    """What can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return x


@pytest.mark.parametrize("expert", [nn.LazyConv2d(2, 1), ByValue(), Locked()])
def test_experts_that_cannot_be_held_against_a_shape_still_run(expert: nn.Module) -> None:
    x = torch.randn(1, 2, 6, 6)
    y = InstanceRouter(told(torch.tensor([0]), 1), [expert])(x)
    assert torch.equal(y, expert(x))


def test_networks_spread_over_ranks_equal_one_process(tmp_path: Path) -> None:
    """Forward, and the gradients of gate and experts, over 1, 2 and 3 ranks of uneven and no images."""
    script = Path(__file__).with_name("ranks_instance.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"ranks still waiting: {process.communicate()[0]}")
    assert process.returncode == 0, output
