"""Losses as sums over pixels: against torch's own, against formulas, and in any split of the pixels."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bigvision.streaming.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    Focal,
    Loss,
    SquaredError,
)

WEIGHT = torch.tensor([1.0, 3.0, 0.5])


def scene(seed: int = 0, height: int = 7, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    return y, labels


def test_cross_entropy_is_torchs_own() -> None:
    y, labels = scene()
    expected = F.cross_entropy(y, labels, WEIGHT.double(), ignore_index=255)
    torch.testing.assert_close(CrossEntropy(WEIGHT, ignore_index=255)(y, labels), expected)


def test_focal_of_gamma_0_is_cross_entropy_and_of_2_follows_the_paper() -> None:
    y, labels = scene()
    torch.testing.assert_close(
        Focal(0.0, ignore_index=255)(y, labels), F.cross_entropy(y, labels, ignore_index=255)
    )
    known = labels[0] != 255
    p = y.softmax(1)[0, :, known].gather(0, labels[0, known][None])[0]
    torch.testing.assert_close(Focal(2.0, ignore_index=255)(y, labels), (-((1 - p) ** 2) * p.log()).mean())


def test_dice_by_a_loop_over_classes() -> None:
    y, labels = scene()
    p, known = y.softmax(1)[0], labels[0] != 255
    scores = []
    for k in range(3):
        truth = (labels[0] == k) & known
        scores.append((2 * p[k][truth].sum() + 1) / (p[k][known].sum() + truth.sum() + 1))
    torch.testing.assert_close(Dice(ignore_index=255)(y, labels), 1 - torch.stack(scores).mean())
    expected = 1 - (torch.stack(scores) * WEIGHT).sum() / WEIGHT.sum()
    torch.testing.assert_close(Dice(WEIGHT, ignore_index=255)(y, labels), expected)


def test_binary_cross_entropy_leaves_out_what_is_unlabelled() -> None:
    y, _ = scene()
    truth = torch.rand(y.shape, dtype=torch.float64).round()
    expected = F.binary_cross_entropy_with_logits(y, truth, pos_weight=WEIGHT.double()[:, None, None])
    torch.testing.assert_close(BinaryCrossEntropy(WEIGHT)(y, truth), expected)
    holes = truth.clone()
    holes[:, 1] = torch.nan
    kept = [0, 2]
    expected = F.binary_cross_entropy_with_logits(y[:, kept], truth[:, kept])
    torch.testing.assert_close(BinaryCrossEntropy()(y, holes), expected)
    labels = truth[:, 0].long()
    labels[0, 0] = 9
    expected = F.binary_cross_entropy_with_logits(y[:, 0, 1:], truth[:, 0, 1:])
    torch.testing.assert_close(BinaryCrossEntropy(ignore_index=9)(y[:, :1], labels), expected)


def test_squared_error() -> None:
    y, _ = scene()
    target = torch.randn(y.shape, dtype=torch.float64)
    torch.testing.assert_close(SquaredError()(y, target), F.mse_loss(y, target))


LOSSES = [
    CrossEntropy(WEIGHT, ignore_index=255),
    Dice(ignore_index=255),
    Focal(WEIGHT.numel(), WEIGHT, ignore_index=255),
    CrossEntropy(ignore_index=255) + 0.5 * Dice(ignore_index=255) + 2 * Focal(ignore_index=255),
]


@given(
    which=st.integers(0, len(LOSSES) - 1),
    cuts=st.lists(st.integers(0, 7), max_size=3),
    seed=st.integers(0, 99),
)
def test_any_split_of_the_rows_gives_the_same_sums(which: int, cuts: list[int], seed: int) -> None:
    loss, (y, labels) = LOSSES[which], scene(seed)
    edges = sorted({0, 7, *cuts})
    parts = [loss.sums(y[:, :, a:b], labels[:, a:b]) for a, b in itertools.pairwise(edges)]
    total = parts[0]
    for part in parts[1:]:
        total = pytree.tree_map(torch.add, total, part)
    whole = loss(y, labels)
    torch.testing.assert_close(loss.value(total), whole)
    torch.testing.assert_close(torch.autograd.grad(loss.value(total), y)[0], torch.autograd.grad(whole, y)[0])


@pytest.mark.parametrize("loss", [CrossEntropy(ignore_index=255), Focal(ignore_index=255)])
def test_no_labelled_pixel_is_no_loss(loss: Loss) -> None:
    y, labels = scene()
    value = loss(y, torch.full_like(labels, 255))
    (gradient,) = torch.autograd.grad(value, y)
    assert value == 0
    assert not gradient.any()


def test_narrow_outputs_are_summed_in_float64() -> None:
    y, labels = scene()
    sums = CrossEntropy(ignore_index=255).sums(y.detach().bfloat16(), labels)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums[1], (labels != 255).sum().double())


def test_labels_the_network_does_not_have_are_named() -> None:
    y, labels = scene()
    labels[0, 0, 0] = 7
    for loss in (CrossEntropy(ignore_index=255), Dice(ignore_index=255), Focal(ignore_index=255)):
        with pytest.raises(ValueError, match=r"labels \[7\]: the network has classes 0..2"):
            loss(y, labels)


def test_targets_of_another_kind_are_refused() -> None:
    y, labels = scene()
    with pytest.raises(ValueError, match="one class a pixel"):
        CrossEntropy()(y, labels.double())
    with pytest.raises(ValueError, match="must be"):
        SquaredError()(y, y.detach()[:, :2])
