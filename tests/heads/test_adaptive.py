"""Margins that depend on the norm: what MagFace's penalty does, and to whom AdaFace's statistics belong."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heads import SGD, AdaFace, MagFace, Margin, ShardedMarginHead, remap_identities


def make(margin: Any, **settings: Any) -> ShardedMarginHead:
    defaults = {"scale": 16.0, "storage": "float64", "optimizer": SGD(0.1), "tile": 8}
    return ShardedMarginHead(29, 5, margin, **(defaults | settings))


def batch(seed: int = 0, length: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = length * torch.randn(8, 5, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(-1, 29, (8,), generator=generator)


def test_magface_adds_its_penalty_of_the_valid_samples_to_the_loss() -> None:
    """L = L_margin + 35 * mean of |x|/110^2 + 1/|x| (Meng et al. 2021, equations 4 and 5)."""
    x, y = batch(length=15.0)
    y[3] = -1
    with_penalty, without = make(MagFace()), make(MagFace(penalty=0.0))
    norms = x.detach().norm(dim=1).clamp(10.0, 110.0)[y >= 0]
    expected = 35.0 * (norms / 110.0**2 + 1.0 / norms).mean()
    found = with_penalty(x, y).detach() - without(x, y).detach()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(with_penalty.margin.regularizer(norms), expected / 35.0)


def test_magface_pulls_easy_features_outwards_and_hard_ones_inwards() -> None:
    """The paper's behaviour: the nearer a feature is to its centre, the larger its optimal norm. Without the
    penalty there is only the pull inwards, where the margin is smaller.
    """
    head = make(MagFace(), optimizer=SGD(0.0), scale=64.0)
    generator = torch.Generator().manual_seed(1)
    head.set_centers(F.normalize(torch.randn(29, 5, dtype=torch.float64, generator=generator)))
    w = head.full_centers()
    y = torch.arange(6)
    away = F.normalize(w[:6] + 0.3 * torch.randn(6, 5, dtype=torch.float64, generator=generator))

    def radial(direction: Tensor, norm: float, margin: MagFace) -> Tensor:
        """d loss / d |x| of each sample."""
        head.margin = margin
        x = (norm * direction).requires_grad_()
        head(x, y).backward()
        return (x.grad * direction).sum(1) * len(y)

    # On its centre the margin still costs something; the penalty outweighs it where 1/|x| is steep.
    assert (radial(-w[:6], 20.0, MagFace()) > 0).all()  # the hardest: shorter is cheaper
    assert (radial(w[:6], 12.0, MagFace(high=0.45)) < 0).all()  # nothing but the penalty: longer is cheaper
    assert (radial(away, 20.0, MagFace(penalty=0.0)) >= 0).all()  # never outwards without it
    # The norm at which both pulls are even falls as the angle to the own centre grows.
    angles = torch.linspace(0.0, 1.5, 6, dtype=torch.float64)[:, None]
    side = F.normalize(away[0] - (away[0] @ w[0]) * w[0], dim=0)
    directions = (torch.cos(angles) * w[0] + torch.sin(angles) * side).repeat_interleave(51, 0)
    lengths = torch.linspace(10.5, 109.5, 51, dtype=torch.float64).repeat(6)[:, None]
    head.margin = MagFace(low=0.0, high=0.5)
    x = (lengths * directions).requires_grad_()
    head(x, torch.zeros(len(x), dtype=torch.int64)).backward()
    outwards = ((x.grad * directions).sum(1) < 0).view(6, 51).sum(1)
    assert outwards[0] > 40 and outwards[-1] < 20 and (outwards.diff() <= 0).all(), outwards


def test_the_gradient_of_any_penalty_reaches_the_features_alone() -> None:
    def pulling(norms: Tensor) -> tuple[Any, ...]:
        return 1.0, 0.3, 0.0, (norms - 7.0) ** 2

    x, y = batch()
    x2 = x.detach().clone().requires_grad_()
    head, plain = make(pulling), make(Margin(1.0, 0.3, 0.0))
    loss = head(x, y)
    (loss * 3).backward()
    valid = y >= 0
    expected = plain(x2, y) + ((x2[valid].norm(dim=1) - 7.0) ** 2).mean()
    (expected * 3).backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(x.grad, x2.grad)
    assert torch.equal(head.full_centers(), plain.full_centers())


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ((1.0, 0.3), r"a margin returns \(m1, m2, m3\) or \(m1, m2, m3, penalty\), got 2 values"),
        ((1.0, torch.zeros(3), 0.0), r"m2 must be a number or \[7\], one a sample, got \[3\]"),
        (
            (1.0, 0.3, 0.0, torch.zeros(8, 1)),
            r"penalty must be a number or \[7\], one a sample, got \[8, 1\]",
        ),
    ],
)
def test_what_is_no_margin_is_refused(returned: tuple[Any, ...], words: str) -> None:
    head, (x, y) = make(lambda norms: returned), batch()
    with pytest.raises(ValueError, match=words):
        head(x, y)


def test_adaface_s_margins_are_the_paper_s() -> None:
    """q = clip((|x| - mean)/std * h, -1, 1); the angular margin is -m q, the additive one m q + m."""
    margin = AdaFace(m=0.4, h=0.5).eval()
    m1, m2, m3 = margin(torch.tensor([60.0, 20.0, 0.0], dtype=torch.float64))
    quality = torch.tensor([40.0, 0.0, -19.999], dtype=torch.float64) / 100.001 * 0.5
    assert m1 == 1.0
    torch.testing.assert_close(m2, -0.4 * quality)
    torch.testing.assert_close(m3, 0.4 * quality + 0.4)
    margin.std.fill_(1.0)
    _, m2, m3 = margin(torch.tensor([60.0, 1.0]))  # clipped
    assert m2.tolist() == pytest.approx([-0.4, 0.4]) and m3.tolist() == pytest.approx([0.8, 0.0])


def test_samples_that_do_not_count_have_no_part_in_statistics_or_margins() -> None:
    """A label of -1 pads a batch: its norm, even 0, drags neither AdaFace's mean nor MagFace's penalty."""
    for margin in (AdaFace(momentum=0.5), MagFace(1.0, 12.0)):
        padded, bare = (
            make(margin),
            make(MagFace(1.0, 12.0) if margin == MagFace(1.0, 12.0) else AdaFace(momentum=0.5)),
        )
        x, y = batch()
        y = torch.where(torch.arange(8) % 3 == 1, -1, y.clamp_min(0))
        x = torch.where((y >= 0)[:, None], x.detach(), 0.0).requires_grad_()
        short = x.detach()[y >= 0].requires_grad_()
        losses = padded(x, y), bare(short, y[y >= 0])
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(x.grad[y >= 0], short.grad)
        assert x.grad[y < 0].eq(0).all()
        if isinstance(margin, AdaFace):
            torch.testing.assert_close(padded.margin.mean, bare.margin.mean)
            torch.testing.assert_close(padded.margin.std, bare.margin.std)


def losses(head: ShardedMarginHead, steps: range) -> list[float]:
    out = []
    for step in steps:
        x, y = batch(step, 4.0 + 8 * step)
        loss = head(x, y)
        loss.backward()
        out.append(loss.item())
    return out


def test_heads_made_from_one_description_have_statistics_of_their_own() -> None:
    first = make(AdaFace(momentum=0.5))
    alone = losses(first, range(3))
    description = first.settings
    second, third = (ShardedMarginHead(**description) for _ in range(2))
    assert losses(second, range(3)) == alone  # from the start, not from where the first has got to
    assert losses(third, range(3)) == alone
    shared = AdaFace(momentum=0.5)
    pair = [make(shared), make(shared)]
    assert losses(pair[0], range(3)) == alone
    assert float(pair[1].margin.mean) == 20.0 and pair[0].margin is shared


def test_a_head_with_other_identities_goes_on_with_the_statistics_it_had() -> None:
    head = make(AdaFace(momentum=0.5))
    losses(head, range(2))
    moved = remap_identities(head, torch.arange(29), 31)
    assert float(moved.margin.mean) == float(head.margin.mean) != 20.0
    before = float(head.margin.mean)
    losses(moved, range(2, 4))
    assert float(head.margin.mean) == before
    fresh = remap_identities(head, torch.arange(29), 31, margin=AdaFace())
    assert float(fresh.margin.mean) == 20.0


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_statistics_stay_in_single_precision_whatever_the_model_is_cast_to(cast: str) -> None:
    """A hundredth of a change is below half precision's resolution at 20."""
    head, plain = make(AdaFace(), storage="float32"), make(AdaFace(), storage="float32")
    getattr(torch.nn.ModuleList([head]), cast)()
    assert losses(head, range(3)) == losses(plain, range(3))
    assert head.margin.mean.dtype == torch.float32 and torch.equal(head.margin.mean, plain.margin.mean)
