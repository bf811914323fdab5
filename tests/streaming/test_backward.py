"""Streamed gradients equal whole-image autograd: random networks, real ones, every budget, and bad input."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_oracle import RandomNetwork, compare
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bigvision.streaming import Budget, BudgetError, NonFiniteError, Scratch, StreamedModel
from bigvision.streaming.batch_norm import scene_statistics, update_running_statistics
from bigvision.streaming.footprint import step_bytes
from bigvision.streaming.forecast import plan_backward
from bigvision.streaming.losses import BinaryCrossEntropy, CrossEntropy, Dice, Focal, Loss

LOSSES = [
    CrossEntropy(torch.tensor([1.0, 2.0, 0.5]), ignore_index=255),
    CrossEntropy(ignore_index=255) + 0.5 * Dice(ignore_index=255),
    Focal(ignore_index=255),
]


def labels(height: int, width: int, classes: int = 3) -> Tensor:
    drawn = torch.randint(0, classes, (height, width))
    drawn[torch.rand(height, width) < 0.2] = 255
    return drawn


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(9, 40),
    width=st.integers(9, 24),
    rows=st.sampled_from([1, 2, 3, 5, 8, 64]),
    loss=st.sampled_from(LOSSES),
)
def test_random_networks(seed: int, height: int, width: int, rows: int, loss: Loss) -> None:
    torch.manual_seed(seed)
    target = labels(height, width)
    mask = torch.rand(height, width) < 0.8 if seed % 2 else None
    found = compare(RandomNetwork(seed), (3, height, width), loss, target, rows=rows, mask=mask)
    assert found.gradient < 1e-9
    assert found.loss < 1e-10


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (7, 9), (40, 31)])
def test_a_classifier_that_flattens_a_small_map(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((7, 5)), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(140, 3))
    found = compare(model, (3, *size), CrossEntropy(), torch.tensor([1]), rows=2)
    assert found.gradient < 1e-9
    assert found.loss < 1e-10


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, bias=False),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(6, 3, 1),
    )


@pytest.mark.parametrize(("in_memory", "on_disk"), [(0, 0), (1, 0), (0, 2), (2, 3), (30, 30)])
def test_every_checkpoint_spacing_gives_the_same_gradient(
    in_memory: int, on_disk: int, tmp_path: Path
) -> None:
    shape = (3, 41, 17)
    program = StreamedModel(small_network().double(), shape, dtype=torch.float64).program
    needs = [step_bytes(program, walk, 2, torch.float64) for walk in program.passes]
    state = max(one.state for one in needs)
    budget = Budget(
        2,
        max(one.working for one in needs) + in_memory * state,
        Scratch(tmp_path / "scratch", on_disk * state) if on_disk else None,
    )
    found = compare(small_network(), shape, LOSSES[0], labels(41, 17), rows=None, budget=budget)
    assert found.gradient < 1e-9
    plan = found.result.plans[-1]
    assert plan.in_memory >= min(in_memory, plan.steps - 1)
    assert (plan.recomputed == 0) == (in_memory == 30)
    assert plan.on_disk == (0 if in_memory == 30 else on_disk)
    assert not list(tmp_path.glob("scratch/*")), "spilled states stay behind"


def test_gradients_accumulate_and_the_result_counts() -> None:
    model, shape = small_network(), (3, 20, 12)
    streamed = StreamedModel(model, shape)
    image, target = torch.randn(shape), labels(20, 12)
    first = streamed.backward(image, target, LOSSES[0])
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    streamed.backward(image, target, LOSSES[0])
    for before, parameter in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * before)
    assert first.pixels == 240
    y = streamed(image)[0].argmax(0)
    known = target != 255
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for truth, answer in zip(target[known].tolist(), y[known].tolist(), strict=True):
        expected[truth, answer] += 1
    assert first.confusion is not None
    assert torch.equal(first.confusion, expected)


def test_frozen_parameters_get_no_gradient_and_the_others_the_same() -> None:
    shape, target = (3, 20, 12), labels(20, 12)
    image = torch.randn(shape)
    free, frozen = small_network(), small_network()
    frozen[0].requires_grad_(False)
    for model in (free, frozen):
        StreamedModel(model, shape).backward(image, target, LOSSES[0])
    assert frozen[0].weight.grad is None
    torch.testing.assert_close(frozen[3].weight.grad, free[3].weight.grad)
    torch.testing.assert_close(frozen[1].weight.grad, free[1].weight.grad)


def test_bfloat16_gradients_reach_float32_parameters() -> None:
    shape, target = (3, 40, 24), labels(40, 24)
    image, model = torch.randn(shape), small_network()
    StreamedModel(model, shape).backward(image, target, LOSSES[0])
    exact = [p.grad for p in model.parameters()]
    model.zero_grad()
    StreamedModel(model, shape, dtype=torch.bfloat16).backward(image, target, LOSSES[0])
    for expected, parameter in zip(exact, model.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), expected.flatten(), 0) > 0.99


class Classifier(nn.Module):
    """Image-level answers, behind two statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3))
        self.tail = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.tail(torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1))


@pytest.mark.parametrize(
    ("loss", "target"),
    [(CrossEntropy(), torch.tensor([2])), (BinaryCrossEntropy(), torch.tensor([[0.0, 1.0, 1.0, 0.0]]))],
)
def test_image_level_losses(loss: Loss, target: Tensor) -> None:
    torch.manual_seed(1)
    found = compare(Classifier(), (3, 37, 22), loss, target, rows=3)
    assert found.gradient < 1e-9
    assert found.loss < 1e-12


class Ties(nn.Module):
    """Equal extremes: of amax all of them share the gradient, of max pooling the first takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardtanh(self.first(x), -0.1, 10.0) + self.first.weight[None, :, 0]
        return self.last(y * y.amin((2, 3), keepdim=True) + F.adaptive_max_pool2d(-y, 1))


def test_equal_extremes_share_the_gradient_as_aten_has_it() -> None:
    torch.manual_seed(2)
    image = torch.randint(-2, 2, (3, 17, 9)).double()
    found = compare(Ties(), (3, 17, 9), LOSSES[0], labels(17, 9), rows=4, image=image)
    assert found.gradient < 1e-9


def test_arrays_of_any_kind_are_scenes_and_labels() -> None:
    shape = (3, 20, 12)
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint16)
    target = np.random.default_rng(1).integers(0, 3, (20, 12)).astype(np.uint8)
    model = small_network()
    one = StreamedModel(model, shape).backward(image, target, LOSSES[0])
    two = StreamedModel(model, shape).backward(
        torch.from_numpy(image.astype(np.float32)), torch.from_numpy(target), LOSSES[0]
    )
    assert one.loss == two.loss


def test_a_user_can_add_a_loss() -> None:
    class Tversky(Loss):
        def sums(self, y: Tensor, target: Tensor) -> Tensor:
            p, truth = y.sigmoid()[:, 0].double(), (target == 1).double()
            return torch.stack([(p * truth).sum(), p.sum(), truth.sum()])

        def value(self, sums: Tensor) -> Tensor:
            overlap, found, true = sums
            return 1 - overlap / (0.3 * found + 0.7 * true)

    assert compare(small_network(), (3, 26, 11), Tversky(), labels(26, 11), rows=2).gradient < 1e-9


# --- what must fail, and how


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_names_its_rows_and_leaves_the_gradients(value: float) -> None:
    model, shape = small_network(), (3, 60, 12)
    streamed = StreamedModel(model, shape)
    image, target = torch.randn(shape), labels(60, 12)
    streamed.backward(image, target, LOSSES[0])
    before = gradients(model)
    image[1, 40] = value
    with pytest.raises(NonFiniteError, match=r"the loss of output rows \d+\.\.\d+"):
        streamed.backward(image, target, CrossEntropy(ignore_index=255), budget=Budget(rows=4))
    for old, new in zip(before, gradients(model), strict=True):
        assert torch.equal(old, new)


def test_a_gradient_that_is_not_finite_names_step_and_rows() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) ** 2).sqrt()  # 0/0 in the gradient where the image is 0

    image = torch.randn(3, 40, 8)
    image[:, 21] = 0
    model = Root()
    with pytest.raises(NonFiniteError, match=r"conv.* step 2 of 5, image rows 16\.\.24"):
        StreamedModel(model, (3, 40, 8)).backward(image, labels(40, 8), LOSSES[0], budget=Budget(rows=8))
    assert model.conv.weight.grad is None


def test_outputs_below_the_image_s_resolution_are_refused() -> None:
    model = nn.Conv2d(3, 3, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match="upsample inside the network"):
        StreamedModel(model, (3, 16, 16)).backward(torch.zeros(3, 16, 16), labels(8, 8), LOSSES[0])


def test_targets_and_masks_of_another_size_are_refused_before_any_work() -> None:
    streamed = StreamedModel(small_network(), (3, 16, 12))
    image = torch.zeros(3, 16, 12)
    with pytest.raises(ValueError, match=r"the target is \(16, 11\)"):
        streamed.backward(image, labels(16, 11), LOSSES[0])
    with pytest.raises(ValueError, match=r"the mask is \(4, 12\)"):
        streamed.backward(image, labels(16, 12), LOSSES[0], mask=torch.ones(4, 12))
    with pytest.raises(ValueError, match=r"the source is \(3, 15, 12\)"):
        streamed.backward(image[:, 1:], labels(16, 12), LOSSES[0])
    with pytest.raises(ValueError, match="the mask leaves no pixel"):
        streamed.backward(image, labels(16, 12), LOSSES[0], mask=torch.zeros(16, 12))


def test_unknown_labels_are_named() -> None:
    streamed, target = StreamedModel(small_network(), (3, 16, 12)), labels(16, 12)
    target[9, 3] = 11
    with pytest.raises(ValueError, match=r"labels \[11\]"):
        streamed.backward(torch.zeros(3, 16, 12), target, LOSSES[0])


def test_a_source_that_fails_names_its_rows() -> None:
    class Broken:
        shape = (3, 16, 12)

        def __getitem__(self, key: tuple[slice, slice]) -> Tensor:
            if key[1].start >= 8:
                raise OSError("the disk went away")
            return torch.zeros(3, key[1].stop - key[1].start, 12)

    with pytest.raises(RuntimeError, match=r"rows 8\.\.12 of the source failed: the disk went away"):
        StreamedModel(small_network(), (3, 16, 12)).backward(
            Broken(), labels(16, 12), LOSSES[0], budget=Budget(rows=4)
        )


def test_a_budget_too_small_says_the_least() -> None:
    streamed = StreamedModel(small_network(), (3, 64, 32))
    with pytest.raises(BudgetError, match="with 1 row a step it takes") as error:
        plan_backward(streamed.program, torch.float32, Budget(memory=1000))
    assert "MiB" in str(error.value)


PEAK = """
    import resource, sys, torch
    from torch import nn
    from bigvision.streaming import Budget, StreamedModel
    from bigvision.streaming.losses import CrossEntropy
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    body = [nn.Conv2d(3, 16, 3, padding=1), block(), block(), block(), block()]
    model = nn.Sequential(*body, nn.Conv2d(16, 2, 1))
    height = int(sys.argv[1])
    class Scene:
        shape = (3, height, 256)
        def __getitem__(self, key):
            return torch.ones(3, key[1].stop - key[1].start, 256)
    class Labels:
        shape = (height, 256)
        def __getitem__(self, key):
            return torch.zeros(key.stop - key.start, 256, dtype=torch.uint8)
    streamed = StreamedModel(model, Scene.shape)
    budget = Budget(rows=16, memory=24 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    streamed.backward(Scene(), Labels(), CrossEntropy(), budget=budget)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_kib(height: int) -> int:
    run = [sys.executable, "-c", textwrap.dedent(PEAK), str(height)]
    return int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=300).stdout)


def test_peak_memory_does_not_grow_with_the_height() -> None:
    low, high = peak_kib(512), peak_kib(2048)
    # Plain autograd would take 16 channels x 4 B x 256 columns x 9 results a row: 300 MB at 2048 rows.
    assert high < low + 24 * 1024
    assert high < 120 * 1024


def test_batch_norm_over_the_scene() -> None:
    torch.manual_seed(3)
    shape = (3, 24, 16)
    streamed, whole = (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 3, 1),
        ).double()
        for _ in range(2)
    )  # fmt: skip
    whole.load_state_dict(streamed.state_dict())
    image, target = torch.randn(shape, dtype=torch.float64), labels(24, 16)
    whole.train()[3].eval()
    LOSSES[1](whole(image[None]), target[None]).backward()
    streamed.train()
    with scene_statistics(streamed):
        stream = StreamedModel(streamed, shape, dtype=torch.float64)
    assert streamed[3].training
    assert streamed[1].track_running_stats
    result = stream.backward(image, target, LOSSES[1], budget=Budget(5))
    update_running_statistics(streamed, result.moments)
    for (name, one), two in zip(streamed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, left), right in zip(streamed.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, msg=name)
