import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvision.gating import normalize

KINDS = ["identity", "softmax", "sigmoid", "sinkhorn"]
shapes = st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(0, 99))


def draw(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    t, e, seed = shape
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(t, e, generator=generator, dtype=torch.float64)
    return logits, torch.rand(t, e, generator=generator) < 0.6


@given(shapes)
def test_softmax_is_over_the_allowed(shape: tuple[int, int, int]) -> None:
    logits, allowed = draw(shape)
    probs = normalize(logits, "softmax", allowed=allowed)
    for t in range(len(logits)):
        weights = [float(v.exp()) * bool(a) for v, a in zip(logits[t], allowed[t], strict=True)]
        total = sum(weights) or 1.0
        assert probs[t].tolist() == pytest.approx([w / total for w in weights], abs=1e-12)


@given(shapes)
def test_elementwise_kinds(shape: tuple[int, int, int]) -> None:
    logits, allowed = draw(shape)
    assert torch.equal(normalize(logits, "identity"), logits)
    assert torch.equal(normalize(logits, "sigmoid"), logits.sigmoid())
    assert torch.equal(normalize(logits, "sigmoid", allowed=allowed), logits.sigmoid() * allowed)


@given(shapes)
def test_sinkhorn_has_its_marginals(shape: tuple[int, int, int]) -> None:
    logits, _ = draw(shape)
    t, e = logits.shape
    plan = normalize(logits, "sinkhorn", iterations=300)
    one = torch.ones(t, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(1), one)
    torch.testing.assert_close(plan.sum(0), torch.full((e,), t / e, dtype=torch.float64), atol=1e-3, rtol=0)
    # Rows are exact after any number of passes, columns get closer with each.
    early, late = (normalize(logits, "sinkhorn", iterations=n) for n in (1, 50))
    torch.testing.assert_close(early.sum(1), one)
    assert (late.sum(0) - t / e).abs().sum() <= (early.sum(0) - t / e).abs().sum() + 1e-9


@given(shapes)
def test_sinkhorn_is_diagonal_scaling(shape: tuple[int, int, int]) -> None:
    logits, _ = draw(shape)
    if len(logits):
        ratio = normalize(logits, "sinkhorn", iterations=5).log() - logits
        # row + column terms only: every 2 x 2 minor of the differences vanishes
        torch.testing.assert_close(ratio - ratio[:1], (ratio - ratio[:1])[:, :1].expand_as(ratio))


@given(shapes, st.integers(0, 99))
def test_sinkhorn_of_what_may_be_used_ignores_what_may_not(shape: tuple[int, int, int], seed: int) -> None:
    """Experts that nobody may use and tokens that may use none are as if they weren't there."""
    logits, _ = draw(shape)
    generator = torch.Generator().manual_seed(seed)
    tokens, experts = (torch.rand(n, generator=generator) < 0.6 for n in logits.shape)
    plan = normalize(logits, "sinkhorn", allowed=tokens[:, None] & experts, iterations=9)
    alone = normalize(logits[tokens][:, experts], "sinkhorn", iterations=9)
    torch.testing.assert_close(plan[tokens][:, experts], alone)
    assert float(plan.sum()) == pytest.approx(float(alone.sum()))


@given(shapes, st.sampled_from(["softmax", "sinkhorn"]), st.sampled_from([torch.float64, torch.float32]))
def test_a_token_gives_all_it_has_to_what_it_may_use(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype
) -> None:
    logits, allowed = draw(shape)
    plan = normalize(30 * logits.to(dtype), kind, allowed=allowed)  # type: ignore[arg-type]
    torch.testing.assert_close(plan.sum(1), allowed.any(1).to(dtype))


@given(shapes, st.sampled_from(KINDS))
def test_nothing_is_given_to_what_is_not_allowed_and_all_is_finite(
    shape: tuple[int, int, int], kind: str
) -> None:
    logits, allowed = draw(shape)
    for permitted in (allowed, torch.zeros_like(allowed)):
        leaf = logits.clone().requires_grad_()
        probs = normalize(leaf, kind, allowed=permitted)  # type: ignore[arg-type]
        probs.square().sum().backward()
        assert probs.shape == logits.shape and probs.isfinite().all() and (probs[~permitted] == 0).all()
        assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad[~permitted] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda z: normalize(z, kind), logits)  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(lambda z: normalize(z, kind, allowed=allowed), logits)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sinkhorn"])
def test_large_logits_stay_finite_in_float32(kind: str) -> None:
    probs = normalize(torch.tensor([[1e4, -1e4], [3e4, 3e4]]), kind)  # type: ignore[arg-type]
    assert probs.isfinite().all()


def test_bad_input_is_refused_with_its_values() -> None:
    with pytest.raises(ValueError, match="'sparsemax'"):
        normalize(torch.zeros(1, 2), "sparsemax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 iteration, got 0"):
        normalize(torch.zeros(1, 2), "sinkhorn", iterations=0)
    with pytest.raises(ValueError, match=r"bool \[1, 2\], got torch.bool \[2, 1\]"):
        normalize(torch.zeros(1, 2), allowed=torch.ones(2, 1, dtype=torch.bool))
