"""Networks, depth and width by image, against slow loops over images."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from routing_networks import told
from torch import Tensor, nn

from bigvision.gating import Gate, LinearScorer, Noise, TopK
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
    with pytest.raises(ValueError, match=r"4 experts, got 2"):
        InstanceRouter(Gate(LinearScorer(4, 4)), [nn.Identity()] * 2)
    with pytest.raises(ValueError, match=r"2 stages and 1 heads"):
        EarlyExit([nn.Identity()] * 2, [nn.Identity()], 0.5)
    with pytest.raises(ValueError, match=r"1\.5"):
        EarlyExit([nn.Identity()], [nn.Identity()], 1.5)
    with pytest.raises(ValueError, match=r"1\.\.6.*\(1, 7\)"):
        WidthRouter(Gate(LinearScorer(4, 2)), SlimBlock(2, 6), (1, 7))
    with pytest.raises(ValueError, match="0"):
        SlimBlock(2, 6)(torch.zeros(1, 2, 3, 3), 0)


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
