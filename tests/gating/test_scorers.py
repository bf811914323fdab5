import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import CosineScorer, LinearScorer, cosine_scores, linear_scores


@pytest.mark.parametrize("make", [lambda: LinearScorer(8, 5, bias=True), lambda: CosineScorer(8, 5, 0.1)])
def test_logits_are_float32_also_under_autocast(make) -> None:  # type: ignore[no-untyped-def]
    scorer = make()
    x = torch.randn(6, 8)
    expected = scorer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = scorer(x)
    assert under.dtype == torch.float32 and torch.equal(under, expected)
    assert scorer(x.bfloat16()).dtype == torch.float32
    assert make().bfloat16()(x.bfloat16()).dtype == torch.float32


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 6))
def test_scores_are_the_loop(t: int, e: int, d: int) -> None:
    x, weight = torch.randn(t, d, dtype=torch.float64), torch.randn(e, d, dtype=torch.float64)
    linear, cosine = linear_scores(x, weight), cosine_scores(x, weight, 0.5)
    assert linear.shape == cosine.shape == (t, e)
    for i in range(t):
        for j in range(e):
            dot = sum(float(a * b) for a, b in zip(x[i], weight[j], strict=True))
            norms = float(x[i].norm() * weight[j].norm())
            assert float(linear[i, j]) == pytest.approx(dot, abs=1e-12)
            assert float(cosine[i, j]) == pytest.approx(dot / norms / 0.5, abs=1e-12)


def test_without_a_temperature_the_logits_are_the_cosines() -> None:
    x, scorer = torch.randn(7, 4), CosineScorer(4, 5)
    torch.testing.assert_close(scorer(x), cosine_scores(x, scorer.weight))
    assert float(scorer(scorer.weight.detach()).diagonal().min().detach()) == pytest.approx(1.0)


def test_permuting_experts_permutes_logits() -> None:
    x, weight, order = torch.randn(7, 4), torch.randn(5, 4), torch.randperm(5)
    torch.testing.assert_close(linear_scores(x, weight[order]), linear_scores(x, weight)[:, order])
    torch.testing.assert_close(cosine_scores(x, weight[order]), cosine_scores(x, weight)[:, order])


def test_a_zero_vector_has_cosine_zero_and_finite_gradients() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    scores = CosineScorer(3, 2)(x)
    scores.sum().backward()
    assert torch.equal(scores, torch.zeros(1, 2)) and x.grad is not None and x.grad.isfinite().all()


def test_gradients() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_scores, (x, weight))
    assert torch.autograd.gradcheck(cosine_scores, (x, weight))


def test_the_temperature_can_be_learnt() -> None:
    scorer = CosineScorer(3, 2, 0.2, learn_temperature=True)
    scorer(torch.randn(4, 3)).square().sum().backward()
    assert float(scorer.log_temperature.exp().detach()) == pytest.approx(0.2)
    assert scorer.log_temperature.grad is not None and scorer.log_temperature.grad != 0
    assert not CosineScorer(3, 2).log_temperature.requires_grad


def test_bad_input_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match=r"x \[T, 4\], got \[2, 3\]"):
        LinearScorer(4, 2)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x \[T, 4\], got \[2, 1, 4\]"):
        CosineScorer(4, 2)(torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="positive, got 0"):
        CosineScorer(4, 2, 0)
